"""Texts in a template as a batch: ids, slots, mask, labels, and what else a model is called with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.positions import count_positions
from .layout import IGNORE_INDEX, Layout
from .parts import Anchor, Field, Mask, Pattern, Prompt
from .picture import join_symbols, row_symbols
from .pieces import check_names, lay_out, pieces_of, table_ids
from .tokenizer import encode

Ids = list[int]


class RenderedBatch(dict[str, Any]):
    """A batch as keyword arguments of a `PromptModel`.

    Keys: input_ids (B, T); slots, attention_mask and, as far as they were asked for, labels, token_type_ids and
    position_ids, (B, S) each; pool_index (B,).
    """

    anchors: list[list[int]] | None = None  # per row, which tokens are anchors or the mask token

    @property
    def layout(self) -> Layout:
        """Where each of the S columns comes from."""
        return Layout.from_slots(self["slots"], -int(self["slots"].min()))

    def to(self, device: torch.device | str) -> RenderedBatch:
        """This batch with its tensors on a device; the batch itself."""
        for name, value in self.items():
            self[name] = value.to(device) if isinstance(value, Tensor) else value
        return self

    def picture(self, row: int = 0) -> str:
        """One row: P a prompt row, t a token, A an anchor or the mask token, · padding."""
        anchors = () if self.anchors is None else self.anchors[row]
        return join_symbols(row_symbols(self["slots"][row].tolist(), self["attention_mask"][row].tolist(), anchors))


def render(
    template: Pattern,
    fields: Mapping[str, Sequence[Any]] | Sequence[Any],
    tokenizer: Any = None,
    *,
    loss: Sequence[str] = (),
    mask_labels: Sequence[Any] | None = None,
    labels: Any = None,
    padding_side: str | None = None,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int | None = None,
    position_ids: bool = False,
    pool: str | None = None,
    slots: bool = True,
) -> RenderedBatch:
    """Put B examples into a template.

    Args:
        fields: per field, B texts or lists of ids without special tokens; of a template with one field, just these.
        tokenizer: a transformers tokenizer, for texts, and for a template that is not bound to one.
        loss: fields whose own tokens are labels; all other columns get -100.
        mask_labels: per example, the token at the mask (a text of one token, or an id), or a list of one for each mask.
        labels: (B,) one per sequence, passed on as they are; or per field lists of one label for each token.
        padding_side: "left" or "right"; the tokenizer's own, else right.
        max_length: the most columns of a row, prompt and anchors included. Fields are shortened, the longest first, at
            the tokenizer's truncation side (else at their ends).
        pad_to_multiple_of: make S a multiple of this.
        pad_token_id: the id of padding; the tokenizer's own, else 0.
        position_ids: also give the columns' positions, counted from 0. A `PromptModel` counts them by itself.
        pool: also give pool_index: the "last" column that is not padding, or the "first".
        slots: False gives ids, mask and labels as for a model without a template, (B, T); for plain prefixes only.

    Raises:
        ValueError: what is given does not fit the template; the message names the part.
    """
    if not slots and not template.is_plain_prefix:
        raise ValueError(f"slots: expected True for '{template}', which is not a prompt in front of all text")
    values = _field_ids(template, fields, tokenizer)
    size = next((len(rows) for rows in (*values.values(), mask_labels, labels) if rows is not None), 1)
    side = padding_side or getattr(tokenizer, "padding_side", "right")
    for name, value, allowed in (("padding_side", side, ("left", "right")), ("pool", pool, (None, "first", "last"))):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    targets = _targets(template, values, loss, labels)
    if max_length is not None:
        _shorten(template, values, targets, max_length, getattr(tokenizer, "truncation_side", "right"))
    at_mask = _mask_labels(template, mask_labels, size, tokenizer)
    ids, token_labels, anchors = _rows(template, size, values, targets, at_mask)
    rows = template.num_prompt_rows
    total = rows + max(map(len, ids), default=0)
    if pad_to_multiple_of is not None:
        total = -(-total // pad_to_multiple_of) * pad_to_multiple_of
    left, length = side == "left", total - rows
    pad = pad_token_id if pad_token_id is not None else getattr(tokenizer, "pad_token_id", None) or 0
    batch = RenderedBatch(input_ids=_padded(ids, length, pad, left))
    per_token = bool(targets) or at_mask is not None
    if per_token:
        batch["labels"] = _padded(token_labels, length, IGNORE_INDEX, left)
    elif labels is not None:
        batch["labels"] = torch.as_tensor(labels, device="cpu")
    if not slots:
        batch["attention_mask"] = _padded([[1] * len(row) for row in ids], length, 0, left)
        return batch
    real = _add_layout(batch, template, values, total, left)
    if per_token:
        batch["labels"] = Layout(rows, batch["slots"]).fill(batch["labels"], IGNORE_INDEX)
    if position_ids:
        batch["position_ids"] = count_positions(real, 0)
    if pool is not None:
        flags = real.to(torch.int8)
        batch["pool_index"] = flags.argmax(1) if pool == "first" else total - 1 - flags.flip(1).argmax(1)
    batch.anchors = [[token + (length - len(row)) * left for token in found] for row, found in zip(ids, anchors)]
    return batch


def _field_ids(template: Pattern, fields: Any, tokenizer: Any) -> dict[str, list[Ids]]:
    """Per field, B lists of ids."""
    if not isinstance(fields, Mapping):
        if len(template.fields) != 1:
            raise ValueError(
                f"fields: the template '{template}' has the fields {template.fields}; expected a value for each by name"
            )
        fields = {template.fields[0]: fields}
    check_names(template, fields)
    found: dict[str, list[Ids]] = {}
    for index, part in enumerate(template.parts):
        if not isinstance(part, Field):
            continue
        where, values = f"fields: {template.where(index)}", fields[part.name]
        if isinstance(values, str):
            raise ValueError(f"{where}: expected a list of texts, one for each example, got one text")
        values = [value.tolist() if isinstance(value, Tensor) else value for value in values]
        if any(isinstance(value, str) for value in values):
            if tokenizer is None:
                raise ValueError(f"{where}: texts need a tokenizer; render(..., tokenizer=...)")
            encoded = iter(encode(tokenizer, [value for value in values if isinstance(value, str)]))
            values = [next(encoded) if isinstance(value, str) else value for value in values]
        size = len(next(iter(found.values()), values))
        if len(values) != size:
            raise ValueError(f"{where}: expected {size} values, as in the field before it, got {len(values)}")
        found[part.name] = [list(value) for value in values]
    return found


def _targets(template: Pattern, values: dict[str, list[Ids]], loss: Sequence[str], labels: Any) -> dict[str, list[Ids]]:
    """Per field that has labels, B lists of one for each token."""
    by_field = labels if isinstance(labels, Mapping) else {}
    names = [loss] if isinstance(loss, str) else list(loss)
    check_names(template, dict.fromkeys(names), "loss")
    check_names(template, by_field, "labels")
    if labels is not None and not isinstance(labels, Mapping) and names:
        raise ValueError("labels: expected None, or labels per field, with `loss`, got labels per sequence")
    targets = {name: [list(ids) for ids in values[name]] for name in names}
    for name, rows in by_field.items():
        targets[name] = [list(row) for row in rows]
        if [len(row) for row in targets[name]] != [len(ids) for ids in values[name]]:
            raise ValueError(f"labels: field '{name}': expected one label for each of its tokens")
    return targets


def _mask_labels(template: Pattern, given: Sequence[Any] | None, size: int, tokenizer: Any) -> list[Ids] | None:
    """Per example, a label for each mask."""
    if given is None:
        return None
    if not template.num_masks or len(given) != size:
        raise ValueError(
            f"mask_labels: expected {size} labels for a template with [mask], got {len(given)} for '{template}'"
        )
    found = []
    for value in given:
        row = [_one_token(label, tokenizer) for label in (value if isinstance(value, list | tuple) else [value])]
        if len(row) != template.num_masks:
            raise ValueError(f"mask_labels: expected one label for each of {template.num_masks} masks, got {value!r}")
        found.append(row)
    return found


def _one_token(label: Any, tokenizer: Any) -> int:
    if not isinstance(label, str):
        return int(label)
    if tokenizer is None:
        raise ValueError(f"mask_labels: expected an id, because there is no tokenizer, got {label!r}")
    ids = encode(tokenizer, [label])[0]
    if len(ids) != 1:
        raise ValueError(f"mask_labels: expected a text of one token, got {label!r}, which is {len(ids)}")
    return ids[0]


def _shorten(
    template: Pattern, values: dict[str, list[Ids]], targets: dict[str, list[Ids]], max_length: int, side: str
) -> None:
    """Cut fields until each row has at most `max_length` columns: the longest first, so that they end up alike."""
    room = max_length - template.num_prompt_rows - len(table_ids(template))
    if room < 0 or (room == 0 and values):
        raise ValueError(
            f"max_length: expected more than the {max_length - room} columns of prompt and anchors of '{template}', "
            f"got {max_length}"
        )
    for b in range(len(next(iter(values.values()), ()))):
        counts = {name: len(rows[b]) for name, rows in values.items()}
        for _ in range(sum(counts.values()) - room):
            counts[max(reversed(counts), key=counts.__getitem__)] -= 1  # of equally long ones the last
        for name, keep in counts.items():
            first = len(values[name][b]) - keep if side == "left" else 0
            for rows in (values, targets):
                if name in rows:
                    rows[name][b] = rows[name][b][first : first + keep]


def _rows(
    template: Pattern, size: int, values: dict[str, list[Ids]], targets: dict[str, list[Ids]], at_mask: list[Ids] | None
) -> tuple[list[Ids], list[Ids], list[Ids]]:
    """Each row's ids, its labels, and which of its tokens are anchors."""
    ids, labels, anchors = (list[Ids]([] for _ in range(size)) for _ in range(3))
    constants, pieces = table_ids(template), pieces_of(template)
    for b in range(size):
        masks, rest = iter(at_mask[b] if at_mask is not None else ()), iter(constants)
        for part, length in ((piece.part, piece.length) for piece in pieces):
            if isinstance(part, Field):
                own = values[part.name][b]
                ids[b] += own
                labels[b] += targets[part.name][b] if part.name in targets else [IGNORE_INDEX] * len(own)
            elif not isinstance(part, Prompt):
                if isinstance(part, Anchor | Mask):
                    anchors[b] += range(len(ids[b]), len(ids[b]) + length)
                ids[b] += itertools.islice(rest, length)
                labels[b] += [next(masks, IGNORE_INDEX) if isinstance(part, Mask) else IGNORE_INDEX] * length
    return ids, labels, anchors


