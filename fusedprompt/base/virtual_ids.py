"""Prompt rows as token ids behind the vocabulary, for base models that read ids wherever they read embeddings.

BART's classifiers look for the end-of-text id, and give their decoder the ids moved by one; CPM-Ant's forward has no
argument for embeddings. Row r of a prompt is id V + r to them, and their word embeddings answer it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .own_forward import Forward, own_forward, replaced_forwards


def needs_ids(base: Any) -> bool:
    """Whether a base model refuses embeddings in place of ids: it has no such argument, its code says so, or it makes
    its decoder's ids of its encoder's."""
    forward = inspect.unwrap(type(base).forward)
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        return True
    if getattr(base.config, "is_encoder_decoder", False) and not base.can_generate():
        return True
    said = (text for text in forward.__code__.co_consts if isinstance(text, str))
    return any("Passing input embeddings is currently not supported for" in text for text in said)


def vocabulary(embedding: Any) -> int:
    """V: the number of tokens that an embedding knows."""
    return int(embedding.weight.shape[0])


def check_known(ids: Tensor, embedding: nn.Module) -> None:
    """Refuse ids that are none of an embedding's tokens, and would be taken for a prompt's rows. Values are looked at
    on a CPU.

    Raises:
        IndexError: there is one.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(end) for end in torch.aminmax(ids))
    size = vocabulary(embedding)
    if low < 0 or high >= size:
        raise IndexError(f"input_ids: expected ids from 0 to {size - 1}, got {low if low < 0 else high}")


@contextlib.contextmanager
def answered(base: nn.Module, embedding: Any, rows: Tensor) -> Iterator[None]:
    """Within the block the embeddings of a base model's tokens, encoder's and decoder's, give rows (R, D) for the ids
    behind those that they know."""
    named = [(name, part) for name, part in base.named_modules() if isinstance(part, nn.Embedding)]
    parts = {part for name, part in named if "pos" not in name and part.weight.shape == embedding.weight.shape}
    with replaced_forwards({part: _look_up(part, rows) for part in {embedding, *parts}}):
        yield


def _look_up(part: nn.Module, rows: Tensor) -> Forward:
    own, size = own_forward(part), vocabulary(part)

    def look_up(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = ids.long() - size
        is_virtual = row >= 0
        embedded: Tensor = own(ids.masked_fill(is_virtual, 0), *args, **kwargs)
        if not rows.shape[0]:
            return embedded
        # F.embedding's backward adds in a fixed order.
        of_rows = F.embedding(row.clamp(0, rows.shape[0] - 1), rows.to(embedded.dtype))
        return torch.where(is_virtual.unsqueeze(-1), of_rows, embedded)

    return look_up
