"""Splice in plain PyTorch: the embeddings are written once, and mask and labels travel with the ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layout import Layout
from .._library import below_autograd, define

CHECK_IDS = os.environ.get("FUSEDPROMPT_CHECK", "0") == "1"


def _splice(
    prompt: Tensor,
    slots: Tensor | None,
    input_ids: Tensor | None,
    table: Tensor | None,
    inputs_embeds: Tensor | None,
    fields: Sequence[Tensor],
    fills: Sequence[int],
) -> tuple[Tensor, Tensor]:
    layout = Layout(prompt.shape[0], slots)
    if inputs_embeds is not None:
        return _join(prompt.to(inputs_embeds.dtype), slots, inputs_embeds), prompt.new_empty(0, dtype=torch.int64)
    assert input_ids is not None and table is not None
    # The prompt's rows are gathered too (as id 0) and then overwritten: on 2 cores this beats embedding + cat, which
    # copies every token row twice, at every size tried (B=8, T=512, D=2048: 11.4 against 19.8 ms).
    filled = _fill(layout, [*fields, input_ids], [*fills, 0])
    embeds = _embedding(filled[-1], table)
    if slots is None:
        embeds[:, : layout.num_prompt_rows] = prompt
    else:
        embeds = _overwrite(embeds, slots, prompt)
    return embeds, filled[:-1]


def _fill(layout: Layout, fields: Sequence[Tensor], fills: Sequence[int]) -> Tensor:
    """Carry k (B, T) fields of one dtype to (k, B, S): two ops for all of them, and none that copies from the host."""
    first = fields[0]
    batch = first.shape[0]
    if layout.slots is not None:
        return torch.stack([layout.fill(field, value) for field, value in zip(fields, fills)])
    if len(fields) == 1:
        return layout.fill(first, fills[0]).unsqueeze(0)
    heads = _heads(tuple(fills), first.dtype, first.device).expand(-1, batch, layout.num_prompt_rows)
    return torch.cat((heads, torch.stack(tuple(fields))), 2)


_HEADS: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}


def _heads(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (k, 1, 1) constant, kept so that only the first forward copies it to the device."""
    key = (values, dtype, device)
    if key not in _HEADS:
        _HEADS[key] = torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)
    return _HEADS[key]


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    if ids.device.type == "cpu":
        try:
            return F.embedding(ids, table)
        except IndexError:
            raise _out_of_range(ids, table) from None
    outside = (ids < 0) | (ids >= table.shape[0])
    if CHECK_IDS and bool(outside.any()):
        raise _out_of_range(ids, table)
    rows = F.embedding(ids.clamp(0, table.shape[0] - 1), table)
    return rows.masked_fill_(outside.unsqueeze(-1), float("nan"))


def _out_of_range(ids: Tensor, table: Tensor) -> IndexError:
    outside = ids[(ids < 0) | (ids >= table.shape[0])]
    return IndexError(f"input_ids: expected ids in [0, {table.shape[0]}), got {int(outside[0])}")


def _overwrite(embeds: Tensor, slots: Tensor, prompt: Tensor) -> Tensor:
    if not prompt.shape[0]:
        return embeds
    rows = prompt.to(embeds.dtype)[(~slots).clamp(min=0)]
    return torch.where((slots < 0).unsqueeze(-1), rows, embeds)


