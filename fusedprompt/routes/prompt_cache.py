"""Prompts' keys and values, kept between calls that train nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..base.stamp import Stamp, stamp
from ..layouts.prompt import Source

Kept = TypeVar("Kept", bound=Any)


@dataclass
class _Entry:
    base: Stamp
    own: Stamp
    states: Any
    all_logits: bool
    bytes: int


class PromptCache:
    """The prompts of a model's adapters, and of their tasks, as the base model's keys and values, the last used kept
    longest.

    An entry serves until its adapter's or the base model's weights, dtype, device or settings change. Use from several
    threads is safe: entries are not changed, and each call works on a cache of its own.

    Attributes:
        max_bytes: the memory that entries may take together; the least recently used go first.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Source, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def nbytes(self) -> int:
        """Memory that the entries take."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def clear(self, adapter_name: str | None = None) -> None:
        """Forget one adapter's prompts, or all."""
        with self._lock:
            for source in [*self._entries]:
                if adapter_name in (None, source[0]):
                    del self._entries[source]

    def get(
        self,
        base: nn.Module,
        encoders: Mapping[Source, nn.Module],
        all_logits: bool,
        make: Callable[[Source], Kept],
    ) -> list[Kept]:
        """The entries of sources, made by `make(source)` without gradients where there is none that still holds.

        base: what the states depend on beside an adapter's encoder.
        all_logits: the entries must have every virtual token's logits.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            now, found = stamp(base), list[Any]()
            unchanged: list[Stamp] = []  # stamps of the base model that hold: entries made in one call have the same
            for source, encoder in encoders.items():
                own, entry = stamp(encoder), self._entries.pop(source, None)
                if entry is not None and not (
                    (entry.all_logits or not all_logits)
                    and now is not None
                    and own is not None
                    and (any(entry.base is one for one in unchanged) or entry.base.matches(now))
                    and entry.own.matches(own)
                ):
                    entry = None
                if entry is None:
                    states = make(source)
                    if now is None or own is None:
                        found.append(states)
                        continue
                    entry = _Entry(now, own, states, all_logits, states.nbytes)
                unchanged.append(entry.base)
                found.append(entry.states)
                self._entries[source] = entry
            while self.nbytes() > self.max_bytes:
                self._entries.popitem(last=False)
            return found

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model starts with an empty cache: locks and weak references stay with the original."""
        return PromptCache, (self.max_bytes,)
