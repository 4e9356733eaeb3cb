"""Batches without slots, put into an adapter's template.

The table of an adapter with a template holds its prompt rows, and behind them the embeddings of the template's constant
tokens (anchors, the mask token, special tokens): a batch's own tokens stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base import check
from ..base.facts import BaseFacts
from .batch import Batch, Placed
from .layout import IGNORE_INDEX, Layout
from .padding import count_padding
from .parts import Field, Mask, Pattern
from .pieces import Piece, check_names, lay_out, pieces_of, table_ids
from .prompt import Prompt
from .tokenizer import Specials


@dataclass(frozen=True)
class _Plan:
    """Tensors (K,) on a device that say how pieces follow from a batch, and per row of the table.

    length, first: of a piece whose text has no tokens. by_text: whether the text's length is added to `length`.
    by_end: whether it is added to `first`. field: the piece's text, by number. steps: see `lay_out`.
    token_types: of the pieces. labels: (M,) the mask tokens' slots.
    """

    length: Tensor
    first: Tensor
    by_text: Tensor
    by_end: Tensor
    is_token: Tensor
    field: Tensor
    steps: Tensor
    token_types: Tensor
    labels: Tensor


@functools.lru_cache(maxsize=64)
def _plan(template: Pattern, whole: bool, device: torch.device) -> _Plan:
    """whole: the only text comes with its special tokens around it. Made once: a copy to a device waits for it."""
    pieces = list(pieces_of(template))
    specials = template.specials or Specials()
    before, after = len(specials.before), len(specials.after)
    if whole:
        types = specials.types_of_parts
        own = [[Piece(None, 1, token_type=kind) for kind in end] for end in (types[0], types[4])]
        pieces = [*own[0], *(piece for piece in pieces if piece.part is not None), *own[1]]
    rows = []  # per piece, in the order of _Plan's fields
    for index, piece in enumerate(pieces):
        is_token, field, by_end = piece.row is None, 0, False
        if piece.row is not None:
            first = ~piece.row
        elif isinstance(piece.part, Field):
            first, field = before if whole else 0, template.fields.index(piece.part.name)
        else:  # a special token of the batch's own: counted from the text's beginning, or from its end
            by_end = index >= before
            first = before + index - (len(pieces) - after) if by_end else index
        by_text, step = isinstance(piece.part, Field), 1 if is_token else -1
        rows.append((piece.length, first, by_text, by_end, is_token, field, step, piece.token_type))
    with torch.inference_mode(False):  # it may be used in training later
        columns = torch.tensor(rows, dtype=torch.int64, device=device).T.contiguous()
        masks = [first for (_, first, *_), piece in zip(rows, pieces) if isinstance(piece.part, Mask)]
        tensors = [*columns, torch.tensor(masks, dtype=torch.int64, device=device)]
    return _Plan(*tensors)


def put_into_template(prompt: Prompt, facts: BaseFacts, batch: Batch, fields: Mapping[str, Any] | None) -> Placed:
    """A batch of ids (or embeddings) without slots in an adapter's template.

    batch: (B, T) ids with their special tokens, for a template with one field; or none, with
    fields: per field (B, T) ids without special tokens, or a pair of those and their mask.

    Returns:
        The slots, and the fields of the output, (B, S), which are still to be turned and counted: see `place`.

    Raises:
        ValueError: what is given does not fit the template.
    """
    template = prompt.pattern
    assert template is not None
    if batch.position_ids is not None:
        raise ValueError(
            "position_ids: expected None with a template, which counts them; slots take position_ids of the output"
        )
    if fields is None:
        if len(template.fields) != 1:
            raise ValueError(
                f"input_ids: the template {str(template)!r} has the fields {template.fields}; pass fields={{...}} with "
                "ids for each, or a batch of template.render(...)"
            )
        starts, counts = _bounds(batch.tokens, batch.attention_mask)
    else:
        batch, starts, counts = _join_fields(template, batch, fields)
    plan = _plan(template, fields is None, batch.tokens.device)
    constants = len(table_ids(template))
    columns = batch.shape[1] + template.num_prompt_rows + constants
    if fields is None and template.specials is not None:  # the batch has its own
        own = len(template.specials.before) + len(template.specials.after)
        if batch.shape[1] < own:
            raise ValueError(f"input_ids: expected a text with its {own} special tokens, got {batch.shape[1]} tokens")
        counts, columns = (counts - own).clamp(min=0), columns - own
    starts, counts = starts[:, plan.field], counts[:, plan.field]
    lengths = plan.length + plan.by_text * counts
    firsts = plan.first + plan.is_token * starts + plan.by_end * counts
    mask = batch.attention_mask
    at_left: bool | Tensor = mask is not None and mask[:, :1] == 0
    slots, real, piece = lay_out(lengths, firsts, plan.steps, columns, at_left, -1)
    layout = Layout(template.num_prompt_rows + constants, slots)
    return Placed(layout, _carried(template, facts, batch, plan, slots, real, piece))


def _bounds(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each row's tokens begin, and how many they are, (B, 1) each."""
    size, length = tokens.shape[:2]
    if mask is None:
        zeros = torch.zeros(size, 1, dtype=torch.int64, device=tokens.device)
        return zeros, zeros + length
    check.shape("attention_mask", mask, "(B, T)", (size, length))
    left, right = count_padding(mask)
    return left.unsqueeze(1), (length - left - right).unsqueeze(1)