def _join(prompt: Tensor, slots: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    if slots is None:
        return torch.cat((prompt.expand(inputs_embeds.shape[0], -1, -1), inputs_embeds), dim=1)
    if not inputs_embeds.shape[1]:
        return prompt[~slots]
    row = torch.arange(inputs_embeds.shape[0], device=slots.device).unsqueeze(1)
    return _overwrite(inputs_embeds[row, slots.clamp(min=0)], slots, prompt)


def _splice_fake(
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
    batch, length = tokens.shape[0], prompt.shape[0] + tokens.shape[1] if slots is None else slots.shape[1]
    embeds = rows.new_empty(batch, length, prompt.shape[1])
    if inputs_embeds is not None:
        return embeds, prompt.new_empty(0, dtype=torch.int64)
    return embeds, tokens.new_empty(len(fields), batch, length)


def _splice_backward(
    d_out: Tensor, slots: Tensor | None, num_prompt_rows: int, num_tokens: int, prompt: bool, tokens: bool
) -> tuple[Tensor, Tensor]:
    """Sum each prompt row's gradients over the batch in fp32, and pass the tokens' on, where asked for.

    d_prompt is (R, D) in fp32 (fp64 for fp64) and d_tokens (B, T, D) in d_out's dtype; what is not asked for is empty.
    """
    accumulate = torch.promote_types(d_out.dtype, torch.float32)
    d_prompt, d_tokens = d_out.new_empty(0, dtype=accumulate), d_out.new_empty(0)
    batch, _, width = d_out.shape
    if slots is None:
        if prompt:
            d_prompt = d_out[:, :num_prompt_rows].sum(0, dtype=accumulate)
        if tokens:
            d_tokens = d_out[:, num_prompt_rows:].clone(memory_format=torch.contiguous_format)
        return d_prompt, d_tokens
    if prompt:
        d_prompt = _segment_sum(d_out.to(accumulate), torch.where(slots < 0, ~slots, num_prompt_rows), num_prompt_rows)
    if tokens:
        first = torch.arange(batch, device=slots.device).unsqueeze(1) * num_tokens
        target = torch.where(slots < 0, batch * num_tokens, slots + first)
        d_tokens = _segment_sum(d_out, target, batch * num_tokens).view(batch, num_tokens, width)
    return d_prompt, d_tokens


def _segment_sum(rows: Tensor, target: Tensor, num_targets: int) -> Tensor:
    """Sum (B, S, D) rows by target (B, S); rows for target `num_targets` are dropped.

    Accumulating index_put_ adds in a fixed order on CPU and CUDA; index_add_ does not.
    """
    width = rows.shape[-1]
    sums = rows.new_zeros(num_targets + 1, width)
    sums.index_put_((target.flatten(),), rows.reshape(-1, width), accumulate=True)
    return sums[:num_targets]


def _splice_backward_fake(
    d_out: Tensor, slots: Tensor | None, num_prompt_rows: int, num_tokens: int, prompt: bool, tokens: bool
) -> tuple[Tensor, Tensor]:
    width = d_out.shape[2]
    return (
        d_out.new_empty(
            (num_prompt_rows, width) if prompt else (0,), dtype=torch.promote_types(d_out.dtype, torch.float32)
        ),
        d_out.new_empty((d_out.shape[0], num_tokens, width) if tokens else (0,)),
    )


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prompt: Tensor,
        slots: Tensor | None,
        input_ids: Tensor | None,
        table: Tensor | None,
        inputs_embeds: Tensor | None,
        fields: Sequence[Tensor],
        fills: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slots, input_ids)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        ctx.num_prompt_rows, ctx.num_tokens = prompt.shape[0], tokens.shape[1]
        ctx.prompt_dtype = prompt.dtype
        ctx.table_rows = 0 if table is None else table.shape[0]
        embeds, filled = below_autograd("splice", prompt, slots, input_ids, table, inputs_embeds, fields, fills)
        ctx.mark_non_differentiable(filled)
        return embeds, filled

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        slots, input_ids = ctx.saved_tensors
        needs_prompt = ctx.needs_input_grad[0]
        needs_table, needs_embeds = ctx.needs_input_grad[3:5]
        d_prompt, d_tokens = torch.ops.fusedprompt.splice_backward(
            d_out, slots, ctx.num_prompt_rows, ctx.num_tokens, needs_prompt, needs_table or needs_embeds
        )
        d_table = None
        if needs_table:
            d_table = torch.ops.aten.embedding_dense_backward(d_tokens, input_ids, ctx.table_rows, -1, False)
        return (
            d_prompt.to(ctx.prompt_dtype) if needs_prompt else None,
            None,
            None,
            d_table,
            d_tokens if needs_embeds else None,
            None,
            None,
        )


define(
    "splice_backward(Tensor d_out, Tensor? slots, SymInt num_prompt_rows, SymInt num_tokens, bool prompt, bool tokens) "
    "-> (Tensor, Tensor)",
    _splice_backward,
    _splice_backward_fake,
)
define(
    "splice(Tensor prompt, Tensor? slots, Tensor? input_ids, Tensor? table, Tensor? inputs_embeds, "
    "Tensor[] fields, int[] fills) -> (Tensor, Tensor)",
    _splice,
    _splice_fake,
    _Splice.apply,
)


def splice(
    prompt: Tensor,
    slots: Tensor | None,
    input_ids: Tensor | None,
    table: Tensor | None,
    inputs_embeds: Tensor | None,
    fields: Sequence[Tensor],
    fills: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """fields: k integer tensors (B, T) with the fill value of each at prompt rows; they come back as (k, B, S)."""
    out: tuple[Tensor, Tensor] = torch.ops.fusedprompt.splice(
        prompt, slots, input_ids, table, inputs_embeds, fields, fills
    )
    return out
