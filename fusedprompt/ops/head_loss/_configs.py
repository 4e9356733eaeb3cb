"""How the loss's kernel is compiled, chosen by the sizes alone.

Compiled ahead of time for sm_80, sm_90 and sm_100, none of it spills or takes more than 32 KB of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...layouts.layout import IGNORE_INDEX
from .._triton import next_power_of_2
from ._kernels import loss_in_place
from ._op import Scaling


def config(vocabulary: int, itemsize: int) -> dict[str, int]:
    """One 128-bit load a thread and step, with the next two steps in flight.

    A row of 128256 logits gets 1024 threads, whose registers fill a multiprocessor: so no more rows are in work than L2
    holds, and the second reading comes from there.
    """
    elements = 16 // itemsize
    num_warps = min(32, max(4, next_power_of_2(vocabulary) // (32 * elements)))
    return {"BLOCK": num_warps * 32 * elements, "STAGES": 3, "num_warps": num_warps}


def constants(tile: dict[str, int], has_factors: bool, trains: bool, scaling: Scaling, pdl: bool) -> dict[str, Any]:
    """The constexprs of the kernel, in their order there."""
    return {
        "HAS_FACTORS": has_factors,
        "TRAINS": trains,
        "SCALE": float(scaling.scale),
        "SOFT_CAP": float(scaling.soft_cap),
        "IGNORED": IGNORE_INDEX,
        "BLOCK": tile["BLOCK"],
        "STAGES": tile["STAGES"],
        "PDL": pdl,
    }


def configurations(pdl: bool) -> Iterator[dict[str, Any]]:
    """Ways to compile the kernel: wide rows, odd and narrow ones, with and without all options; see the splice's."""
    plain, capped = Scaling(0.0, 1.0), Scaling(30.0, 0.5)
    ways = (
        (128256, plain, True),
        (128256, plain, False),
        (128256, capped, True),
        (50257, plain, True),
        (67, capped, True),
    )
    for logits, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for vocabulary, scaling, trains in ways:
            tile = config(vocabulary, itemsize)
            values = constants(tile, True, trains, scaling, pdl)
            pointers = {"logits_ptr": f"*{logits}", "labels_ptr": "*i64"}
            pointers |= dict.fromkeys(("factors_ptr", "losses_ptr"), "*fp32")
            what = f"{'gradient' if trains else 'loss alone'}{', soft cap' if scaling.soft_cap else ''}"
            yield {
                "kernel": loss_in_place,
                "types": {**pointers, **dict.fromkeys(values, "constexpr")},
                "constants": values,
                "aligned": ("V",) if vocabulary % 16 == 0 else (),
                "num_warps": tile["num_warps"],
                "num_stages": 3,
                "label": f"{logits}, {what}, V={vocabulary}",
            }
