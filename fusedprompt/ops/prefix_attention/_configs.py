"""Tiles of prefix_attention's kernels, chosen by the sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .._triton import next_power_of_2

WIDEST = 256
FEW_QUERIES = 16  # the fewest rows of a product


class Kind(NamedTuple):
    """What all kernels are compiled for: of the arguments, of the base model, and of the machine.

    width, value_width: d and dv. scale, softcap, window: see the op, 0 for none. precision: "ieee" or "tf32" products.
    """

    itemsize: int
    group: int
    width: int
    value_width: int
    scale: float
    softcap: float
    window: int
    precision: str
    pdl: bool
    interpreted: bool

    @property
    def blocks(self) -> dict[str, int]:
        """Columns of a tile of queries and keys, and of one of values."""
        return {name: max(16, next_power_of_2(w)) for name, w in (("D", self.width), ("V", self.value_width))}


def tile(kernel: Any, kind: Kind, few: bool) -> dict[str, int]:
    """few: no row has more than FEW_QUERIES."""
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def constants(kernel: Any, kind: Kind, few: bool, flags: dict[str, Any]) -> dict[str, Any]:
    """The constexprs of a kernel, in their order there. flags: those that not all kernels have."""
    sizes = tile(kernel, kind, few)
    values = {
        **flags,
        "GROUP": kind.group,
        "WINDOW": kind.window,
        "SCALE": kind.scale,
        "SOFTCAP": kind.softcap,
        "WIDTH": kind.width,
        "VALUE_WIDTH": kind.value_width,
        "PRECISION": kind.precision,
        **{f"BLOCK_{name}": value for name, value in kind.blocks.items()},
        "BLOCK_M": sizes["BLOCK_M"],
        "BLOCK_N": sizes["BLOCK_N"],
        "PDL": kind.pdl,
        "INTERPRETED": kind.interpreted,
    }
    return {name: values[name] for name in kernel.arg_names if name in values}


def configurations(pdl: bool) -> Iterator[dict[str, Any]]:
    yield from ()
