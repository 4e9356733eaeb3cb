"""Tiles of the splice's kernels, chosen by the sizes alone.

Compiled ahead of time for sm_80, sm_90 and sm_100, none of them spills.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from .._triton import next_power_of_2
from ._kernels import segment_sum, splice_forward, splice_prefix_backward

_POLICIES = ("evict_last", "evict_first", "")
# "evict_last" serves ids that repeat; a table of hundreds of MB may drive out of L2 what others need. Not measured yet.
TABLE_POLICY = os.environ.get("FUSEDPROMPT_SPLICE_TABLE", _POLICIES[0])
if TABLE_POLICY not in _POLICIES:
    raise ValueError(f"FUSEDPROMPT_SPLICE_TABLE: expected one of {_POLICIES}, got {TABLE_POLICY!r}")


def forward_config(width: int, itemsize: int) -> dict[str, int]:
    """Tile of a program of 128 threads: 32 bytes a thread, or 8 elements where they must be read one by one."""
    elements = 4096 // itemsize if width % 16 == 0 else 1024
    block = min(1024, max(16, next_power_of_2(width)))
    return {"ROWS": elements // block, "BLOCK_D": block, "num_warps": 4}


def backward_config(width: int, many: bool) -> dict[str, int]:
    """Tile of 1024 elements: narrow where few sums must fill the device, wide where a vocabulary has enough of them."""
    block = min(1024 if many else 128, max(16, next_power_of_2(width)))
    return {"ROWS": 1024 // block, "BLOCK_D": block, "num_warps": 4}


def configurations(pdl: bool) -> Iterator[dict[str, Any]]:
    """Each way to compile the kernels, for those who do it without a GPU to look at the result.

    pdl: with programmatic dependent launch, as on sm_90 and later.
    aligned: the integers that are multiples of 16 there, as pointers are everywhere; none at the odd widths.
    """
    for rows in ("bf16", "fp16", "fp32"):
        for width in (64, 4096, 4097):
            aligned = ["D"] if width % 16 == 0 else []
            for prefix, from_table in ((True, True), (True, False), (False, True), (False, False)):
                pointers = dict.fromkeys(("slots_ptr", "ids_ptr", "filled_ptr"), "*i64")
                pointers |= dict.fromkeys(("field0_ptr", "field1_ptr", "field2_ptr"), "*i64")
                pointers |= {"prompt_ptr": "*fp32", "rows_ptr": f"*{rows}", "out_ptr": f"*{rows}"}
                constants = {"PREFIX": prefix, "FROM_TABLE": from_table, "NUM_FIELDS": 3, "TABLE_POLICY": TABLE_POLICY}
                constants |= forward_config(width, 4 if rows == "fp32" else 2)
                origin = "table" if from_table else "inputs_embeds"
                label = f"{'prefix' if prefix else 'slots'}, {origin} {rows}, D={width}"
                yield _configuration(splice_forward, pointers, {**constants, "PDL": pdl}, aligned, label)
        for width in (4096, 4097):
            aligned = ["stride_b", "stride_s", "D"] if width % 16 == 0 else []
            pointers = {"d_out_ptr": f"*{rows}", "d_prompt_ptr": "*fp32"}
            constants = {**backward_config(width, many=False), "PDL": pdl}
            yield _configuration(splice_prefix_backward, pointers, constants, aligned, f"{rows}, D={width}")
            for many in (False, True):
                pointers = {"rows_ptr": f"*{rows}", "order_ptr": "*i64", "bounds_ptr": "*i64"}
                pointers["out_ptr"] = f"*{rows}" if many else "*fp32"
                constants = {**backward_config(width, many), "PDL": pdl}
                label = f"{rows}, {'over' if many else 'up to'} 4096 sums, D={width}"
                yield _configuration(segment_sum, pointers, constants, aligned[-1:], label)


def _configuration(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], aligned: list[str], label: str
) -> dict[str, Any]:
    values = {name: value for name, value in constants.items() if name != "num_warps"}
    return {
        "kernel": kernel,
        "types": {**pointers, **dict.fromkeys(values, "constexpr")},
        "constants": values,
        "aligned": tuple(aligned),
        "num_warps": constants["num_warps"],
        "num_stages": 3,
        "label": label,
    }
