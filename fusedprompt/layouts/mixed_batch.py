"""Rows of different adapters, put in their places. Rows of the same template are laid out together, by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.facts import BaseFacts, to_device
from .batch import Batch, Placed, check_length, place, taken
from .from_template import put_into_template
from .layout import IGNORE_INDEX, Layout
from .mixture import Arrangement, Mixture, arrange, is_plain
from .padding import Turn
from .prompt import Source


def place_mixture(mixture: Mixture, facts: BaseFacts, batch: Batch, pool_last: bool = False) -> Placed:
    """`put_in_front` for rows of different adapters. Fields are those of the tokens, (B, T).

    The layout's slots refer to the prompts of all, one after another, and to a row of zeros behind them, which pads.
    """
    tokens = batch.checked(facts)
    size, length = batch.shape
    positions, prompts = batch.position_ids, mixture.prompts
    if positions is not None and (any(prompt.start for prompt in prompts) or mixture.has_patterns):
        raise ValueError(f"position_ids: expected None with prompts inside of text, got {tuple(positions.shape)}")
    if positions is None and is_plain(mixture, facts, batch.attention_mask, pool_last):
        check_length(facts, mixture.longest, length)
        layout, types = mixture.prefix(), batch.token_type_ids
        types = None if types is None else layout.fill(types, 0)
        return Placed(layout, taken(facts, replace(batch, token_type_ids=types)), carries=True)
    lay_out = _by_templates if mixture.has_patterns else _in_front
    layout, placed = lay_out(mixture, facts, batch, pool_last)
    if positions is not None:
        moved = positions.expand(size, length) + mixture.count.unsqueeze(1)
        firsts = torch.cat([torch.arange(count, device=tokens.device) for count in (*mixture.counts, 1)])
        positions = layout.fill_rows(moved, (firsts + facts.first_position).to(moved.dtype))
        placed = replace(placed, position_ids=positions)
    turn = None
    if mixture.has_patterns:
        turn = Turn.FIRST_TO_START
        if facts.padding_first(pool_last):
            turn = Turn.LAST_TO_END if pool_last else None
    return place(facts, layout, placed, turn)


def _in_front(mixture: Mixture, facts: BaseFacts, batch: Batch, pool_last: bool) -> tuple[Layout, Batch]:
    """Every prompt in front of its row's text."""
    check_length(facts, mixture.longest, batch.shape[1])
    arranged = arrange(mixture, facts, batch.tokens, batch.attention_mask, pool_last)
    placed = _arranged(arranged, batch, mixture.task.predicts_next)
    if placed.attention_mask is not None and facts.places_position_ids:
        placed = replace(placed, position_ids=arranged.position_ids())
    return arranged.layout, placed


def _arranged(arranged: Arrangement, batch: Batch, next_token: bool) -> Batch:
    """Mask, labels and token types of the tokens as those of the output."""
    labels, types = batch.labels, batch.token_type_ids
    return replace(
        batch,
        attention_mask=arranged.mask(batch.attention_mask, batch.tokens),
        labels=None if labels is None else arranged.labels(labels, next_token),
        token_type_ids=None if types is None else arranged.layout.fill(types, 0),
    )


def _by_templates(mixture: Mixture, facts: BaseFacts, batch: Batch, pool_last: bool) -> tuple[Layout, Batch]:
    """Rows of the same template, and all rows without one, are laid out together; shorter parts of the batch are padded
    to the longest, in front in a causal model and behind in an encoder."""
    pattern_of = {prompt.source: prompt.pattern for prompt in mixture.prompts}
    groups: dict[Source | None, list[int]] = {}
    for row, source in enumerate(mixture.sources):
        groups.setdefault(source if pattern_of.get(source) is not None else None, []).append(row)
    device, parts = batch.tokens.device, list[tuple[Tensor, Batch]]()
    for numbers in groups.values():
        rows, part = to_device(torch.tensor(numbers, device="cpu"), device), mixture.part(numbers)
        given = {key: field.index_select(0, rows) for key, field in batch.given().items() if isinstance(field, Tensor)}
        parts.append(_of_part(part, facts, Batch(**given)))
    width = max(slots.shape[1] for slots, _ in parts)
    order = to_device(
        torch.tensor([row for numbers in groups.values() for row in numbers], device="cpu").argsort(), device
    )

    def join(fields: list[Tensor | None], blank: int) -> Any:
        """(B, S) of what the parts have, in the batch's order."""
        known = next((field for field in fields if field is not None), None)
        if known is None:
            return None
        filled = []
        for field, (slots, _) in zip(fields, parts):
            values = known.new_zeros(slots.shape) if field is None else field
            missing = width - values.shape[1]
            sides = (missing, 0) if facts.padding_first(pool_last) else (0, missing)
            filled.append(torch.nn.functional.pad(values, sides, value=blank))
        return torch.cat(filled)[order]

    masks = [own.attention_mask for _, own in parts]
    if len({slots.shape[1] for slots, _ in parts}) > 1 or any(mask is not None for mask in masks):
        masks = [torch.ones_like(slots) if mask is None else mask for mask, (slots, _) in zip(masks, parts)]
    table_rows = mixture.table_rows + 1
    slots, mask = join([slots for slots, _ in parts], -table_rows), join(masks, 0)
    labels = join([own.labels for _, own in parts], IGNORE_INDEX)
    if labels is not None and mixture.task.predicts_next and mask is not None:
        first = (mask != 0).to(torch.int8).argmax(1, keepdim=True)
        labels = labels.scatter(1, first, IGNORE_INDEX)  # nothing predicts a row's first position
    types = join([own.token_type_ids for _, own in parts], 0)
    placed = replace(batch, attention_mask=mask, labels=labels, token_type_ids=types, position_ids=None)
    return Layout.from_slots(slots, table_rows), placed


def _of_part(part: Mixture, facts: BaseFacts, batch: Batch) -> tuple[Tensor, Batch]:
    """Slots and fields of rows of one adapter with a template, or of rows whose prompts are in front, if any."""
    if part.has_patterns:
        placed = put_into_template(part.prompts[0], facts, batch, None)
        return part.moved(placed.layout).given_slots, placed.batch
    arranged = arrange(part, facts, batch.tokens, batch.attention_mask)
    return arranged.layout.given_slots, _arranged(arranged, batch, next_token=False)
