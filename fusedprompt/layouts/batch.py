"""A batch of tokens, and the same batch with prompts in their places."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..base import check
from ..base.facts import BaseFacts
from ..base.positions import count_positions
from .layout import Layout
from .padding import Turn, choose_layout, count_padding, may_be_padded, padding_positions


@dataclass(frozen=True)
class Batch:
    """Tokens, and what goes with each of them.

    input_ids: (B, T), or inputs_embeds: (B, T, D).
    attention_mask, position_ids, token_type_ids, and labels per token (others have any shape): (B, T); or (B, S) of the
        output, where prompts have their places.
    input_type_mask: CPT's type codes, like labels.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Any = None
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    input_type_mask: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Ids or embeddings."""
        if self.input_ids is not None:
            return check.tensor("input_ids", self.input_ids, "(B, T)", 2)
        if self.inputs_embeds is None:
            raise ValueError(
                "input_ids: You have to provide either input_ids or inputs_embeds, because a prompt stands among tokens"
            )
        return check.tensor("inputs_embeds", self.inputs_embeds, "(B, T, D)", 3)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        tokens = self.tokens
        return tokens.shape[0], tokens.shape[1]

    def given(self) -> dict[str, Any]:
        """The fields that are there."""
        return {name: value for name in FIELDS if (value := getattr(self, name)) is not None}

    def checked(self, facts: BaseFacts) -> Tensor:
        """The one of ids (B, T) and embeddings (B, T, D) that is given, if the other fields fit it.

        Raises:
            TypeError, ValueError: both or none are given, or a field has another shape or dtype than it must.
        """
        ids, embeds, positions = self.input_ids, self.inputs_embeds, self.position_ids
        if (ids is None) == (embeds is None):
            raise ValueError("You have to provide either input_ids or inputs_embeds, and not both")
        tokens = self.tokens
        if embeds is None:
            check.token_ids("input_ids", tokens)
        else:
            check.floating("inputs_embeds", tokens)
            check.shape("inputs_embeds", tokens, "(B, T, D)", (*self.shape, facts.width or tokens.shape[2]))
        for name in ("attention_mask", "labels", "token_type_ids", "input_type_mask"):
            if (field := getattr(self, name)) is not None:
                check.tensor(name, field, "(B, T)", 2)
                check.shape(name, field, "(B, T)", self.shape)
        if positions is not None and tuple(positions.shape) not in (self.shape, (1, self.shape[1])):
            raise ValueError(f"position_ids: expected shape (B, T) = {self.shape}, got {tuple(positions.shape)}")
        for name in ("labels", "position_ids", "input_type_mask"):
            if (field := getattr(self, name)) is not None:
                check.integral(name, field)
        return tokens


FIELDS = tuple(field.name for field in fields(Batch))


@dataclass(frozen=True)
class Placed:
    """A batch whose prompts have their places.

    layout: where each column comes from.
    batch: tokens (B, T); position ids and token types (B, S), and mask and labels too, unless
    carries: those are the tokens' still, for `ops.splice_batch` to carry.
    """

    layout: Layout
    batch: Batch
    carries: bool = False


def check_length(facts: BaseFacts, num_prompt_rows: int, length: int) -> None:
    """Refuse a prompt and text that are longer than a learned position table."""
    total = num_prompt_rows + length
    if facts.position_limit is not None and total > facts.position_limit:
        raise ValueError(
            f"num_virtual_tokens + tokens: expected at most the base model's {facts.position_limit} positions, "
            f"got {num_prompt_rows} + {length} = {total}"
        )


def put_in_front(
    facts: BaseFacts, num_prompt_rows: int, batch: Batch, pool_last: bool = False, start: int = 0
) -> Placed:
    """Put P prompt rows in front of the text of each row, where padding changes nothing; see `choose_layout`.

    Args:
        pool_last: the base model reads its answer at the last position, so padding must not be there.
        start: tokens of each row that stay before the prompt.

    Returns:
        Mask, labels and ids that were not given are not made up, but for position ids that padding makes necessary.
    """
    tokens = batch.checked(facts)
    size, length = batch.shape
    check_length(facts, num_prompt_rows, length)
    if start > length:
        raise ValueError(f"input_ids: expected at least prompt_start = {start} tokens, got {length}")
    positions, types = batch.position_ids, batch.token_type_ids
    if start and positions is not None:
        raise ValueError(f"position_ids: expected None with prompt_start = {start}, got {tuple(positions.shape)}")
    layout, padding = choose_layout(facts, num_prompt_rows, tokens, batch.attention_mask, pool_last, start)
    if positions is not None:
        positions = layout.position_ids(positions.expand(size, length), facts.first_position)
    elif padding is not None and facts.places_position_ids:
        positions = padding_positions(layout, padding, length, facts.first_position)
    types = None if types is None else layout.fill(types, 0)
    return Placed(layout, taken(facts, replace(batch, position_ids=positions, token_type_ids=types)), carries=True)


def place(
    facts: BaseFacts, layout: Layout, batch: Batch, turn: Turn | None = None, pool_index: Tensor | None = None
) -> Placed:
    """Prompts and tokens (B, T) go where the slots of a layout say.

    Args:
        batch: its other fields are those of the output, (B, S), or None.
        turn: which column of each row must come to an end of it, or None.
        pool_index: (B,) the columns that are read, where they are not the last or first that the mask leaves.

    Returns:
        Position ids that were not given are counted from a mask that was.
    """
    if pool_index is not None and batch.attention_mask is None:
        batch = replace(batch, attention_mask=torch.ones_like(layout.given_slots))
    _check_placed(facts, layout, batch, pool_index)
    if batch.position_ids is None and batch.attention_mask is not None and facts.places_position_ids:
        batch = replace(batch, position_ids=count_positions(batch.attention_mask, facts.first_position))
    if turn is not None:
        layout, batch = _turned(turn, layout, batch, pool_index)
    return Placed(layout, taken(facts, batch))


_OF_OUTPUT = ("attention_mask", "labels", "position_ids", "token_type_ids")


def _turned(turn: Turn, layout: Layout, batch: Batch, pool_index: Tensor | None) -> tuple[Layout, Batch]:
    """Rows rotated so that padding (or what stands behind the pooled column) is at the other end. A mask then covers
    what has come before the row's first column."""
    slots, mask = layout.given_slots, batch.attention_mask
    length = slots.shape[1]
    column = torch.arange(length, device=slots.device)
    last = turn is Turn.LAST_TO_END
    if pool_index is None:
        if not may_be_padded(mask, -1 if last else 0):
            return layout, batch
        left, right = count_padding(mask)
        begin = length - right if last else left
    else:
        begin = pool_index + 1 if last else pool_index
        if last and mask is not None:
            batch = replace(batch, attention_mask=mask * (column < begin.unsqueeze(1)).to(mask.dtype))
    columns = (column + begin.unsqueeze(1)).remainder(length)
    fields = {name: field.gather(1, columns) for name in _OF_OUTPUT if (field := getattr(batch, name)) is not None}
    return Layout(layout.num_prompt_rows, slots.gather(1, columns)), replace(batch, **fields)


