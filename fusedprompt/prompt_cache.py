"""Prompts' keys and values, kept between calls that train nothing."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .shared import PromptStates, run_prompt
from .sharing import active_noise

if TYPE_CHECKING:
    from .model import PromptModel

_SAMPLES = 64  # values of each tensor that are compared, beside its version


@dataclass(frozen=True)
class _Stamp:
    """What a tensor was: the same object with the same memory, version and sampled values holds the same weights."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[Any, ...], ...]
    settings: tuple[Any, ...]
    samples: tuple[Tensor, ...]

    def matches(self, other: _Stamp) -> bool:
        return (
            self.versions == other.versions
            and self.settings == other.settings
            and all(one() is another() is not None for one, another in zip(self.tensors, other.tensors))
            and all(torch.equal(one, another) for one, another in zip(self.samples, other.samples))
        )


def _stamp(base: nn.Module, encoder: nn.Module) -> _Stamp | None:
    """The present state of all that a prompt's keys and values depend on; None if that cannot be told.

    Every parameter and buffer counts by identity, memory, dtype, device and version. `parameter.data += ...`, as LoRA
    merges its weights, changes no version: so a few values of each are compared as well.
    """
    tensors = [*_tensors(encoder), *_tensors(base)]
    plain = (Tensor, nn.Parameter)
    if any((type(t) not in plain and is_traceable_wrapper_subclass(t)) or t.is_inference() for t in tensors):
        return None  # sharded or quantised outside of torch's own memory, or without versions
    versions = tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = (autocast, getattr(base.config, "_attn_implementation", None), *_switches(base))
    return _Stamp(tuple(map(weakref.ref, tensors)), versions, settings, tuple(_samples(tensors)))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _switches(base: nn.Module) -> list[Any]:
    """Settings of LoRA layers and their relatives that are no tensors: what is active, merged, and how strong."""
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    layers = (vars(part) for part in base.modules() if "_disable_adapters" in vars(part))
    return [repr([layer.get(name) for name in names]) for layer in layers]


def _samples(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Up to 64 values spread over each tensor, in one vector per device and dtype."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in tensors:
        count = tensor.numel()
        if count and tensor.is_floating_point() and tensor.is_contiguous() and not tensor.is_meta:
            step = -(-count // _SAMPLES)
            sample = tensor.as_strided((-(-count // step),), (step,))
            groups.setdefault((tensor.device, tensor.dtype), []).append(sample)
    for samples in groups.values():
        yield torch.cat(samples)


@dataclass
class _Entry:
    stamp: _Stamp
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
            stamp = _stamp(base, encoder)
            entry = self._entries.pop(adapter_name, None)
            usable = entry is not None and (entry.all_logits or not all_logits)
            if entry is None or not usable or stamp is None or not entry.stamp.matches(stamp):
                states = make()
                if stamp is None:
                    return states
                entry = _Entry(stamp, states, all_logits, _size(states))
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
    """Whether the active prompt's states may come from the cache: nothing is trained, and nothing is random."""
    assert model.active_adapter is not None
    encoder = model.prompt_encoder[model.active_adapter]
    if torch.compiler.is_compiling() or active_noise(encoder) is not None:
        return False
    trained = (parameter.requires_grad for part in (encoder, model.base_model) for parameter in part.parameters())
    return not (torch.is_grad_enabled() and any(trained))


def prompt_states(model: PromptModel, *, all_logits: bool, hidden_states: bool = False) -> PromptStates:
    """The active prompt's states: kept ones where that is allowed, else from a pass of their own."""

    def make() -> PromptStates:
        return run_prompt(model, all_logits=all_logits, hidden_states=hidden_states)

    if hidden_states or not is_kept(model):
        return make()
    name = model.active_adapter
    assert name is not None
    return model.prompt_cache.get(name, model.base_model, model.prompt_encoder[name], all_logits, make)
