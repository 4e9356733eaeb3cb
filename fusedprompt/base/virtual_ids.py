"""Prompt rows as token ids behind the vocabulary, for base models that read ids wherever they read embeddings.

BART's classifiers look for the end-of-text id, and give their decoder the ids moved by one; CPM-Ant's forward has no
argument for embeddings. Row r of a prompt is id V + r to them, and their word embedding answers it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .own_forward import own_forward, replaced_forwards


def needs_ids(base: Any) -> bool:
    """Whether a base model refuses embeddings in place of ids: it has no such argument, or its code says so."""
    forward = inspect.unwrap(type(base).forward)
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        return True
    said = (text for text in forward.__code__.co_consts if isinstance(text, str))
    return any("Passing input embeddings is currently not supported for" in text for text in said)


@contextlib.contextmanager
def answered(embedding: nn.Module, rows: Tensor, size: int) -> Iterator[None]:
    """Within the block an embedding of `size` tokens gives rows (R, D) for the ids from `size` on."""
    own = own_forward(embedding)

    def look_up(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = ids.long() - size
        is_virtual = row >= 0
        embedded: Tensor = own(ids.masked_fill(is_virtual, 0), *args, **kwargs)
        if not rows.shape[0]:
            return embedded
        # F.embedding's backward adds in a fixed order.
        of_rows = F.embedding(row.clamp(0, rows.shape[0] - 1), rows.to(embedded.dtype))
        return torch.where(is_virtual.unsqueeze(-1), of_rows, embedded)

    with replaced_forwards({embedding: look_up}):
        yield
