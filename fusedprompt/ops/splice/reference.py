"""Splice in plain PyTorch: the embeddings are written once, and mask and labels travel with the ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layouts.layout import Layout
from ._op import CHECK_IDS, POSITIONS, Arguments, filled_dtype, out_of_range, register


def _splice(*args: Any) -> tuple[Tensor, Tensor]:
    given = Arguments(*args)
    prompt, slots, input_ids, table, inputs_embeds, fields, fills = given[:7]
    layout = given.layout
    if inputs_embeds is not None:
        embeds = _join(prompt.to(inputs_embeds.dtype), layout, inputs_embeds)
        if fields:
            return embeds, _fill(layout, fields, fills)
        return embeds, embeds.new_empty((0, *embeds.shape[:2]), dtype=filled_dtype(input_ids))
    assert input_ids is not None and table is not None
    # The prompt's rows are gathered too (as id 0) and then overwritten: on 2 cores this beats embedding + cat, which
    # copies every token row twice, at every size tried (B=8, T=512, D=2048: 11.4 against 19.8 ms).
    filled = _fill(layout, [*fields, input_ids], [*fills, 0])
    embeds = _embedding(filled[-1], table)
    if slots is not None:
        embeds = _overwrite(embeds, slots, prompt)
    elif layout.which is None:
        embeds[:, : layout.num_prompt_rows] = prompt
    else:
        rows, places = _own(prompt.to(embeds.dtype), layout), embeds[:, : layout.num_prompt_rows]
        torch.index_select(rows, 0, layout.which, out=places)
    return embeds, filled[:-1]


def _own(prompt: Tensor, layout: Layout) -> Tensor:
    """(A, P, D): the prefixes of a table (A * P, D)."""
    return prompt.view(layout.num_prompts, layout.num_prompt_rows, prompt.shape[1])


def _fill(layout: Layout, fields: Sequence[Tensor], fills: Sequence[int]) -> Tensor:
    """Carry k (B, T) fields of one dtype to (k, B, S): two ops for all of them, and none that copies from the host."""
    first = fields[0]
    batch = first.shape[0]
    if layout.slots is not None and max(fills) < POSITIONS and first.shape[1]:
        tokens = layout.slots.clamp(min=0).expand(len(fields), -1, -1)
        heads = _heads(tuple(fills), first.dtype, first.device)
        return torch.where(layout.slots < 0, heads, torch.stack(tuple(fields)).gather(2, tokens))
    if layout.slots is not None or max(fills) >= POSITIONS:
        return torch.stack([_carry(layout, field, value) for field, value in zip(fields, fills)])
    if len(fields) == 1:
        return layout.fill(first, fills[0]).unsqueeze(0)
    heads = _heads(tuple(fills), first.dtype, first.device).expand(-1, batch, layout.num_prompt_rows)
    return torch.cat((heads, torch.stack(tuple(fields))), 2)


def _carry(layout: Layout, field: Tensor, fill: int) -> Tensor:
    if fill < POSITIONS:
        return layout.fill(field, fill)
    return layout.position_ids(field, fill - POSITIONS).to(field.dtype)


@functools.cache
def _heads(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (k, 1, 1) constant, kept so that only the first forward copies it to the device."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    if ids.device.type == "cpu":
        try:
            return F.embedding(ids, table)
        except IndexError:
            raise out_of_range(ids, table) from None
    outside = (ids < 0) | (ids >= table.shape[0])
    if CHECK_IDS and bool(outside.any()):
        raise out_of_range(ids, table)
    rows = F.embedding(ids.clamp(0, table.shape[0] - 1), table)
    return rows.masked_fill_(outside.unsqueeze(-1), float("nan"))


def _overwrite(embeds: Tensor, slots: Tensor, prompt: Tensor) -> Tensor:
    if not prompt.shape[0]:
        return embeds
    if embeds.device.type == "cpu":
        # Prompt rows alone are moved: 1.2 times a prefix's time, where choosing between two full batches took 4.6 times
        # (B=64, T=64, P=20, D=512). Elsewhere the host would wait to learn how many they are.
        flat = slots.flatten()
        places = (flat < 0).nonzero().squeeze(1)
        rows = prompt.index_select(0, ~flat.index_select(0, places)).to(embeds.dtype)
        embeds = embeds.contiguous()
        embeds.view(-1, embeds.shape[-1]).index_copy_(0, places, rows)
        return embeds
    rows = prompt.to(embeds.dtype)[(~slots).clamp(min=0)]
    return torch.where((slots < 0).unsqueeze(-1), rows, embeds)


def _join(prompt: Tensor, layout: Layout, inputs_embeds: Tensor) -> Tensor:
    slots = layout.slots
    if slots is None:
        if layout.which is not None:
            prompt = _own(prompt, layout).index_select(0, layout.which)
        return torch.cat((prompt.expand(inputs_embeds.shape[0], -1, -1), inputs_embeds), dim=1)
    if not inputs_embeds.shape[1]:
        return prompt[~slots]
    row = torch.arange(inputs_embeds.shape[0], device=slots.device).unsqueeze(1)
    return _overwrite(inputs_embeds[row, slots.clamp(min=0)], slots, prompt)


def _splice_backward(
    d_out: Tensor,
    slots: Tensor | None,
    num_prompt_rows: int,
    num_tokens: int,
    prompt: bool,
    tokens: bool,
    which: Tensor | None = None,
    num_prompts: int = 1,
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(d_out.dtype, torch.float32)
    d_prompt, d_tokens = d_out.new_empty(0, dtype=accumulate), d_out.new_empty(0)
    batch, _, width = d_out.shape
    if slots is None:
        in_front = num_prompt_rows // num_prompts
        if prompt and which is not None:
            # Row by row: index_add_ of whole prompts took 17 times as long (B=32, P=20, D=512).
            target = which.unsqueeze(1) * in_front + torch.arange(in_front, device=which.device)
            d_prompt = _segment_sum(d_out[:, :in_front].to(accumulate), target, num_prompt_rows)
        elif prompt:
            d_prompt = d_out[:, :in_front].sum(0, dtype=accumulate)
        if tokens:
            d_tokens = d_out[:, in_front:].clone(memory_format=torch.contiguous_format)
        return d_prompt, d_tokens
    if prompt and d_out.device.type == "cpu":
        flat = slots.flatten()
        places = (flat < 0).nonzero().squeeze(1)
        rows = d_out.reshape(-1, width).index_select(0, places).to(accumulate)
        d_prompt = rows.new_zeros(num_prompt_rows, width).index_add_(0, ~flat.index_select(0, places), rows)
    elif prompt:
        d_prompt = _segment_sum(d_out.to(accumulate), torch.where(slots < 0, ~slots, num_prompt_rows), num_prompt_rows)
    if tokens:
        first = torch.arange(batch, device=slots.device).unsqueeze(1) * num_tokens
        target = torch.where(slots < 0, batch * num_tokens, slots + first)
        d_tokens = _segment_sum(d_out, target, batch * num_tokens).view(batch, num_tokens, width)
    return d_prompt, d_tokens


def _segment_sum(rows: Tensor, target: Tensor, num_targets: int) -> Tensor:
    """Sum (B, S, D) rows by target (B, S), in a fixed order; rows for target `num_targets` are dropped.

    On several CPU threads index_put_ adds in any order, and on CUDA index_add_ does.
    """
    width = rows.shape[-1]
    sums = rows.new_zeros(num_targets + 1, width)
    if rows.device.type == "cpu":
        sums.index_add_(0, target.flatten(), rows.reshape(-1, width))
    else:
        sums.index_put_((target.flatten(),), rows.reshape(-1, width), accumulate=True)
    return sums[:num_targets]


def _table_gradient(d_tokens: Tensor, input_ids: Tensor, num_table_rows: int) -> Tensor:
    if input_ids.device.type != "cpu":
        # The forward wrote NaN for an id outside the table; there is no row to send its gradient to.
        outside = (input_ids < 0) | (input_ids >= num_table_rows)
        d_tokens = d_tokens.masked_fill(outside.unsqueeze(-1), 0)
        input_ids = input_ids.clamp(0, num_table_rows - 1)
    d_table: Tensor = torch.ops.aten.embedding_dense_backward(d_tokens, input_ids, num_table_rows, -1, False)
    return d_table


splice = register("", _splice, _splice_backward, _table_gradient)
