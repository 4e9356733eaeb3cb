"""Tiles of CPT's kernels, chosen by the width alone.

Compiled ahead of time for sm_80, sm_90 and sm_100, none of them spills.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._triton import next_power_of_2
from ._kernels import cpt_backward, cpt_forward


def config(width: int) -> dict[str, int]:
    """Of a program of 128 threads: a load of 16 bytes each, or two of them in fp32."""
    return {"BLOCK_D": min(1024, max(16, next_power_of_2(width))), "num_warps": 4}


def configurations(pdl: bool) -> Iterator[dict[str, Any]]:
    """Each way to compile the kernels; see the splice's."""
    names = ("embedding_ptr", "delta_ptr", "rows_ptr", "projected_ptr", "d_rows_ptr", "d_delta_ptr")
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (64, 4096, 4097):
            tile = config(width)
            values = {"BLOCK_D": tile["BLOCK_D"], "PDL": pdl}
            pointers = {**dict.fromkeys(names, f"*{dtype}"), "epsilon_ptr": "*fp32", "trainable_ptr": "*u8"}
            for kernel in (cpt_forward, cpt_backward):
                yield {
                    "kernel": kernel,
                    "types": {**pointers, **dict.fromkeys(values, "constexpr")},
                    "constants": values,
                    "aligned": ("D",) if width % 16 == 0 else (),
                    "num_warps": tile["num_warps"],
                    "num_stages": 3,
                    "label": f"{dtype}, D={width}",
                }
