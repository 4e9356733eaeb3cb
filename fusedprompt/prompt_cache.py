"""Prompts' keys and values, kept between calls that train nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .mixed import Mixture
from .shared import PromptStates, run_prompt
from .sharing import active_noise
from .stamp import Stamp, stamp

if TYPE_CHECKING:
    from .model import PromptModel


@dataclass
class _Entry:
    base: Stamp
    own: Stamp
    states: PromptStates
    all_logits: bool
    bytes: int


def _size(states: PromptStates) -> int:
    layers = states.cache.layers
    parts = [states.logits, *(layer.keys for layer in layers), *(layer.values for layer in layers)]
    return sum(part.numel() * part.element_size() for part in parts)


class PromptCache:
    """The prompts of a model's adapters as the base model's keys and values, the last used kept longest.

    An entry serves until its adapter's or the base model's weights, dtype, device or settings change. Use from several
    threads is safe: entries are not changed, and each call works on a cache of its own.

    Attributes:
        max_bytes: the memory that entries may take together; the least recently used go first.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def nbytes(self) -> int:
        """Memory that the entries take."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def clear(self, adapter_name: str | None = None) -> None:
        """Forget one adapter's prompt, or all."""
        with self._lock:
            if adapter_name is None:
                self._entries.clear()
            self._entries.pop(str(adapter_name), None)

    def get(
        self,
        base: nn.Module,
        encoders: Mapping[str, nn.Module],
        all_logits: bool,
        make: Callable[[str], PromptStates],
    ) -> list[PromptStates]:
        """The entries of adapters, made by `make(name)` without gradients where there is none that still holds.

        all_logits: the entries must have every virtual token's logits.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            now, found = stamp(base), []
            unchanged: list[Stamp] = []  # stamps of the base model that hold: entries made in one call have the same
            for name, encoder in encoders.items():
                own, entry = stamp(encoder), self._entries.pop(name, None)
                if entry is not None and not (
                    (entry.all_logits or not all_logits)
                    and now is not None
                    and own is not None
                    and (any(entry.base is one for one in unchanged) or entry.base.matches(now))
                    and entry.own.matches(own)
                ):
                    entry = None
                if entry is None:
                    states = make(name)
                    if now is None or own is None:
                        found.append(states)
                        continue
                    entry = _Entry(now, own, states, all_logits, _size(states))
                unchanged.append(entry.base)
                found.append(entry.states)
                self._entries[name] = entry
            while self.nbytes() > self.max_bytes:
                self._entries.popitem(last=False)
            return found

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model starts with an empty cache: locks and weak references stay with the original."""
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["max_bytes"])  # type: ignore[misc]


def is_kept(model: PromptModel, mixture: Mixture | None = None) -> bool:
    """Whether the prompts' states may come from the cache: nothing is trained, random or watched.

    mixture: of which prompts, where not of the active one.
    """
    names = mixture.adapters if mixture is not None else (model.active_adapter,)
    encoders = [model.prompt_encoder[name] for name in names if name is not None]
    if torch.compiler.is_compiling() or any(active_noise(part) is not None or _is_watched(part) for part in encoders):
        return False
    trained = (parameter.requires_grad for part in (*encoders, model.base_model) for parameter in part.parameters())
    return not (torch.is_grad_enabled() and any(trained))


def _is_watched(encoder: nn.Module) -> bool:
    """Whether hooks see the encoder's calls, or change what they give."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in encoder.modules())


def prompt_states(
    model: PromptModel,
    *,
    all_logits: bool,
    hidden_states: bool = False,
    wait: bool = False,
    mixture: Mixture | None = None,
) -> PromptStates:
    """The active prompt's states, or a mixture's: kept ones where that is allowed, else from a pass of their own.

    wait: a pass of their own may leave logits of all virtual tokens until they are read.
    """
    if hidden_states or not is_kept(model, mixture):
        waits = all_logits and wait
        return run_prompt(
            model,
            all_logits=all_logits and not waits,
            hidden_states=hidden_states,
            wait=waits,
            mixture=mixture,
        )
    names = mixture.adapters if mixture is not None else (model.active_adapter,)

    def make(name: str) -> PromptStates:
        return run_prompt(model, all_logits=all_logits, adapter_name=None if mixture is None else name)

    encoders = {name: model.prompt_encoder[name] for name in names if name is not None}
    states = model.prompt_cache.get(model.base_model, encoders, all_logits, make)
    return states[0] if mixture is None else PromptStates.stacked(states, mixture)
