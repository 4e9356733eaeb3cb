"""What this machine can do at most, measured in the same run as everything else: copying, and multiplying matrices."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._work import Work

# The sizes at which a run only shows that everything works.
TOY = os.environ.get("FUSEDPROMPT_BENCH_TOY", "0") == "1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32}


def synchronize() -> None:
    """Wait for the device that tensors are made on by default (`--device`)."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def _best(call: Callable[[], object], rounds: int = 15) -> float:
    """The shortest time of a call, in seconds: a limit is what can be reached, not what usually is."""
    call()
    times = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of torch's copy between two buffers that no cache holds."""
    megabytes = 1 if TOY else 2048 if torch.get_default_device().type == "cuda" else 256
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / _best(lambda: target.copy_(source))


@functools.cache
def matrix_rate(dtype: str) -> float:
    """Floating-point operations a second of torch's product of two square matrices."""
    size = 64 if TOY else 8192 if torch.get_default_device().type == "cuda" else 2048
    # Random: a chip that multiplies equal numbers needs less power, and runs faster.
    a, b = (torch.randn(size, size).to(DTYPES[dtype]) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        return 2 * size**3 / _best(lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(before)


def floor_seconds(work: Work, dtype: str, of: Mapping[str, Any] | None = None) -> float:
    """The time that the least work takes at these limits, if moving and computing overlap fully.

    Data that a cache holds can be moved faster than a copy of 256 MB moves it, so small work may beat this floor.

    of: limits of another machine, as of `limits`.
    """
    if of is None:
        rates = copy_bandwidth(), matrix_rate(dtype) if work.flops else 1.0
    else:
        rates = 1e9 * of["copy_gb_per_s"], 1e9 * of["matrix_gflop_per_s"][dtype]
    return max(work.bytes / rates[0], work.flops / rates[1])


# Between two kernels of a CUDA graph, a guess until benches/gpu/probe.cu has measured it.
LAUNCH_SECONDS = 1.5e-6


def predicted_seconds(kernels: Sequence[Work], dtype: str, of: Mapping[str, Any] | None = None) -> float:
    """The time of kernels that run one after another on a GPU: the floor of each, and its launch."""
    return sum(floor_seconds(kernel, dtype, of) + LAUNCH_SECONDS for kernel in kernels)


def limits() -> dict[str, Any]:
    """For a result's description of the machine."""
    on_gpu = torch.get_default_device().type == "cuda"
    names = [name for name in DTYPES if on_gpu or name != "tf32"]
    return {
        "copy_gb_per_s": copy_bandwidth() / 1e9,
        "matrix_gflop_per_s": {name: matrix_rate(name) / 1e9 for name in names},
    }
