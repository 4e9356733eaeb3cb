"""Where each row of a spliced batch comes from: the prompt rows or the tokens.

A layout answers one question for every output position `s` of every row `b`: `slot < 0` takes prompt row `~slot`,
`slot >= 0` takes token `slot` of that row. The plain prefix (P prompt rows, then the tokens) needs no slot tensor, nor
do prefixes of one length that are each row's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.facts import to_device
from .picture import join_symbols, row_symbols

IGNORE_INDEX = -100  # transformers' label for "no loss here"


@dataclass(frozen=True)
class Layout:
    """The source of every output row; build one with `prefix`, `prefixes`, `insert` or `from_slots`.

    num_prompt_rows: rows of the prompt table that the layout may refer to; of prefixes, those of each.
    slots: (B, S) int64, or None for a prefix.
    which: (B,) int64 in [0, num_prompts), each row's own prefix; None if all have the same, or with slots.
    """

    num_prompt_rows: int
    slots: Tensor | None = None
    which: Tensor | None = None
    num_prompts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("num_prompt_rows", 0), ("num_prompts", 1)):
            count = getattr(self, name)
            if isinstance(count, bool) or count < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {count!r}")

    def __repr__(self) -> str:
        """With the first row as a picture: P a prompt row, t a token."""
        count = self.num_prompt_rows
        if self.slots is None:
            made = f"prefix({count})" if self.which is None else f"prefixes({count}, which, {self.num_prompts})"
            return " ".join((f"Layout.{made}:", join_symbols(["P"] * count), "t ..."))
        text = f"Layout(num_prompt_rows={count}, slots={tuple(self.slots.shape)})"
        if type(self.slots) is not Tensor or self.slots.device.type == "meta" or not self.slots.numel():
            return text
        return f"{text}: {join_symbols(row_symbols(self.slots[0].tolist()))}"

    @classmethod
    def prefix(cls, num_prompt_rows: int) -> Layout:
        """All prompt rows, then the tokens: what PEFT builds by concatenation."""
        if not isinstance(num_prompt_rows, int):
            raise ValueError(f"num_prompt_rows: expected an int >= 0, got {num_prompt_rows!r}")
        return cls(num_prompt_rows)

    @classmethod
    def prefixes(cls, num_prompt_rows: int, which: Tensor, num_prompts: int) -> Layout:
        """All rows of one of several prompts, then the tokens: row b has prompt `which[b]`.

        Args:
            num_prompt_rows: P, of each prompt; the table has them one after another, (num_prompts * P, D).
            which: (B,) int64 in [0, num_prompts). Not checked against it: that would wait for the device.
            num_prompts: at least 1.
        """
        if not isinstance(which, Tensor):
            raise TypeError(f"which: expected an int64 tensor of shape (B,), got {type(which).__name__}")
        if which.dim() != 1 or which.dtype != torch.int64:
            raise ValueError(f"which: expected int64 of shape (B,), got {which.dtype} of shape {tuple(which.shape)}")
        return cls(num_prompt_rows, None, which, num_prompts)

    @classmethod
    def from_slots(cls, slots: Tensor, num_prompt_rows: int) -> Layout:
        """Any arrangement. Slots are not checked against the number of prompt rows: that would wait for the device."""
        if not isinstance(slots, Tensor):
            raise TypeError(f"slots: expected an int64 tensor of shape (B, S), got {type(slots).__name__}")
        if slots.dim() != 2 or slots.dtype != torch.int64:
            raise ValueError(f"slots: expected int64 of shape (B, S), got {slots.dtype} of shape {tuple(slots.shape)}")
        return cls(num_prompt_rows, slots)

    @classmethod
    def insert(cls, num_prompt_rows: int, length: int, start: Tensor, shift: Tensor | None = None) -> Layout:
        """All prompt rows before token `start[b]` of each row, whose tokens are first rotated left by `shift[b]`.

        With `start` the number of padding tokens at the left of a row, padding comes first, then prompt, then text:
        the text then sees the same neighbours, at the same distances, as it would without padding.

        Args:
            num_prompt_rows: P.
            length: T, tokens per row.
            start: (B,) int64 in [0, T].
            shift: (B,) int64; -n moves n tokens of padding from the right end of a row to its left end.
        """
        position = torch.arange(num_prompt_rows + length, device=start.device).unsqueeze(0)
        prompt_row = position - start.unsqueeze(1)
        is_prompt = (prompt_row >= 0) & (prompt_row < num_prompt_rows)
        token = torch.where(prompt_row < 0, position, position - num_prompt_rows)
        if shift is not None and length > 0:
            token = (token + shift.unsqueeze(1)).remainder(length)
        return cls(num_prompt_rows, torch.where(is_prompt, ~prompt_row, token))

    @property
    def table_rows(self) -> int:
        """R, of the whole prompt table."""
        return self.num_prompt_rows * self.num_prompts

    def spelled(self, length: int) -> Layout:
        """The same with slots, for T tokens a row, of prefixes that are each row's own; any other layout itself."""
        if self.which is None:
            return self
        slots, is_prompt = _prefix_slots(self.num_prompt_rows, length, self.which.device)
        first = self.which.unsqueeze(1) * self.num_prompt_rows
        return Layout(self.table_rows, torch.addcmul(slots, first, is_prompt, value=-1))

    @property
    def given_slots(self) -> Tensor:
        # Of a layout that is known to be no prefix.
        assert self.slots is not None
        return self.slots

    def output_length(self, num_tokens: int) -> int:
        """S for rows of `num_tokens` tokens."""
        return self.num_prompt_rows + num_tokens if self.slots is None else self.slots.shape[1]

    def fill(self, values: Tensor, fill_value: float) -> Tensor:
        """Carry per-token values (B, T) to (B, S), with `fill_value` at the prompt rows. The dtype stays."""
        if self.slots is None:
            return F.pad(values, (self.num_prompt_rows, 0), value=fill_value)
        carried = values.gather(1, self.slots.clamp(min=0)) if values.shape[1] else values.new_zeros(self.slots.shape)
        return carried.masked_fill(self.slots < 0, fill_value)

    def fill_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Carry per-token values (B, T) to (B, S), with `rows[r]` at prompt row r; `rows` is (R,) in values' dtype."""
        if self.slots is None:
            if self.which is not None:
                rows = rows.view(self.num_prompts, self.num_prompt_rows).index_select(0, self.which)
            return torch.cat((rows.expand(values.shape[0], -1), values), dim=1)
        if not rows.shape[0]:
            return self.fill(values, 0)
        return torch.where(self.slots < 0, rows[(~self.slots).clamp(min=0)], self.fill(values, 0))

    def overwrite_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values of the output (B, S), with `rows[r]` where it is prompt row r, and 0 at rows behind them.

        `rows` is (P,) in values' dtype, with P at most R.
        """
        rows = F.pad(rows, (0, max(self.num_prompt_rows, 1) - rows.shape[0]))
        return torch.where(self.given_slots < 0, rows[(~self.given_slots).clamp(min=0)], values)

    def position_ids(self, values: Tensor, first: int = 0) -> Tensor:
        """Position ids of the caller's tokens (B, T), moved behind the prompt, which counts first ... first + P-1."""
        moved = self.fill(values + self.num_prompt_rows, 0)
        if self.slots is None:
            moved[:, : self.num_prompt_rows] = torch.arange(first, first + self.num_prompt_rows, device=values.device)
            return moved
        return torch.where(self.slots < 0, ~self.slots + first, moved)

    def token_positions(self, batch: int, length: int, device: torch.device, mask: Tensor | None = None) -> Tensor:
        """Where each token went, (B, T) int64: the inverse of the slots. Tokens that went nowhere give 0.

        mask: (B, S) attention mask of a layout whose padding may refer to tokens that stand elsewhere too; those count.
        """
        if self.slots is None:
            return torch.arange(self.num_prompt_rows, self.num_prompt_rows + length, device=device).expand(batch, -1)
        positions = torch.arange(self.slots.shape[1], device=device).expand(batch, -1)
        target = torch.where(self.slots < 0, length, self.slots)  # prompt rows go to a spare last column
        found = self.slots.new_zeros(batch, length + 1).scatter_(1, target, positions)
        if mask is not None:
            found.scatter_(1, torch.where(mask == 0, length, target), positions)
        return found[:, :length]


@functools.lru_cache(maxsize=64)
def _prefix_slots(num_prompt_rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(P + T,) int64: the slots of a prefix, and 1 where they are the prompt's. Copied to a device once."""
    with torch.inference_mode(False):
        slots = torch.cat((~torch.arange(num_prompt_rows, device="cpu"), torch.arange(length, device="cpu")))
        return to_device(slots, device), to_device((slots < 0).to(torch.int64), device)
