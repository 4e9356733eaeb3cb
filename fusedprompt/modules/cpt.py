"""Context-aware prompt tuning's embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import CPTConfig, as_config
from ._base import PromptModule

_FROZEN_EPSILON = 1e-10  # PEFT's bound for rows that must not move


class CPTEmbedding(PromptModule):
    """The embeddings of a context plus a learned, bounded change (arXiv 2410.17222); PEFT class `CPTEmbedding`.

    Attributes:
        embedding: `nn.Embedding` (P, D) fp32, frozen: the word embeddings of `cpt_token_ids`.
        delta_embedding: `nn.Embedding` (P, D) fp32, trained, zeros at first.

    Args:
        config: `CPTConfig` with `token_dim`.
        word_embeddings: the base model's input embedding.
    """

    token_types: Tensor

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        config = as_config(config)
        if not isinstance(config, CPTConfig):
            raise TypeError(f"config: expected a CPTConfig, got {type(config).__name__}")
        super().__init__(config)
        self.config = config
        assert config.cpt_token_ids is not None and config.cpt_tokens_type_mask is not None
        if not config.inference_mode:
            self.copy_words(word_embeddings, config.cpt_token_ids)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        self.register_buffer("token_types", torch.tensor(config.cpt_tokens_type_mask), persistent=False)
        scale = math.sqrt(self.token_dim / 2048)
        assert config.opt_projection_epsilon is not None and config.opt_projection_format_epsilon is not None
        self._input_epsilon = config.opt_projection_epsilon * scale
        self._format_epsilon = config.opt_projection_format_epsilon * scale

    def get_epsilon(self) -> Tensor:
        """The largest norm of each row's change, (P,) fp32."""
        kind = self.token_types % 4
        epsilon = torch.where(kind == 2, self._input_epsilon, _FROZEN_EPSILON)
        return torch.where((kind == 1) | (kind == 3), self._format_epsilon, epsilon).float()

    def encode(self) -> Tensor:
        """The prompt rows (P, D): context embeddings plus the projected change.

        Where a gradient may follow, the projection is also written back to `delta_embedding`, in place, so that the
        optimizer continues from it as in PEFT.
        """
        if self.inference_mode:
            return self.embedding.weight
        delta = self.delta_embedding.weight
        rows, projected = ops.cpt(self.embedding.weight, delta, self.get_epsilon(), self.token_types % 4 != 0)
        if torch.is_grad_enabled() and delta.requires_grad:
            with torch.no_grad():
                delta.copy_(projected)
        return rows
