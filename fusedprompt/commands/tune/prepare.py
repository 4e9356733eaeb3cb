"""From files and settings to rows of ids: read, written by the template, split, and counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layouts.layout import IGNORE_INDEX
from ..language_model import blocks_of
from .data import Row, Source
from .settings import Settings
from .template import CPTWriter, TextTemplate, Writer, writer_of

Ids = dict[str, list[int]]


@dataclass(frozen=True)
class Material:
    """What is learned: rows of ids, and of rows that a template wrote the rows themselves.

    writer: None for a text. context: CPT's configuration fields, else none. skipped: rows that were too long.
    """

    train: list[Ids]
    held_out: list[Ids]
    held_out_rows: list[Row]
    writer: Writer | None
    context: dict[str, Any]
    skipped: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(ids["input_ids"]) for ids in [*self.train, *self.held_out])


def prepare(settings: Settings, source: Source, held_out: Source | None, tokenizer: Any) -> Material:
    """Rows to train on and others to watch it with; the same for the same settings.

    Raises:
        ValueError: of the data, with file and line; too few rows; a row that is too long.
    """
    if settings.template is None:
        return _text(settings, source, held_out, tokenizer)
    template = TextTemplate(settings.template)
    train, watched = source.rows(template.columns), held_out.rows(template.columns) if held_out else []
    if held_out is None:
        train, watched = _split(train, settings, "--data")
    context, writer = dict[str, Any](), writer_of(settings.method, template, tokenizer)
    if isinstance(writer, CPTWriter):
        if len(train) <= settings.examples:
            raise ValueError(
                f"--examples: expected less than {len(train)}, the rows to train on, got {settings.examples}"
            )
        shown, train = train[: settings.examples], train[settings.examples :]
        context = writer.cpt.context([writer.example(row.fields) for row in shown], tokenizer)
    kept, skipped = _written(train, writer, settings)
    watched_kept, more = _written(watched, writer, settings)
    if not kept or not watched_kept:
        raise ValueError(f"--max-length: expected rows of at most {settings.max_length} tokens, got longer ones alone")
    return Material(
        [ids for _, ids in kept],
        [ids for _, ids in watched_kept],
        [row for row, _ in watched_kept],
        writer,
        context,
        skipped + more,
    )


def _split(rows: list[Row], settings: Settings, argument: str) -> tuple[list[Row], list[Row]]:
    """Rows in a random order, and of these the last."""
    if len(rows) < 2:
        raise ValueError(f"{argument}: expected at least two rows, one to be held out, got {len(rows)}")
    rows = random.Random(settings.seed).sample(rows, len(rows))
    count = min(len(rows) - 1, max(1, round(settings.held_out * len(rows))))
    return rows[:-count], rows[-count:]


def _written(rows: Sequence[Row], writer: Writer, settings: Settings) -> tuple[list[tuple[Row, Ids]], int]:
    """Rows with their ids, and how many were left out."""
    kept = list[tuple[Row, Ids]]()
    for row in rows:
        ids = writer.row(row.fields)
        length = len(ids["input_ids"])
        if length <= settings.max_length:
            kept.append((row, ids))
        elif not settings.skip_long:
            raise ValueError(
                f"{row.place}: expected at most --max-length {settings.max_length} tokens, got {length}. "
                "Allow more, or leave out such rows by --skip-long"
            )
    return kept, len(rows) - len(kept)


def _text(settings: Settings, source: Source, held_out: Source | None, tokenizer: Any) -> Material:
    """Blocks, of which the last are held out: they are what follows, and no neighbours of blocks that are learned."""
    size = settings.max_length
    train = blocks_of(source.text, tokenizer, size, (f"--data: {source.path}", "--max-length"))
    if held_out is None:
        count = min(len(train) - 1, max(1, round(settings.held_out * len(train))))
        train, watched = train[:-count], train[-count:]
    else:
        watched = blocks_of(held_out.text, tokenizer, size, (f"--held-out-data: {held_out.path}", "--max-length"))

    def rows(blocks: Tensor) -> list[Ids]:
        # A model without a prompt cannot predict the first.
        return [{"input_ids": row, "labels": [IGNORE_INDEX, *row[1:]]} for row in blocks.tolist()]

    return Material(rows(train), rows(watched), [], None, {}, 0)


def collator(pad_token_id: int | None) -> Callable[[Sequence[Mapping[str, list[int]]]], dict[str, Tensor]]:
    """Of rows of ids, batches (B, T) int64, padded at the right."""
    fills = {"input_ids": pad_token_id or 0, "labels": IGNORE_INDEX, "input_type_mask": 0}

    def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows], device="cpu")
            for name, fill in fills.items()
            if name in rows[0]
        }
        real = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        return {**batch, "attention_mask": torch.tensor(real, device="cpu")}

    return collate