def _check_placed(facts: BaseFacts, layout: Layout, batch: Batch, pool_index: Tensor | None) -> None:
    """Refuse slots that do not fit the tokens, fields that do not fit the slots, and rows longer than a position table.

    Values are looked at on a CPU only: elsewhere the host would wait for the device.
    """
    slots, tokens = layout.given_slots, batch.tokens
    if slots.shape[0] != tokens.shape[0]:
        raise ValueError(f"slots: expected shape (B, S) with B = {tokens.shape[0]}, got {tuple(slots.shape)}")
    for name in _OF_OUTPUT:
        field = getattr(batch, name)
        if field is not None and field.shape != slots.shape:
            raise ValueError(f"{name}: expected the shape of slots, {tuple(slots.shape)}, got {tuple(field.shape)}")
    if pool_index is not None and tuple(pool_index.shape) != (slots.shape[0],):
        raise ValueError(f"pool_index: expected shape (B,) = ({slots.shape[0]},), got {tuple(pool_index.shape)}")
    looks = slots.device.type == "cpu" and not torch.compiler.is_compiling() and slots.numel() > 0
    if looks:
        if pool_index is not None and not all(0 <= column < slots.shape[1] for column in pool_index.tolist()):
            raise ValueError(f"pool_index: expected columns in [0, {slots.shape[1]}), got {pool_index.tolist()}")
        low, high = (int(end) for end in torch.aminmax(slots))
        if low < -layout.num_prompt_rows or high >= tokens.shape[1]:
            raise ValueError(
                f"slots: expected values from -{layout.num_prompt_rows} (prompt rows) to {tokens.shape[1] - 1} "
                f"(tokens), got {low if low < -layout.num_prompt_rows else high}"
            )
    mask, positions, limit, longest = batch.attention_mask, batch.position_ids, facts.position_limit, slots.shape[1]
    if limit is None or longest <= limit:
        return
    if not looks and (mask is not None or positions is not None):
        return
    if mask is not None:
        longest = int((mask != 0).sum(1).max())
    if positions is not None:  # they may begin anew within a row
        longest = min(longest, int(positions.max()) - facts.first_position + 1)
    if longest > limit:
        raise ValueError(
            f"slots: expected at most the base model's {limit} positions in a row, got {longest} without padding"
        )


def taken(facts: BaseFacts, batch: Batch) -> Batch:
    """`batch`, unless the base model's forward does not take one of its fields.

    Raises:
        ValueError: it does not.
    """
    for name, takes in (("position_ids", facts.places_position_ids), ("token_type_ids", facts.takes_token_type_ids)):
        if getattr(batch, name) is not None and not takes:
            raise ValueError(f"{name}: expected None, because the base model's forward takes no {name}")
    return batch
