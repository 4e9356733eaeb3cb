"""Cartridges: a prefix of keys and values, of which the first tokens may stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import PeftType, as_config
from .method import CACHE, Method, register_method
from .prefix_tuning import KeyValueConfig, KeyValueModule


@dataclass
class CartridgeConfig(KeyValueConfig):
    """Cartridges (Eyuboglu et al., arXiv 2506.06266); PEFT class `CartridgeConfig`.

    Args:
        num_frozen_tokens: tokens at the start that are not trained. The first is where attention rests.
    """

    num_frozen_tokens: int = 1

    method: ClassVar[PeftType | str | None] = PeftType.CARTRIDGE

    def validate(self) -> None:
        super().validate()
        frozen, most = self.num_frozen_tokens, self.num_virtual_tokens
        if isinstance(frozen, bool) or not isinstance(frozen, int):
            raise TypeError(f"num_frozen_tokens: expected an int >= 0, got {frozen!r} of type {type(frozen).__name__}")
        if frozen < 0 or (most is not None and frozen > most):
            raise ValueError(f"num_frozen_tokens: expected 0 <= num_frozen_tokens <= {most or 'all'}, got {frozen}")


class CartridgeEncoder(KeyValueModule):
    """A key/value cache whose values are parameters; PEFT class `CartridgeEncoder`.

    Attributes:
        frozen_embedding: (F, 2 L D) fp32, never trained; None if F = num_frozen_tokens is 0.
        trainable_embedding: (N - F, 2 L D) fp32.

    Args:
        config: `CartridgeConfig`, resolved.
        word_embeddings: the base model's input embedding, which is not read.
    """

    frozen_embedding: nn.Parameter | None

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        config = as_config(config, CartridgeConfig)
        super().__init__(config)
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = self.total_virtual_tokens - self.num_frozen_tokens
        width = self.product_width
        frozen = nn.Parameter(torch.randn(self.num_frozen_tokens, width), False) if self.num_frozen_tokens else None
        self.register_parameter("frozen_embedding", frozen)
        self.trainable_embedding = nn.Parameter(torch.randn(self.num_trainable_tokens, width))
        self.trainable_embedding.requires_grad_(not self.inference_mode)

    @property
    def weight(self) -> Tensor:
        """All keys and values, (N, 2 L D)."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat((self.frozen_embedding, self.trainable_embedding))

    @property
    def embedding(self) -> CartridgeEncoder:  # type: ignore[override]
        """Itself: as in PEFT, `embedding.weight` is the whole."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> CartridgeEncoder:
        """The frozen tokens stay frozen."""
        self.trainable_embedding.requires_grad_(requires_grad)
        return self

    def encode(self) -> Tensor:
        """Keys and values, (N, 2 L D)."""
        return self.weight

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        self.check_product(prompt_embeddings)
        with torch.no_grad():
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(prompt_embeddings[: self.num_frozen_tokens])
            self.trainable_embedding.copy_(prompt_embeddings[self.num_frozen_tokens :])


def _from_prompt(module: Any, prompt: Tensor) -> None:
    module.load_prompt_embeddings(prompt)


register_method(
    Method(
        CartridgeConfig,
        CartridgeEncoder,
        ops=lambda module: (),
        product=CACHE,
        saves_encoder=False,
        from_prompt=_from_prompt,
    )
)
