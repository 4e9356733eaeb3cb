"""Text that every row of a batch begins with: found, taken out of a batch, and put beside a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import check

BEHIND, BEFORE = "behind", "before"
# Fields of a batch with an entry for each token.
_OF_TOKENS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "input_type_mask")


@dataclass(frozen=True, eq=False)
class SharedText:
    """ids: (K,) of tokens. before: they stand before the prompt, and not behind it."""

    ids: Tensor
    before: bool = False

    @classmethod
    def of(cls, ids: Any, place: str, device: torch.device) -> SharedText:
        """From the arguments of a call.

        Args:
            ids: (1, K) or (K,), K >= 1.
            place: "behind" the prompt or "before" it.

        Raises:
            TypeError, ValueError: they are not that.
        """
        if place not in (BEHIND, BEFORE):
            raise ValueError(f"shared_prefix_place: expected 'behind' or 'before' the prompt, got {place!r}")
        if not isinstance(ids, Tensor):
            raise TypeError(f"shared_prefix: expected a tensor (1, K) of ids, got {type(ids).__name__}")
        check.integral("shared_prefix", ids)
        flat = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
        if flat.dim() != 1 or not len(flat):
            raise ValueError(f"shared_prefix: expected shape (1, K) with K >= 1, got {tuple(ids.shape)}")
        return cls(flat.to(device), place == BEFORE)


def find_shared_prefix(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The longest text that all rows of a batch begin with.

    Args:
        input_ids: (B, T) ids.
        attention_mask: (B, T), 0 at padding on either side of a row; None for none.

    Returns:
        (1, K) ids, without padding. Each row has at least one token more, so that there is something to predict from:
        K may be 0.

    Raises:
        TypeError, ValueError: the shapes or dtypes are not these.
    """
    check.tensor("input_ids", input_ids, "(B, T)", 2)
    check.integral("input_ids", input_ids)
    size, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape (B, T) = {(size, length)}, got {tuple(attention_mask.shape)}")
    if not size or not length:
        return input_ids.new_empty(1, 0)
    real = attention_mask != 0
    first = real.int().argmax(1, keepdim=True)  # padding at the left
    columns = (torch.arange(length, device=input_ids.device) + first).clamp(max=length - 1)
    counts = real.sum(1)
    ids = input_ids.gather(1, columns)
    same = (ids == ids[:1]).all(0)
    most = max(int(counts.min()) - 1, 0)
    shared = int(same[:most].int().cumprod(0).sum())
    return ids[:1, :shared]


def split_shared_prefix(batch: Mapping[str, Any], shared_prefix: Tensor | None = None) -> dict[str, Any]:
    """A batch without the text that all its rows begin with, and that text as `shared_prefix`.

    Args:
        batch: `input_ids` (B, T), and fields of that shape (`attention_mask`, `labels`, ...), from which the same
            columns are taken; everything else stays.
        shared_prefix: (1, K), what rows begin with; None for the longest that they do.

    Returns:
        Arguments for a model. Labels of the shared text are dropped with it: it is context. Without any shared text
        the batch as it is.

    Raises:
        ValueError: a row does not begin with `shared_prefix`.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    shared = find_shared_prefix(ids, mask) if shared_prefix is None else shared_prefix
    count, (size, length) = shared.shape[-1], ids.shape
    if not count:
        return dict(batch)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    first = real.int().argmax(1, keepdim=True)
    column = torch.arange(length, device=ids.device).unsqueeze(0)
    taken = (column >= first) & (column < first + count)
    if shared_prefix is not None:
        begins = ids[taken].view(size, -1) if bool((taken.sum(1) == count).all()) else ids[:, :0]
        if begins.shape[1] != count or bool((begins != shared.view(1, -1).to(ids.device)).any()):
            raise ValueError(f"shared_prefix: expected what all {size} rows begin with, got {count} ids that are not")
    rest: dict[str, Any] = {}
    for name, field in batch.items():
        of_tokens = name in _OF_TOKENS and isinstance(field, Tensor) and field.shape == ids.shape
        rest[name] = field[~taken].view(size, length - count) if of_tokens else field
        if of_tokens and name == "position_ids":
            rest[name] -= count  # those of the text count from 0
    return {**rest, "shared_prefix": shared.view(1, -1)}


def put_beside(rows: Tensor, text: SharedText, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """(k, P + K, D): prompts' rows (k, P, D) and the embeddings of the text beside them.

    embed: (1, K) ids to (1, K, D).
    """
    shared = embed(text.ids.unsqueeze(0)).to(rows.dtype).expand(rows.shape[0], -1, -1)
    if not rows.shape[1]:  # no prompt: its width may be that of a prefix's keys
        return shared
    return torch.cat((shared, rows) if text.before else (rows, shared), 1)
