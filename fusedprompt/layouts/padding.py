"""Padding of a batch: how it is counted, and where it goes so that it changes nothing."""

from __future__ import annotations

import enum
from typing import TypeGuard

import torch
from torch import Tensor

from ..base.facts import BaseFacts
from ..base.tasks import Task
from .layout import Layout


class Turn(enum.Enum):
    """Which column of a row a base model reads: its last, or its first. Padding goes to the other end."""

    LAST_TO_END = enum.auto()
    FIRST_TO_START = enum.auto()

    @classmethod
    def of(cls, task: Task, facts: BaseFacts) -> Turn | None:
        """How the rows of a given layout must be turned for a task, or None."""
        if task.pools:
            return cls.LAST_TO_END if facts.pools_last else cls.FIRST_TO_START
        # An encoder that numbers positions by itself must find its padding last, as must some decoders.
        numbers = (task.token_outputs and not facts.causal and not facts.places_position_ids) or facts.padding_last
        return cls.FIRST_TO_START if numbers else None


def count_padding(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of padding tokens at the left and at the right of each row, (B,) int64 each; 0 and 0 for an empty row."""
    real = (attention_mask != 0).to(torch.int8)
    return real.argmax(dim=1), real.flip(1).argmax(dim=1)


def may_be_padded(attention_mask: Tensor | None, column: int) -> TypeGuard[Tensor]:
    """Whether a row may have padding at its left (column 0) or right (column -1) end.

    Looks at the values where that is free: on a CPU, outside compilation. Elsewhere the answer is yes, because looking
    would make the host wait for the device.
    """
    if attention_mask is None or attention_mask.numel() == 0:
        return False
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    # tolist reads memory directly: no operator is dispatched.
    return not all(attention_mask[:, column].tolist())


def unpredicted(attention_mask: Tensor) -> Tensor:
    """(B, S) bool: the columns up to each row's first real one, which at most padding stands in front of."""
    return (attention_mask != 0).cumsum(1) <= 1


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
    first_in_row = facts.padding_first(pool_last)
    if attention_mask is None or not (left or (right and first_in_row)):
        if not start:
            return Layout.prefix(num_prompt_rows), None
        first = torch.full((tokens.shape[0],), start, device=tokens.device)
        return Layout.insert(num_prompt_rows, length, first), None
    at_left, at_right = count_padding(attention_mask)
    if first_in_row:
        padding = at_left + at_right if pool_last else at_left
        first = (padding + start).clamp(max=length)  # of a row with fewer tokens than `start`, behind them all
        return Layout.insert(num_prompt_rows, length, first, -at_right if pool_last else None), padding
    if facts.places_position_ids and not start and not facts.padding_last:
        return Layout.prefix(num_prompt_rows), at_left
    return Layout.insert(num_prompt_rows, length, torch.full_like(at_left, start), at_left), None


def padding_positions(layout: Layout, padding: Tensor, length: int, first: int) -> Tensor:
    """Position ids (B, S) that count prompt and text but not the padding at the left of each row."""
    if layout.slots is None:
        text = torch.arange(length, device=padding.device) - padding.unsqueeze(1)
        return layout.position_ids(text.clamp(min=0) + first, first)
    position = torch.arange(layout.slots.shape[1], device=padding.device) - padding.unsqueeze(1)
    return position.clamp(min=0) + first
