"""Launching Triton kernels: compiled once per kind of arguments, launched without Triton's own dispatch after that.

Triton's JIT dispatch costs the host 9-11 us a launch, more than a small kernel takes on the device. A `Kernel` keeps
what Triton compiled under a key of its own, and launches that directly (2-4 us). Import this module only where Triton
is known to be there.
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


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels launched within the block, in order."""
    names: list[str] = []
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)


def _kind(argument: Any, specialized: bool) -> Any:
    """What Triton may compile differently for: dtype and 16-byte alignment of tensors, 1 and multiples of 16 of ints.

    specialized: not in the kernel's `do_not_specialize`, which leaves only the width of an int.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        is_wide = not -(2**31) <= argument < 2**31
        return (argument == 1, argument % 16 == 0, is_wide) if specialized else is_wide
    return type(argument)


class Kernel:
    """A Triton kernel and everything compiled from it so far."""

    def __init__(self, function: Any) -> None:
        """function: what `@triton.jit` made."""
        self.function = function
        self.name: str = function.__name__
        self._specialized = () if INTERPRETED else tuple(not param.do_not_specialize for param in function.params)
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int] | tuple[int],
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        launch_pdl: bool = False,
        **constants: Any,
    ) -> None:
        """Launch on the current stream of the device of the first tensor.

        arguments: the kernel's, up to its first constexpr. constants: its constexprs, by name, in the kernel's order.
        launch_pdl: let it start while the kernel before it ends (sm_90 and later; the kernel waits by itself).
        """
        for names in _recorders:
            names.append(self.name)
        if INTERPRETED:
            self.function[grid](*arguments, **constants)
            return
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device(device):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            if launch_pdl:
                options["launch_pdl"] = True
            key = (device.index, *map(_kind, arguments, self._specialized), *constants.values(), *options.items())
            compiled = self._compiled.get(key)
            if compiled is None:
                self._compiled[key] = self.function[grid](*arguments, **constants, **options)
                return
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch is there from sm_90 on. (AMD's gfx9 counts as capability 9, too.)"""
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def cdiv(value: int, by: int) -> int:
    return -(-value // by)


def next_power_of_2(value: int) -> int:
    return int(triton.next_power_of_2(value))