def _join_fields(template: Pattern, batch: Batch, fields: Mapping[str, Any]) -> tuple[Batch, Tensor, Tensor]:
    """Put the fields' ids into one batch; returns where each begins and how long it is, (B, F), too."""
    if batch.input_ids is not None or batch.inputs_embeds is not None or batch.attention_mask is not None:
        raise ValueError("fields: expected no input_ids, inputs_embeds or attention_mask beside them")
    check_names(template, fields)
    pairs = [value if isinstance(value, tuple) else (value, None) for value in (fields[n] for n in template.fields)]
    starts, counts, masks, offset = [], [], [], 0
    for (ids, mask), name in zip(pairs, template.fields):
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != pairs[0][0].shape[0]:
            raise ValueError(f"fields: field '{name}': expected ids of shape (B, T), the same B in all")
        start, count = _bounds(ids, mask)
        starts.append(start + offset)
        counts.append(count)
        masks.append(torch.ones_like(ids) if mask is None else mask)
        offset += ids.shape[1]
    mask, labels = (torch.cat(masks, 1) if any(mask is not None for _, mask in pairs) else None), batch.labels
    if isinstance(labels, Mapping):
        check_names(template, labels, "labels")
        missing = (torch.full_like(ids, IGNORE_INDEX) for ids, _ in pairs)
        labels = torch.cat([labels.get(name, blank) for name, blank in zip(template.fields, missing)], 1)
    joined = replace(batch, input_ids=torch.cat([ids for ids, _ in pairs], 1), attention_mask=mask, labels=labels)
    return joined, torch.cat(starts, 1), torch.cat(counts, 1)


def _carried(
    template: Pattern, facts: BaseFacts, batch: Batch, plan: _Plan, slots: Tensor, real: Tensor, piece: Tensor
) -> Batch:
    """Mask, labels and token types (B, T) of a batch's tokens as those of the output, (B, S)."""
    from_table, token = slots < 0, slots.clamp(min=0)  # padding counts as of the table

    def carried(values: Tensor | None, at_table: Tensor | int) -> Tensor | None:
        if values is None:
            return None
        own = at_table.to(values.dtype) if isinstance(at_table, Tensor) else at_table
        return torch.where(from_table, own, values.gather(1, token))

    labels, types, specials = batch.labels, batch.token_type_ids, template.specials
    if labels is not None:
        own = labels.shape == batch.shape
        labels = carried(labels, IGNORE_INDEX) if own else _labels_of_masks(template, batch, plan, slots)
    if types is not None:
        types = carried(types, plan.token_types[piece])
    elif facts.takes_token_type_ids and specials is not None and any(specials.types or ()):
        types = plan.token_types[piece]
    mask, codes = carried(batch.attention_mask, real), carried(batch.input_type_mask, 0)
    return replace(batch, attention_mask=mask, labels=labels, input_type_mask=codes, token_type_ids=types)


def _labels_of_masks(template: Pattern, batch: Batch, plan: _Plan, slots: Tensor) -> Tensor:
    """Labels of the mask tokens, (B,) or (B, M), as labels of the output."""
    labels, size, masks = batch.labels, batch.shape[0], template.num_masks
    if not masks or tuple(labels.shape) not in ((size, masks), (size,) if masks == 1 else (size, masks)):
        of_masks = f", or ({size}, {masks}) for the mask tokens" if masks else ""
        raise ValueError(f"labels: expected shape (B, T) = {batch.shape}{of_masks}, got {tuple(labels.shape)}")
    at_mask = slots.unsqueeze(2) == plan.labels
    return torch.where(at_mask, labels.view(size, 1, masks), IGNORE_INDEX).amax(2)


def without_prefix_slots(batch: Batch, slots: Tensor, num_prompt_rows: int) -> Batch | None:
    """A batch without slots, if these say what a model does without them, so that routes can share its prompt; or None.

    Only where values can be looked at, on a CPU.
    """
    size, length = batch.shape
    if slots.device.type != "cpu" or torch.compiler.is_compiling() or batch.position_ids is not None:
        return None
    prefix = torch.cat((torch.arange(-1, -num_prompt_rows - 1, -1, device="cpu"), torch.arange(length, device="cpu")))
    if slots.shape != (size, prefix.shape[0]) or not bool((slots == prefix).all()):
        return None
    text = {}
    for name, fill in (("attention_mask", 1), ("labels", IGNORE_INDEX), ("token_type_ids", 0), ("input_type_mask", 0)):
        field = getattr(batch, name)
        if field is None or (name == "labels" and field.dim() != 2):
            continue
        if field.shape != slots.shape or not bool((field[:, :num_prompt_rows] == fill).all()):
            return None
        text[name] = field[:, num_prompt_rows:]
    return replace(batch, **text)