def _add_layout(
    batch: RenderedBatch, template: Pattern, values: dict[str, list[Ids]], total: int, left: bool
) -> Tensor:
    """Give a batch of ids its slots, mask and token types, (B, S); returns which columns are not padding."""
    pieces, size = pieces_of(template), batch["input_ids"].shape[0]
    lengths = torch.tensor([piece.length for piece in pieces], device="cpu").expand(size, -1).clone()
    from_prompt = torch.tensor([isinstance(piece.part, Prompt) for piece in pieces], device="cpu")
    for index, piece in enumerate(pieces):
        if isinstance(piece.part, Field):
            lengths[:, index] = torch.tensor([len(ids) for ids in values[piece.part.name]], device="cpu")
    of_tokens = lengths * ~from_prompt
    padding = total - lengths.sum(1, keepdim=True)
    tokens = of_tokens.cumsum(1) - of_tokens + padding * left
    firsts = torch.where(from_prompt, torch.tensor([~(piece.row or 0) for piece in pieces], device="cpu"), tokens)
    filler = 0 if left else total - template.num_prompt_rows - 1  # a padding token
    slots, real, of_column = lay_out(lengths, firsts, torch.where(from_prompt, -1, 1), total, left, filler)
    batch.update(attention_mask=real.long(), slots=slots)
    if template.specials is not None and template.specials.types is not None:
        types = torch.tensor([piece.token_type for piece in pieces], device="cpu")
        batch["token_type_ids"] = types[of_column] * real
    return real


def _padded(rows: Sequence[Ids], length: int, fill: int, left: bool) -> Tensor:
    """(B, length) int64."""
    filled = [[fill] * (length - len(row)) + row if left else row + [fill] * (length - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device="cpu").view(len(rows), length)
