"""How much memory a piece of work holds at its peak: counted, allocation by allocation."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
    """Floating-point operations of the matrix products that `work` dispatches."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
