"""Splice on Triton: the whole batch in one launch, each output row read once and written once.

A plain prefix computes where its rows come from, any other layout reads it; mask, labels and position ids are written
by the same programs. The gradients are sums over segments, in a fixed order and without atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import define
from .._triton import Kernel, cdiv, next_power_of_2
from ._kernels import segment_sum, splice_forward, splice_prefix_backward
from ._op import CHECK_IDS, POSITIONS, filled_dtype, out_of_range, register

_forward = Kernel(splice_forward)
_prefix_backward = Kernel(splice_prefix_backward)
_segment_sum = Kernel(segment_sum)


def forward_config(width: int) -> dict[str, int]:
    """Tile of a program of 128 threads: 16 bytes a thread across a row, and as many rows as make 2048 elements."""
    block = min(1024, max(16, next_power_of_2(width)))
    return {"ROWS": max(1, 2048 // block), "BLOCK_D": block, "num_warps": 4}


def backward_config(width: int, targets: int) -> dict[str, int]:
    """Tile of 1024 elements: narrow where few sums must fill the device, wide where a vocabulary has enough of them."""
    block = min(128 if targets <= 4096 else 1024, max(16, next_power_of_2(width)))
    return {"ROWS": 1024 // block, "BLOCK_D": block, "num_warps": 4}


def _splice(
    prompt: Tensor,
    slots: Tensor | None,
    input_ids: Tensor | None,
    table: Tensor | None,
    inputs_embeds: Tensor | None,
    fields: Sequence[Tensor],
    fills: Sequence[int],
) -> tuple[Tensor, Tensor]:
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    rows = table if inputs_embeds is None else inputs_embeds
    assert tokens is not None and rows is not None
    if CHECK_IDS and inputs_embeds is None and bool(((tokens < 0) | (tokens >= rows.shape[0])).any()):
        raise out_of_range(tokens, rows)
    batch, length = tokens.shape[:2]
    num_rows, width = prompt.shape
    total = num_rows + length if slots is None else slots.shape[1]
    out = rows.new_empty(batch, total, width)
    filled = tokens.new_empty((len(fields), batch, total), dtype=filled_dtype(input_ids))
    if batch * total == 0:
        return out, filled
    tokens = tokens.contiguous()
    given = [field.contiguous() for field in fields] + [filled] * (3 - len(fields))
    steps = [int(fill >= POSITIONS) for fill in fills]
    starts = [fill - POSITIONS if step else fill for fill, step in zip(fills, steps)]
    unused = [0] * (3 - len(fields))
    config = forward_config(width)
    _forward(
        (batch * cdiv(total, config["ROWS"]),),
        prompt.contiguous(),
        filled if slots is None else slots.contiguous(),
        tokens,
        rows.contiguous() if inputs_embeds is None else tokens,
        *given,
        out,
        filled,
        num_rows,
        total,
        length,
        width,
        rows.shape[0],
        batch * total,
        *starts,
        *unused,
        *steps,
        *unused,
        num_warps=config["num_warps"],
        PREFIX=slots is None,
        FROM_TABLE=inputs_embeds is None,
        NUM_FIELDS=len(fields),
        ROWS=config["ROWS"],
        BLOCK_D=config["BLOCK_D"],
    )
    return out, filled


def _splice_backward(
    d_out: Tensor, slots: Tensor | None, num_prompt_rows: int, num_tokens: int, prompt: bool, tokens: bool
) -> tuple[Tensor, Tensor]:
    d_prompt, d_tokens = d_out.new_empty(0, dtype=torch.float32), d_out.new_empty(0)
    batch, _, width = d_out.shape
    if slots is None:
        if prompt:
            d_prompt = _sum_over_batch(d_out[:, :num_prompt_rows])
        if tokens:
            d_tokens = d_out[:, num_prompt_rows:].clone(memory_format=torch.contiguous_format)
        return d_prompt, d_tokens
    rows = d_out.reshape(-1, width).contiguous()  # reshape alone keeps the strides of an expanded gradient
    if prompt:
        target = torch.where(slots < 0, ~slots, num_prompt_rows)  # a token is past the last segment
        d_prompt = _sum_by(target.flatten(), rows, num_prompt_rows, torch.float32)
    if tokens:
        first = torch.arange(batch, device=slots.device).unsqueeze(1) * num_tokens
        target = torch.where((slots < 0) | (slots >= num_tokens), batch * num_tokens, slots + first)
        d_tokens = _sum_by(target.flatten(), rows, batch * num_tokens, d_out.dtype).view(batch, num_tokens, width)
    return d_prompt, d_tokens


def _sum_over_batch(d_out: Tensor) -> Tensor:
    """Sum (B, R, D) over B, in fp32."""
    batch, num_rows, width = d_out.shape
    total = d_out.new_empty((num_rows, width), dtype=torch.float32)
    if d_out.stride(2) != 1:
        d_out = d_out.contiguous()
    if total.numel():
        config: dict[str, Any] = backward_config(width, num_rows)
        grid = (num_rows, cdiv(width, config["BLOCK_D"]))
        _prefix_backward(grid, d_out, total, batch, d_out.stride(0), d_out.stride(1), width, **config)
    return total


def _sum_by(target: Tensor, rows: Tensor, num_targets: int, dtype: torch.dtype) -> Tensor:
    """Sum rows (N, D) by target (N,) into (num_targets, D); rows for targets outside of that are dropped."""
    width = rows.shape[1]
    total = rows.new_empty((num_targets, width), dtype=dtype)
    in_order, order = torch.sort(target, stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(num_targets + 1, device=target.device, dtype=target.dtype))
    if total.numel():
        config: dict[str, Any] = backward_config(width, num_targets)
        grid = (num_targets, cdiv(width, config["BLOCK_D"]))
        _segment_sum(grid, rows, order, bounds, total, width, **config)
    return total


def _table_backward(d_tokens: Tensor, input_ids: Tensor, num_table_rows: int) -> Tensor:
    return _sum_by(input_ids.flatten(), d_tokens.flatten(0, 1).contiguous(), num_table_rows, d_tokens.dtype)


def _table_gradient(d_tokens: Tensor, input_ids: Tensor, num_table_rows: int) -> Tensor:
    d_table: Tensor = torch.ops.fusedprompt.splice_table_backward_triton(d_tokens, input_ids, num_table_rows)
    return d_table


define(
    "splice_table_backward_triton(Tensor d_tokens, Tensor input_ids, SymInt num_table_rows) -> Tensor",
    _table_backward,
    lambda d_tokens, _, num_table_rows: d_tokens.new_empty(num_table_rows, d_tokens.shape[2]),
)
splice = register("_triton", _splice, _splice_backward, _table_gradient)


def configurations() -> Iterator[dict[str, Any]]:
    """Each way to compile the kernels at common widths, for those who compile them without a GPU to look at the result.

    aligned: the integers that are multiples of 16 there, as pointers are everywhere.
    """
    for rows in ("bf16", "fp32"):
        for width in (64, 4096):
            for prefix, from_table in ((True, True), (True, False), (False, True), (False, False)):
                pointers = dict.fromkeys(("slots_ptr", "ids_ptr", "filled_ptr"), "*i64")
                pointers |= dict.fromkeys(("field0_ptr", "field1_ptr", "field2_ptr"), "*i64")
                pointers |= {"prompt_ptr": "*fp32", "rows_ptr": f"*{rows}", "out_ptr": f"*{rows}"}
                constants = {"PREFIX": prefix, "FROM_TABLE": from_table, "NUM_FIELDS": 3, **forward_config(width)}
                origin = "table" if from_table else "inputs_embeds"
                label = f"{'prefix' if prefix else 'slots'}, {origin} {rows}, D={width}"
                yield _configuration(splice_forward, pointers, constants, ("D",), label)
        pointers = {"d_out_ptr": f"*{rows}", "d_prompt_ptr": "*fp32"}
        aligned = ("stride_b", "stride_s", "D")
        yield _configuration(splice_prefix_backward, pointers, backward_config(4096, 20), aligned, f"{rows}, D=4096")
        for targets in (20, 32000):
            pointers = {"rows_ptr": f"*{rows}", "order_ptr": "*i64", "bounds_ptr": "*i64"}
            pointers["out_ptr"] = "*fp32" if targets == 20 else f"*{rows}"
            label = f"{rows}, {targets} sums, D=4096"
            yield _configuration(segment_sum, pointers, backward_config(4096, targets), ("D",), label)


def _configuration(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...], label: str
) -> dict[str, Any]:
    values = {name: value for name, value in constants.items() if name != "num_warps"}
    return {
        "kernel": kernel,
        "signature": {name: pointers.get(name, "constexpr" if name in values else "i32") for name in kernel.arg_names},
        "constants": values,
        "aligned": aligned,
        "num_warps": constants["num_warps"],
        "num_stages": 3,
        "label": label,
    }
