"""Whether a model's weights are still what they were."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Settings of LoRA layers and their relatives that are no tensors: what is active, merged, and how strong.
_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
_SAMPLES = 64  # values of each tensor that are compared, beside its version


@dataclass(frozen=True)
class Stamp:
    """What a tensor was: the same object with the same memory, version and sampled values holds the same weights."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[Any, ...], ...]
    settings: tuple[Any, ...]
    samples: tuple[Tensor, ...]

    def matches(self, other: Stamp) -> bool:
        return (
            self.versions == other.versions
            and self.settings == other.settings
            and all(one() is another() is not None for one, another in zip(self.tensors, other.tensors))
            and all(torch.equal(one, another) for one, another in zip(self.samples, other.samples))
        )


def stamp(module: nn.Module) -> Stamp | None:
    """The present state of all that the results of a base model or an encoder depend on; None if that cannot be told.

    Every parameter and buffer counts by identity, memory, dtype, device and version. `parameter.data += ...`, as LoRA
    merges its weights, changes no version: so a few values of each are compared as well.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors:
        return None  # a replica of DataParallel
    plain = (Tensor, nn.Parameter)
    if any((type(t) not in plain and is_traceable_wrapper_subclass(t)) or t.is_inference() for t in tensors):
        return None  # sharded or quantised outside of torch's own memory, or without versions
    if any(t.is_meta for t in tensors):
        return None  # offloaded
    if any(t.numel() == 0 for t in tensors if isinstance(t, nn.Parameter)):
        return None  # a shard of ZeRO-3, whose values are elsewhere
    versions = tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    layers = (vars(part) for part in module.modules() if "_disable_adapters" in vars(part))
    settings = (autocast, attention, *(repr([layer.get(name) for name in _SWITCHES]) for layer in layers))
    with torch.no_grad():
        samples = tuple(_samples(tensors))
    return Stamp(tuple(map(weakref.ref, tensors)), versions, settings, samples)


def as_now(module: nn.Module, device: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that makes logits later by `call()`, under the autocast of now.

    Raises, when it is called:
        RuntimeError: the module's weights have changed since.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    before = stamp(module)

    def run() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            now = stamp(module)
            if before is not None and (now is None or not before.matches(now)):
                raise RuntimeError("logits: expected to be read before the base model's weights change")
            return call()

    return run


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
