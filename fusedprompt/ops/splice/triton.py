"""Splice on Triton: the whole batch in one launch, each output row read once and written once.

    out[b, s] = prompt[row] if it is a prompt row, else table[ids[b, slot]] or inputs_embeds[b, slot]

A plain prefix computes its slots; any other layout reads them. Mask and labels are written by the same programs. Row offsets
are 64-bit: B * S * D passes 2**31 in real batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def splice_forward(
    prompt_ptr,  # (R, D)
    slots_ptr,  # (B, S) int64, read unless PREFIX
    ids_ptr,  # (B, T) ids, read if FROM_TABLE
    rows_ptr,  # (V, D) table if FROM_TABLE, else (B, T, D)
    field0_ptr,  # (B, T) int64, if NUM_FIELDS > 0
    field1_ptr,  # (B, T) int64, if NUM_FIELDS > 1
    out_ptr,  # (B, S, D)
    filled_ptr,  # (NUM_FIELDS, B, S) int64
    R,
    S,
    T,
    D,
    V,
    B,
    fill0,
    fill1,
    PREFIX: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, s] = prompt[~slot] if slot < 0 else token row `slot`; filled[k, b, s] likewise with fill k for the prompt."""
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = s < S
    at = b * S + s
    if PREFIX:
        is_prompt = s < R
        prompt_row = s
        slot = tl.maximum(s - R, 0).to(tl.int64)
    else:
        given = tl.load(slots_ptr + at, mask=inside, other=0)
        is_prompt = given < 0
        prompt_row = tl.where(is_prompt, -given - 1, 0)
        slot = tl.where(is_prompt, 0, given)
    is_token = inside & (is_prompt == 0)
    token_at = b * T + slot
    if FROM_TABLE:
        ids = tl.load(ids_ptr + token_at, mask=is_token, other=0).to(tl.int64)
        valid = (ids >= 0) & (ids < V)
        row = tl.where(valid, ids, 0)
    else:
        valid = inside
        row = token_at
    if NUM_FIELDS > 0:
        value = tl.load(field0_ptr + token_at, mask=is_token, other=0)
        tl.store(filled_ptr + at, tl.where(is_prompt, fill0, value), mask=inside)
    if NUM_FIELDS > 1:
        value = tl.load(field1_ptr + token_at, mask=is_token, other=0)
        tl.store(filled_ptr + B.to(tl.int64) * S + at, tl.where(is_prompt, fill1, value), mask=inside)
    from_prompt = (inside & is_prompt)[:, None]
    from_rows = (is_token & valid)[:, None]
    bad = (is_token & (valid == 0))[:, None]
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_row = (d < D)[None, :]
        taken = tl.load(
            rows_ptr + row[:, None] * D + d[None, :], mask=from_rows & in_row, other=0.0, eviction_policy="evict_last"
        )
        prompt = tl.load(
            prompt_ptr + prompt_row[:, None].to(tl.int64) * D + d[None, :],
            mask=from_prompt & in_row,
            other=0.0,
            eviction_policy="evict_last",
        )
        value = tl.where(from_prompt, prompt.to(tl.float32), taken.to(tl.float32))
        value = tl.where(bad, float("nan"), value)
        tl.store(
            out_ptr + at[:, None] * D + d[None, :],
            value.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & in_row,
            cache_modifier=".cs",
        )


@triton.jit
def splice_prefix_backward(
    d_out_ptr,  # (B, S, D)
    d_prompt_ptr,  # (R, D) fp32
    B,
    S,
    D,
    BLOCK_D: tl.constexpr,
):
    """d_prompt[r] = sum over b of d_out[b, r], in the order of b."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for b in range(0, B):
        total += tl.load(d_out_ptr + (b.to(tl.int64) * S + r) * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(d_prompt_ptr + r * D + d, total, mask=d < D)


@triton.jit
def segment_sum(
    rows_ptr,  # (N, D)
    order_ptr,  # (N,) int64: rows sorted by target, stable
    ends_ptr,  # (targets,) int64: where each target's segment of `order` ends; it begins where the one before ends
    out_ptr,  # (targets, D)
    D,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum of the rows whose target is t, in the order of the rows, in fp32."""
    target = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(ends_ptr + target)
    begin = tl.load(ends_ptr + target - 1, mask=target > 0, other=0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(begin, end):
        row = tl.load(order_ptr + at)
        total += tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + target * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def forward_config(width: int) -> dict[str, int]:
    """Tile of a program: 16 bytes a thread across a row, and as many rows as keep 2048 elements in flight."""
    block = min(1024, max(16, triton.next_power_of_2(width)))
    return {"ROWS": max(1, 2048 // block), "BLOCK_D": block, "num_warps": 4}


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
    batch, length = tokens.shape[:2]
    num_rows, width = prompt.shape
    total = num_rows + length if slots is None else slots.shape[1]
    out = rows.new_empty(batch, total, width)
    filled = tokens.new_empty((len(fields), batch, total), dtype=torch.int64)
    if out.numel() == 0 and filled.numel() == 0:
        return out, filled
    prompt, rows, tokens = prompt.contiguous(), rows.contiguous(), tokens.contiguous()
    given = [field.contiguous() for field in fields] + [tokens] * (2 - len(fields))
    values = [*fills, 0, 0]
    config: dict[str, Any] = forward_config(width)
    splice_forward[(triton.cdiv(total, config["ROWS"]), batch)](
        prompt,
        tokens if slots is None else slots.contiguous(),
        tokens,
        rows,
        given[0],
        given[1],
        out,
        filled,
        num_rows,
        total,
        length,
        width,
        rows.shape[0],
        batch,
        values[0],
        values[1],
        PREFIX=slots is None,
        FROM_TABLE=inputs_embeds is None,
        NUM_FIELDS=len(fields),
        **config,
    )
    return out, filled
