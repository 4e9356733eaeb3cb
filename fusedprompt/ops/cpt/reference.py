"""CPT in plain PyTorch, without PEFT's boolean indexing and loops over rows, each of which waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layouts.layout import IGNORE_INDEX
from ._op import register


def _cpt(embedding: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor) -> tuple[Tensor, Tensor]:
    wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=1)
    scale = torch.where(norm > epsilon, epsilon / norm, 1.0)
    projected = (wide * scale.unsqueeze(1)).to(delta.dtype)
    return embedding + projected, projected


def _cpt_fake(embedding: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(embedding), torch.empty_like(delta)


def _cpt_backward(d_rows: Tensor, trainable: Tensor) -> Tensor:
    return torch.where(trainable.unsqueeze(1), d_rows, 0)


cpt = register("", _cpt, _cpt_fake, _cpt_backward)


def is_label(token_types: Tensor) -> Tensor:
    """Which type codes mark labels."""
    return (token_types > 0) & (token_types % 4 == 0)


def weighted_loss(logits: Tensor, labels: Tensor, token_types: Tensor, decay: float) -> Tensor:
    targets = labels[:, 1:].to(logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(wide), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets.shape)
    if decay != 1.0:
        losses = losses * label_weights(token_types[:, 1:].to(logits.device), decay, wide)
    return losses.sum() / (targets != IGNORE_INDEX).sum().clamp(min=1)


def label_weights(token_types: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
    """What each label of rows of type codes (B, S) weighs; 1 at other codes."""
    return torch.full((), decay, dtype=dtype, device=token_types.device) ** _example_rank(token_types)


def _example_rank(token_types: Tensor) -> Tensor:
    """For each label code of a row, how many different higher label codes the row holds; 0 at other codes."""
    codes = torch.where(is_label(token_types), token_types, 0)
    ordered, order = codes.sort(dim=1, descending=True)
    steps = F.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0)).cumsum(1)
    return torch.where(codes > 0, torch.empty_like(steps).scatter_(1, order, steps), 0)
