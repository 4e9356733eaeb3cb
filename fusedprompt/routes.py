"""How prompt rows reach the base model: the layout of a batch, and the arguments the base model is called with."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .base_model import BaseFacts, fusable_table
from .layout import Layout, count_padding, may_be_padded
from .ops.splice import SplicedBatch


@dataclass
class SplicedInputs:
    """A batch with its prompt in place.

    prompt: (R, D) and layout: where every row came from. arguments: keyword arguments for the base model.
    """

    prompt: Tensor
    layout: Layout
    arguments: dict[str, Any]


class Turn(enum.Enum):
    """Which column of a row a base model reads: its last, or its first. Padding goes to the other end."""

    LAST_TO_END = enum.auto()
    FIRST_TO_START = enum.auto()


def splice_route(
    facts: BaseFacts,
    word_embeddings: nn.Module,
    prompt: Tensor,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    pool_last: bool = False,
    start: int = 0,
) -> SplicedInputs:
    """Put prompt rows (P, D) into a batch of tokens.

    Args:
        labels: (B, T) labels per token, or None.
        pool_last: the base model reads its answer at the last position, so padding must not be there.
        start: tokens of each row that stay before the prompt.

    Returns:
        The layout, and inputs_embeds, attention_mask, labels, position_ids and token_type_ids for the base model; a
        mask, labels and ids that were not given are not made up, except position ids that padding makes necessary.
    """
    tokens = checked_tokens(input_ids, inputs_embeds, attention_mask)
    batch, length = tokens.shape[:2]
    check_length(facts, prompt.shape[0], length)
    if start > length:
        raise ValueError(f"input_ids: expected at least prompt_start = {start} tokens, got {length}")
    if start and position_ids is not None:
        raise ValueError(f"position_ids: expected None with prompt_start = {start}, got {tuple(position_ids.shape)}")
    layout, padding = choose_layout(facts, prompt.shape[0], tokens, attention_mask, pool_last, start)
    filled = _fill(word_embeddings, prompt, layout, input_ids, inputs_embeds, attention_mask, labels)
    if position_ids is not None:
        position_ids = layout.position_ids(position_ids.expand(batch, length), facts.first_position)
    elif padding is not None and facts.takes_position_ids:
        position_ids = padding_positions(layout, padding, length, facts.first_position)
    if token_type_ids is not None:
        token_type_ids = layout.fill(token_type_ids, 0)
    return _call(facts, prompt, layout, filled, position_ids, token_type_ids)


def place(
    facts: BaseFacts,
    word_embeddings: nn.Module,
    prompt: Tensor,
    layout: Layout,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    turn: Turn | None = None,
    pool_index: Tensor | None = None,
) -> SplicedInputs:
    """`splice_route` for a layout that is given: prompt rows (R, D) and tokens (B, T) go where its slots say.

    Args:
        attention_mask, labels, position_ids, token_type_ids: of the output, (B, S), or None.
        turn: which column of each row must come to an end of it, or None.
        pool_index: (B,) the columns that are read, where they are not the last or first that the mask leaves.

    Returns:
        As `splice_route`; position ids that were not given are counted from a mask that was.
    """
    assert layout.slots is not None
    if pool_index is not None and attention_mask is None:
        attention_mask = torch.ones_like(layout.slots)
    fields = {
        "attention_mask": attention_mask,
        "labels": labels,
        "position_ids": position_ids,
        "token_type_ids": token_type_ids,
    }
    check_placed(facts, layout, input_ids if input_ids is not None else inputs_embeds, fields, pool_index)
    if position_ids is None and attention_mask is not None and facts.takes_position_ids:
        counted = (attention_mask != 0).cumsum(1) - 1
        fields["position_ids"] = counted.clamp(min=0) + facts.first_position
    columns = None if turn is None else _turned_columns(turn, layout.slots, fields, pool_index)
    if columns is not None:
        layout = Layout(layout.num_prompt_rows, layout.slots.gather(1, columns))
        fields = {name: None if field is None else field.gather(1, columns) for name, field in fields.items()}
    filled = _fill(word_embeddings, prompt, layout, input_ids, inputs_embeds)
    filled = filled._replace(attention_mask=fields["attention_mask"], labels=fields["labels"])
    return _call(facts, prompt, layout, filled, fields["position_ids"], fields["token_type_ids"])


def _turned_columns(
    turn: Turn, slots: Tensor, fields: dict[str, Tensor | None], pool_index: Tensor | None
) -> Tensor | None:
    """(B, S) int64: each row's columns, rotated so that padding (or what stands behind the pooled column) is at the
    other end; None where nothing moves. A mask then covers what has come before the row's first column."""
    length, mask = slots.shape[1], fields["attention_mask"]
    column = torch.arange(length, device=slots.device)
    if pool_index is None:
        if not may_be_padded(mask, -1 if turn is Turn.LAST_TO_END else 0):
            return None
        assert mask is not None
        left, right = count_padding(mask)
        begin = length - right if turn is Turn.LAST_TO_END else left
    elif turn is Turn.LAST_TO_END:
        real = column <= pool_index.unsqueeze(1)
        assert mask is not None
        fields["attention_mask"] = mask * real.to(mask.dtype)
        begin = pool_index + 1
    else:
        begin = pool_index
    return (column + begin.unsqueeze(1)).remainder(length)


