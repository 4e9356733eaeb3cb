"""Launching Triton kernels: compiled once per kind of arguments, launched without Triton's own dispatch after that.

Triton's dispatch looks at every argument of every launch, which costs the host 14 us with the 17 arguments of the MLP's
kernel and 19 us with the splice's 27, more than a small kernel takes on the device. A `Launch` is made once for what
Triton compiles differently for, and takes 4 us (benches/launch_cost.py). Import this module only where Triton is there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

# Triton reads this once, when its functions are decorated: kernels run on the CPU, one program after another.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_recorders: list[list[str]] = []
_current_device = torch.cuda.current_device


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels launched within the block, in order."""
    names: list[str] = []
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)


class Launch:
    """A Triton kernel with everything that it is compiled for, except for pointers that are not 16-byte aligned.

    So its maker keeps one per combination of the tensors' dtypes, of the constants, and of the integers that Triton
    specializes for: all that are not in `do_not_specialize`, for being 1, a multiple of 16, or wider than 32 bits.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 3, pdl: bool = False
    ) -> None:
        """kernel: what `@triton.jit` made. Its arguments are tensors, then integers, then constexprs.

        constants: the constexprs, by name.
        pdl: let it start while the kernel before it ends (sm_90 and later); the kernel waits by itself.
        """
        self.kernel = kernel
        self.name: str = kernel.__name__
        self.constants = constants
        self._options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if pdl:
            self._options["launch_pdl"] = True
        self._compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], integers: tuple[int, ...]) -> None:
        """Launch on the current stream of the first tensor's device."""
        for names in _recorders:
            names.append(self.name)
        if INTERPRETED:
            self.kernel[grid](*tensors, *integers, **self.constants)
            return
        device = tensors[0].device
        if device.index == _current_device():
            self._launch(grid, tensors, integers, device.index)
        else:
            with torch.cuda.device(device):
                self._launch(grid, tensors, integers, device.index)

    def _launch(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], integers: tuple[int, ...], device: int
    ) -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        aligned = True if bits % 16 == 0 else tuple(pointer % 16 == 0 for pointer in pointers)
        compiled = self._compiled.get((device, aligned))
        if compiled is None:
            compiled = self.kernel[grid](*tensors, *integers, **self.constants, **self._options)
            self._compiled[device, aligned] = compiled
            return
        # As Triton's own dispatch ends, but without its hooks for profilers of Triton's own.
        stream = triton.runtime.driver.active.get_current_stream(device)
        function, metadata = compiled.function, compiled.packed_metadata
        constants = self.constants.values()
        compiled.run(*grid, stream, function, metadata, None, None, None, *pointers, *integers, *constants)


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch is there from sm_90 on."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def cdiv(value: int, by: int) -> int:
    return -(-value // by)


def next_power_of_2(value: int) -> int:
    return int(triton.next_power_of_2(value))
