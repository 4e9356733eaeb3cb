"""A template as pieces, and slots from pieces.

A sequence is a list of pieces: runs of consecutive rows of the prompt's table, or of consecutive tokens. All that
changes from row to row is how long the texts are and where they begin, so that slots are a few operations on
(B, pieces) and (B, S) tensors, on any device, and the host never waits for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .parts import Anchor, Field, Mask, Part, Pattern, Prompt, Separator
from .tokenizer import Specials


@dataclass(frozen=True)
class Piece:
    """A run of a sequence: `length` rows of the table from `row` on, or (row is None) tokens.

    part: the template's; None for special tokens at the ends.
    token_type: of all of it.
    """

    row: int | None
    length: int
    part: Part | None = None
    token_type: int = 0


@functools.lru_cache(maxsize=64)
def pieces_of(template: Pattern) -> tuple[Piece, ...]:
    """The pieces of a template whose texts come without special tokens."""
    constants = dict(template.constant_ids())
    before, token_type, between, second, after = (template.specials or Specials()).types_of_parts
    rows, row = 0, template.num_prompt_rows
    pieces = []

    def constant(types: Sequence[int], part: Part | None) -> None:
        nonlocal row
        for kind, run in itertools.groupby(types):
            pieces.append(Piece(row, len(list(run)), part, kind))
            row += pieces[-1].length

    constant(before, None)
    for index, part in enumerate(template.parts):
        if isinstance(part, Prompt):
            pieces.append(Piece(rows, part.rows, part, token_type))
            rows += part.rows
        elif isinstance(part, Field):
            pieces.append(Piece(None, 0, part, token_type))
        elif isinstance(part, Separator):
            constant(between, part)
            token_type = second
        else:
            constant([token_type] * len(constants[index]), part)
    constant(after, None)
    return tuple(pieces)


def table_ids(template: Pattern) -> list[int]:
    """The constant tokens, in the order in which their rows stand behind the prompt's."""
    specials = template.specials or Specials()
    return [*specials.before, *(id for _, ids in template.constant_ids() for id in ids), *specials.after]


def check_names(template: Pattern, given: Mapping[str, Any], argument: str = "fields") -> None:
    """Refuse names that are no fields of a template and, for its texts, fields without one."""
    names = template.fields
    for name in given:
        if name not in names:
            raise ValueError(f"{argument}: {name!r} is no field of the template '{template}', which has {names}")
    for index, part in enumerate(template.parts):
        if isinstance(part, Field) and part.name not in given and argument == "fields":
            raise ValueError(f"{argument}: {template.where(index)}: expected a value, got only {sorted(given)}")


def lay_out(
    lengths: Tensor, firsts: Tensor, steps: Tensor, width: int, at_left: bool | Tensor, filler: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of rows that are made of pieces.

    Args:
        lengths: (B, K) int64, of the pieces. firsts: (B, K), their first slots.
        steps: (K,) from slot to slot within a piece: 1 for tokens, -1 for rows of the table.
        width: S. at_left: whether padding goes to the left; a bool, or (B, 1) of them.
        filler: the slot of padding.

    Returns:
        Slots (B, S), which of them are not padding (B, S) bool, and each column's piece (B, S).
    """
    ends = lengths.cumsum(1)
    total = ends[:, -1:]
    column = torch.arange(width, device=lengths.device).unsqueeze(0) - (width - total) * at_left
    piece = torch.searchsorted(ends[:, :-1].contiguous(), column, right=True)  # padding belongs to the piece beside it
    starts = firsts - steps * (ends - lengths)
    # In place: at B=64, T=512 each further tensor of this size costs as much as the arithmetic on it.
    slots = starts.gather(1, piece).addcmul_(steps.expand_as(starts).gather(1, piece), column)
    real = (column >= 0) & (column < total)
    return slots.masked_fill_(~real, filler), real, piece


def anchor_slots(template: Pattern, slots: Sequence[int], mask: Sequence[float] | None) -> set[int]:
    """Which slots of a row are anchors or mask tokens: rows of the table, or tokens of a batch that was rendered.

    Of tokens only their number is known, so that texts beside each other, with no prompt between, have none.
    """
    anchors: set[int] = set()
    real = [slot for slot, kept in zip(slots, mask or [1] * len(slots)) if kept]
    rows = template.num_prompt_rows
    runs = [list(run) for is_prompt, run in itertools.groupby(real, lambda slot: -rows <= slot < 0) if not is_prompt]
    prompts = itertools.groupby(pieces_of(template), lambda piece: isinstance(piece.part, Prompt))
    groups = [list(group) for is_prompt, group in prompts if not is_prompt]
    for run, group in zip(runs, groups):
        texts = sum(isinstance(piece.part, Field) for piece in group)
        text = len(run) - sum(piece.length for piece in group)
        if len(runs) != len(groups) or texts > 1:
            continue
        place = 0
        for piece in group:
            length = text if isinstance(piece.part, Field) else piece.length
            if isinstance(piece.part, Anchor | Mask):
                anchors.update(run[place : place + length])
            place += length
    return anchors