def _fill(
    word_embeddings: nn.Module,
    prompt: Tensor,
    layout: Layout,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> SplicedBatch:
    """The batch of embeddings, and the tokens' mask and labels carried along."""
    table = fusable_table(word_embeddings) if input_ids is not None else None
    if input_ids is not None and table is None:
        inputs_embeds = word_embeddings(input_ids)
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    return ops.splice_batch(
        prompt.to(tokens.device),
        layout,
        input_ids=None if table is None else input_ids,
        table=table,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
    )


def _call(
    facts: BaseFacts,
    prompt: Tensor,
    layout: Layout,
    filled: SplicedBatch,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
) -> SplicedInputs:
    """What the base model is called with: fields (B, S) that are there, and that it takes."""
    arguments: dict[str, Any] = {"inputs_embeds": filled.inputs_embeds}
    if filled.attention_mask is not None:
        arguments["attention_mask"] = filled.attention_mask
    if filled.labels is not None:
        arguments["labels"] = filled.labels
    if position_ids is not None:
        _require(facts.takes_position_ids, "position_ids")
        arguments["position_ids"] = position_ids
    if token_type_ids is not None:
        _require(facts.takes_token_type_ids, "token_type_ids")
        arguments["token_type_ids"] = token_type_ids
    return SplicedInputs(prompt, layout, arguments)


def checked_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The one of ids (B, T) and embeddings (B, T, D) that is given, if the mask fits it.

    Raises:
        ValueError: both or none are given, or the mask is not (B, T).
    """
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("You have to provide either input_ids or inputs_embeds, and not both")
    check_mask(tokens, attention_mask)
    return tokens


def check_mask(tokens: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse a mask that is not (B, T)."""
    shape = tuple(tokens.shape[:2])
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(f"attention_mask: expected shape (B, T) = {shape}, got {tuple(attention_mask.shape)}")


def check_placed(
    facts: BaseFacts,
    layout: Layout,
    tokens: Tensor | None,
    fields: Mapping[str, Tensor | None],
    pool_index: Tensor | None = None,
) -> None:
    """Refuse slots that do not fit the tokens, fields that do not fit the slots, and rows longer than a position table.

    Values are looked at on a CPU only: elsewhere the host would wait for the device.
    """
    slots = layout.slots
    assert slots is not None
    if tokens is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    if slots.shape[0] != tokens.shape[0]:
        raise ValueError(f"slots: expected shape (B, S) with B = {tokens.shape[0]}, got {tuple(slots.shape)}")
    for name, field in fields.items():
        if field is not None and field.shape != slots.shape:
            raise ValueError(f"{name}: expected the shape of slots, {tuple(slots.shape)}, got {tuple(field.shape)}")
    mask, limit, longest = fields.get("attention_mask"), facts.position_limit, slots.shape[1]
    looks = slots.device.type == "cpu" and not torch.compiler.is_compiling() and slots.numel() > 0
    if pool_index is not None and tuple(pool_index.shape) != (slots.shape[0],):
        raise ValueError(f"pool_index: expected shape (B,) = ({slots.shape[0]},), got {tuple(pool_index.shape)}")
    if looks:
        low, high = (int(end) for end in torch.aminmax(slots))
        if low < -layout.num_prompt_rows or high >= tokens.shape[1]:
            raise ValueError(
                f"slots: expected values from -{layout.num_prompt_rows} (prompt rows) to {tokens.shape[1] - 1} "
                f"(tokens), got {low if low < -layout.num_prompt_rows else high}"
            )
    if limit is None or longest <= limit:
        return
    positions = fields.get("position_ids")
    if mask is not None or positions is not None:
        if not looks:
            return
        longest = int((mask != 0).sum(1).max()) if mask is not None else longest
        if positions is not None:  # they may begin anew within a row
            longest = min(longest, int(positions.max()) - facts.first_position + 1)
    if longest > limit:
        raise ValueError(
            f"slots: expected at most the base model's {limit} positions in a row, got {longest} without padding"
        )


def check_length(facts: BaseFacts, num_prompt_rows: int, length: int) -> None:
    """Refuse a prompt and text that are longer than a learned position table."""
    total = num_prompt_rows + length
    if facts.position_limit is not None and total > facts.position_limit:
        raise ValueError(
            f"num_virtual_tokens + tokens: expected at most the base model's {facts.position_limit} positions, "
            f"got {num_prompt_rows} + {length} = {total}"
        )


def _require(taken: bool, argument: str) -> None:
    if not taken:
        raise ValueError(f"{argument}: expected None, because the base model's forward takes no {argument}")


def choose_layout(
    facts: BaseFacts,
    num_prompt_rows: int,
    tokens: Tensor,
    attention_mask: Tensor | None,
    pool_last: bool = False,
    start: int = 0,
) -> tuple[Layout, Tensor | None]:
    """Arrange prompt, text and padding of (B, T) tokens so that padding changes nothing.

    A causal model gets padding, prompt, text: the prompt stays next to the text, as without padding. An encoder gets
    prompt, padding, text, with position ids that skip the padding, because per-token outputs and pooled first rows stay
    where PEFT has them; an encoder without position ids, or with tokens before the prompt, gets its padding last.

    Returns:
        The layout and, where a row may be padded at its left in the output, the number of such tokens, (B,) int64.
    """
    length = tokens.shape[1]
    left, right = may_be_padded(attention_mask, 0), pool_last and may_be_padded(attention_mask, -1)
    if attention_mask is None or not (left or (right and facts.causal)):
        if not start:
            return Layout.prefix(num_prompt_rows), None
        first = torch.full((tokens.shape[0],), start, device=tokens.device)
        return Layout.insert(num_prompt_rows, length, first), None
    at_left, at_right = count_padding(attention_mask)
    if facts.causal:
        padding = at_left + at_right if pool_last else at_left
        shift = -at_right if pool_last else None
        return Layout.insert(num_prompt_rows, length, padding + start, shift), padding
    if facts.takes_position_ids and not start:
        return Layout.prefix(num_prompt_rows), at_left
    return Layout.insert(num_prompt_rows, length, torch.full_like(at_left, start), at_left), None


def padding_positions(layout: Layout, padding: Tensor, length: int, first: int) -> Tensor:
    """Position ids (B, S) that count prompt and text but not the padding at the left of each row."""
    if layout.slots is None:
        text = torch.arange(length, device=padding.device) - padding.unsqueeze(1)
        return layout.position_ids(text.clamp(min=0) + first, first)
    position = torch.arange(layout.slots.shape[1], device=padding.device) - padding.unsqueeze(1)
    return position.clamp(min=0) + first
