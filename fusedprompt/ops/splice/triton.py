"""Splice on Triton: the whole batch in one launch, each output row read once and written once.

A plain prefix computes where its rows come from, any other layout reads it; mask, labels and position ids are written
by the same programs. The gradients are sums over segments, in a fixed order and without atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._library import define
from .._triton import Launch, cdiv, supports_pdl
from ._configs import TABLE_POLICY, backward_config, configurations, forward_config
from ._kernels import segment_sum, splice_forward, splice_prefix_backward
from ._op import CHECK_IDS, POSITIONS, Arguments, filled_dtype, out_of_range, register

# Made once for all that the kernels are compiled for: see `Launch`.


@functools.cache
def _forward_launch(
    width: int, dtypes: tuple[torch.dtype, ...], prefix: bool, from_table: bool, num_fields: int, pdl: bool
) -> tuple[int, Launch]:
    """Rows of a program, and the launch. dtypes: of the rows, the prompt, the tokens and the fields."""
    config = forward_config(width, dtypes[0].itemsize)
    constants = {"PREFIX": prefix, "FROM_TABLE": from_table, "NUM_FIELDS": num_fields, "TABLE_POLICY": TABLE_POLICY}
    return config["ROWS"], _launch(splice_forward, config, pdl, **constants)


@functools.cache
def _prefix_backward_launch(
    width: int, d_out: torch.dtype, strides: tuple[tuple[bool, ...], ...], pdl: bool
) -> tuple[int, Launch]:
    """Columns of a program, and the launch. strides: what Triton specializes them for."""
    config = backward_config(width, many=False)
    return config["BLOCK_D"], _launch(splice_prefix_backward, config, pdl)


@functools.cache
def _segment_sum_launch(width: int, many: bool, rows: torch.dtype, out: torch.dtype, pdl: bool) -> tuple[int, Launch]:
    """Columns of a program, and the launch."""
    config = backward_config(width, many)
    return config["BLOCK_D"], _launch(segment_sum, config, pdl)


def _launch(kernel: Any, config: dict[str, int], pdl: bool, **constants: Any) -> Launch:
    blocks = {"ROWS": config["ROWS"], "BLOCK_D": config["BLOCK_D"]}
    return Launch(kernel, {**constants, **blocks, "PDL": pdl}, num_warps=config["num_warps"], pdl=pdl)


def _splice(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*args)
    prompt, slots, input_ids, _, inputs_embeds, fields, fills = arguments[:7]
    tokens, rows = arguments.sources()
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
    from_table = inputs_embeds is None
    dtypes = (rows.dtype, prompt.dtype, tokens.dtype, filled.dtype)
    tile, launch = _forward_launch(width, dtypes, slots is None, from_table, len(fields), supports_pdl(out.device))
    places, taken = filled if slots is None else slots.contiguous(), rows.contiguous() if from_table else tokens
    launch(
        (batch * cdiv(total, tile), 1, 1),
        (prompt.contiguous(), places, tokens, taken, *given, out, filled),
        (num_rows, total, length, width, rows.shape[0], batch * total, *starts, *unused, *steps, *unused),
    )
    return out, filled


def _splice_backward(
    d_out: Tensor, slots: Tensor | None, num_prompt_rows: int, num_tokens: int, prompt: bool, tokens: bool, *of: Any
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
        strides = (d_out.stride(0), d_out.stride(1))
        kinds = tuple((stride == 1, stride % 16 == 0, stride < 2**31) for stride in strides)
        block, launch = _prefix_backward_launch(width, d_out.dtype, kinds, supports_pdl(d_out.device))
        launch((num_rows, cdiv(width, block), 1), (d_out, total), (batch, *strides, width))
    return total


def _sum_by(target: Tensor, rows: Tensor, num_targets: int, dtype: torch.dtype) -> Tensor:
    """Sum rows (N, D) by target (N,) into (num_targets, D); rows for targets outside of that are dropped."""
    width = rows.shape[1]
    total = rows.new_empty((num_targets, width), dtype=dtype)
    in_order, order = torch.sort(target, stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(num_targets + 1, device=target.device, dtype=target.dtype))
    if total.numel():
        block, launch = _segment_sum_launch(width, num_targets > 4096, rows.dtype, dtype, supports_pdl(rows.device))
        launch((num_targets, cdiv(width, block), 1), (rows, order, bounds, total), (width,))
    return total


def _table_backward(d_tokens: Tensor, input_ids: Tensor, num_table_rows: int) -> Tensor:
    return _sum_by(input_ids.flatten(), d_tokens.flatten(0, 1).contiguous(), num_table_rows, d_tokens.dtype)


define(
    "splice_table_backward_triton(Tensor d_tokens, Tensor input_ids, SymInt num_table_rows) -> Tensor",
    _table_backward,
    lambda d_tokens, _, num_table_rows: d_tokens.new_empty(num_table_rows, d_tokens.shape[2]),
)
splice = register("_triton", _splice, _splice_backward, torch.ops.fusedprompt.splice_table_backward_triton)


__all__ = ["configurations", "splice"]
