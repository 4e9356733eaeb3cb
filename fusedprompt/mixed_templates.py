"""Rows of different adapters, some of which have templates: each template's rows are laid out by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base_model import to_device
from .layout import IGNORE_INDEX, Layout
from .mixed import Fields, Mixture, arrange
from .placing import with_slots
from .tasks import Batch

if TYPE_CHECKING:
    from .model import PromptModel


def arrange_templates(model: PromptModel, mixture: Mixture, given: Fields, next_token: bool) -> tuple[Layout, Fields]:
    """Slots into a mixture's table, and mask, labels and token types of the output, (B, S).

    Rows of the same template, and all rows without one, are laid out together; shorter parts of the batch are padded to
    the longest, in front in a causal model and behind in an encoder.

    next_token: each position predicts the label behind it; then nothing predicts a row's first position.
    """
    template_of = dict(zip(mixture.adapters, mixture.templates))
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(mixture.names):
        groups.setdefault(name if template_of.get(name) is not None else "", []).append(row)
    device = given.tokens.device
    parts = []
    for name, numbers in groups.items():
        rows = to_device(torch.tensor(numbers), device)
        own = Fields(*(None if field is None else field.index_select(0, rows) for field in given))  # type: ignore[arg-type]
        part = mixture.part(numbers)
        parts.append(_of_template(model, part, own) if name else _without(model, part, own))
    width = max(part.tokens.shape[1] for part in parts)
    in_front = model.facts.causal
    order = to_device(torch.tensor([row for numbers in groups.values() for row in numbers]).argsort(), device)

    def join(fields: list[Tensor | None], blank: int) -> Tensor | None:
        """(B, S) of what the parts have, in the batch's order."""
        known = next((field for field in fields if field is not None), None)
        if known is None:
            return None
        filled = []
        for field, part in zip(fields, parts):
            values = known.new_zeros(part.tokens.shape) if field is None else field
            padding = (width - values.shape[1], 0) if in_front else (0, width - values.shape[1])
            filled.append(torch.nn.functional.pad(values, padding, value=blank))
        return torch.cat(filled)[order]

    masks = [part.attention_mask for part in parts]
    if len({part.tokens.shape[1] for part in parts}) > 1 or any(mask is not None for mask in masks):
        ones = [torch.ones_like(part.tokens) for part in parts]
        masks = [one if mask is None else mask for mask, one in zip(masks, ones)]
    table_rows = mixture.table_rows + 1
    slots, mask = join([part.tokens for part in parts], -table_rows), join(masks, 0)
    labels, token_types = (
        join([part.labels for part in parts], IGNORE_INDEX),
        join([part.token_type_ids for part in parts], 0),
    )
    assert slots is not None
    if labels is not None and next_token and mask is not None:
        first = (mask != 0).to(torch.int8).argmax(1, keepdim=True)
        labels = labels.scatter(1, first, IGNORE_INDEX)
    return Layout.from_slots(slots, table_rows), Fields(slots, mask, labels, token_types)


def _of_template(model: PromptModel, part: Mixture, own: Fields) -> Fields:
    """Rows of one adapter with a template. Returned as tokens: slots."""
    (template,) = part.templates
    assert template is not None
    ids = own.tokens.dim() == 2
    batch = Batch(
        input_ids=own.tokens if ids else None,
        inputs_embeds=None if ids else own.tokens,
        attention_mask=own.attention_mask,
        labels=own.labels,
        token_type_ids=own.token_type_ids,
    )
    with_slots(model, template, batch, None)
    assert batch.layout is not None and batch.layout.slots is not None
    slots = batch.layout.slots
    slots = torch.where(slots < 0, slots - part.rows[2].unsqueeze(1), slots)
    return Fields(slots, batch.attention_mask, batch.labels, batch.token_type_ids)


def _without(model: PromptModel, part: Mixture, own: Fields) -> Fields:
    """Rows whose prompts are in front, or that have none. Returned as tokens: slots."""
    arranged = arrange(part, model.facts, own.tokens, own.attention_mask)
    layout, labels, token_types = arranged.layout, own.labels, own.token_type_ids
    assert layout.slots is not None
    return Fields(
        layout.slots,
        arranged.mask(own.attention_mask, own.tokens),
        None if labels is None else arranged.labels(labels, next_token=False),
        None if token_types is None else layout.fill(token_types, 0),
    )
