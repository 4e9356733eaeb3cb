"""Prompts' keys and values, kept between calls that train nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .shared import PromptStates, run_prompt
from .sharing import active_noise
from .stamp import Stamp, stamp

if TYPE_CHECKING:
    from .model import PromptModel


@dataclass
class _Entry:
    stamp: Stamp
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
        self, adapter_name: str, base: nn.Module, encoder: nn.Module, all_logits: bool, make: Callable[[], PromptStates]
    ) -> PromptStates:
        """The adapter's entry, made by `make()` without gradients if there is none that still holds.

        all_logits: the entry must have every virtual token's logits.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            now = stamp(base, encoder)
            entry = self._entries.pop(adapter_name, None)
            usable = entry is not None and (entry.all_logits or not all_logits)
            if entry is None or not usable or now is None or not entry.stamp.matches(now):
                states = make()
                if now is None:
                    return states
                entry = _Entry(now, states, all_logits, _size(states))
            self._entries[adapter_name] = entry
            while self.nbytes() > self.max_bytes:
                self._entries.popitem(last=False)
            return entry.states

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model starts with an empty cache: locks and weak references stay with the original."""
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["max_bytes"])  # type: ignore[misc]


def is_kept(model: PromptModel) -> bool:
    """Whether the active prompt's states may come from the cache: nothing is trained, random or watched."""
    assert model.active_adapter is not None
    encoder = model.prompt_encoder[model.active_adapter]
    if torch.compiler.is_compiling() or active_noise(encoder) is not None or _is_watched(encoder):
        return False
    trained = (parameter.requires_grad for part in (encoder, model.base_model) for parameter in part.parameters())
    return not (torch.is_grad_enabled() and any(trained))


def _is_watched(encoder: nn.Module) -> bool:
    """Whether hooks see the encoder's calls, or change what they give."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in encoder.modules())


def prompt_states(
    model: PromptModel, *, all_logits: bool, hidden_states: bool = False, wait: bool = False
) -> PromptStates:
    """The active prompt's states: kept ones where that is allowed, else from a pass of their own.

    wait: a pass of their own may leave logits of all virtual tokens until they are read.
    """

    def make() -> PromptStates:
        return run_prompt(model, all_logits=all_logits, hidden_states=hidden_states)

    if hidden_states or not is_kept(model):
        if all_logits and wait:
            return run_prompt(model, all_logits=False, hidden_states=hidden_states, may_repeat=True)
        return make()
    name = model.active_adapter
    assert name is not None
    return model.prompt_cache.get(name, model.base_model, model.prompt_encoder[name], all_logits, make)
