"""What every prompt module shares: a table of embeddings, and one encoding of all its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import check
from ..base.facts import device_of
from .config import PromptLearningConfig


def check_needed(module: nn.Module, config: PromptLearningConfig, *fields: str) -> None:
    """Refuse a configuration that does not say what a module is made of."""
    for field in fields:
        if getattr(config, field) is None:
            raise ValueError(f"{field}: expected a positive int to build {type(module).__name__}, got None")


class PromptModule(nn.Module):
    """A prompt of R rows. `embedding.weight` is (R, D) fp32; R = num_virtual_tokens * num_transformer_submodules.

    Attributes:
        product_width: of what `encode` gives, (R, product_width): D for rows of input embeddings.
    """

    def __init__(self, config: PromptLearningConfig) -> None:
        super().__init__()
        check_needed(self, config, "num_virtual_tokens", "token_dim")
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        self.total_virtual_tokens = config.num_virtual_tokens * config._submodules
        self.token_dim = self.product_width = config.token_dim
        # The final rows are all there is: nothing to encode, nothing to train.
        self.inference_mode = config.inference_mode
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)

    def encode(self) -> Tensor:
        """The prompt rows, (R, D). In inference mode these are the embedding's own."""
        return self.embedding.weight

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Prompt rows for `indices` (B, P) in [0, R), as (B, P, D); PEFT's `PromptEncoder.forward`.

        The table is encoded once, whatever the batch, so the result does not depend on the rest of the batch. Without
        indices this is `encode()`, with the module's hooks (FSDP gathers parameters in one).
        """
        if indices is None:
            return self.encode()
        check.tensor("indices", indices, "(B, P)", 2)
        check.token_ids("indices", indices)
        return F.embedding(indices, self.encode())

    def check_product(self, product: Tensor) -> None:
        """Refuse all but what this module makes, by its shape."""
        check.shape("prompt_embeddings", product, "(R, width)", (self.total_virtual_tokens, self.product_width))

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take the product (R, width) itself, as files have it, for the table; PEFT's method of this name.

        Raises:
            ValueError: it has another shape; or the module makes its product of something else.
        """
        self.check_product(prompt_embeddings)
        with torch.no_grad():
            self.embedding.weight.copy_(prompt_embeddings)

    def copy_words(self, word_embeddings: nn.Module, ids: Sequence[int] | Tensor) -> None:
        """Replace the table by the fp32 word embeddings of `ids` (R,), as the base model itself looks them up."""
        device = device_of(word_embeddings)
        with torch.no_grad():
            rows = word_embeddings(torch.as_tensor(ids, dtype=torch.int64, device=device)).detach()
        if rows.shape[-1] != self.token_dim:
            raise ValueError(f"token_dim: expected the word embeddings' width, {rows.shape[-1]}, got {self.token_dim}")
        self.embedding.weight = nn.Parameter(rows.to(torch.float32, copy=True))
