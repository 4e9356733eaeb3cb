"""How much memory a piece of work holds at its peak: counted, allocation by allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` holds at once, beyond what was there before, on the default device.

    From torch's own allocator, so it repeats exactly; memory that libraries allocate by themselves (oneDNN's scratch
    pads) is not in it.
    """
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler:
        result = work()
    del result
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def counted_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that `work` dispatches, those within our own ops included."""
    from torch.utils.flop_counter import FlopCounterMode

    own: Any = torch.ops.fusedprompt
    ops = (getattr(own, name, None) for name in ("head_loss", "head_loss_triton"))  # the second: where Triton is
    formulas: dict[Any, Any] = {op: _head_loss for op in ops if op is not None}
    if hasattr(own, "lstm_native_forward"):
        formulas |= {own.lstm_native_forward: _lstm_forward, own.lstm_native_backward: _lstm_backward}
    for formula in formulas.values():
        formula._get_raw = True  # called with the op's arguments, and not with their shapes
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return int(counter.get_total_flops())


def _head_loss(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, *rest: Any, **_: Any) -> int:
    return (4 if rest[-1] else 2) * int((labels != -100).sum()) * weight.numel()


def _lstm_forward(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _lstm_backward(d_output: Tensor, x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * _lstm_forward(x, weights)
