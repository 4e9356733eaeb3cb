"""The loss of a language model on the shared route, and whether its logits can be left until somebody reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lm_head import Withheld
from .loss import summed_cross_entropy
from .sharing import transformers_model

if TYPE_CHECKING:
    from .model import PromptModel


def may_wait(model: PromptModel, labels: Tensor | None) -> bool:
    """Whether logits can be left until they are read: the shared prompt's, and the text's if their head can wait too.

    Nobody does who trains with the output's own loss, and the head's forward and backward over the virtual tokens took
    75 of 1094 ms of a step (B=4, P=200, T=210, V=32000). The base model must not change in the meantime, so it must be
    frozen; and one process of several that repeats a pass alone would wait for the others.
    """
    if labels is None or model.text_head.read or torch.compiler.is_compiling():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return has_transformers_loss(model) and not any(p.requires_grad for p in model.base_model.parameters())


def has_transformers_loss(model: PromptModel) -> bool:
    """Whether the base model's loss is transformers' cross entropy of next tokens."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    base = transformers_model(model.base_model)
    return base is not None and base.loss_function is ForCausalLMLoss


def summed_loss(logits: Tensor, head: Withheld | None, following: Tensor) -> Tensor:
    """Sum of the cross entropies of logits (B, T, V), or of those that `head` would make, with labels (B, T)."""
    if head is not None:
        return head.summed_loss(following)
    return summed_cross_entropy(logits.view(-1, logits.shape[-1]), following.flatten())
