"""Prefix tuning: keys and values of virtual tokens in every layer, in a table or projected from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import PeftType, PromptLearningConfig, as_config, check_count
from .method import CACHE, Method, Part, PeftEncoder, register_method
from .module import PromptModule, check_needed
from .p_tuning import run_mlp


@dataclass
class KeyValueConfig(PromptLearningConfig):
    """What methods share whose virtual tokens are keys and values, and no input embeddings.

    `token_dim` is the width of a token's keys in one layer, `num_attention_heads` the number of heads of keys.
    """

    def derive(self, base_config: Any) -> None:
        """PEFT's rule: the heads of keys where the base model says how many it has, else those of queries."""
        settings = base_config.to_dict() if hasattr(base_config, "to_dict") else vars(base_config)
        for field in ("num_layers", "token_dim", "num_attention_heads"):
            if getattr(self, field) is None:
                raise ValueError(
                    f"{field}: expected a positive int, because {type(base_config).__name__} does not tell it, got None"
                )
        if "num_key_value_heads" in settings:
            width, heads = _largest_head(settings)
            assert self.token_dim is not None and self.num_attention_heads is not None
            width = width or self.token_dim // self.num_attention_heads
            self.token_dim, self.num_attention_heads = width * heads, heads
        assert self.token_dim is not None and self.num_attention_heads is not None
        if self.token_dim % self.num_attention_heads:
            raise ValueError(
                f"token_dim: expected a multiple of num_attention_heads = {self.num_attention_heads}, "
                f"got {self.token_dim}"
            )


def _largest_head(settings: Mapping[str, Any]) -> tuple[int | None, int]:
    """Width, if it is told, and number of the heads of keys; of the layers that have the widest, where they differ."""
    width, heads = settings.get("head_dim"), settings["num_key_value_heads"]
    if settings.get("global_head_dim") is not None:
        return settings["global_head_dim"], settings.get("num_global_key_value_heads") or heads
    for layer in (settings.get("per_layer_config") or {}).values():
        if width is not None and layer.get("head_dim", width) > width:
            width, heads = layer["head_dim"], layer.get("num_key_value_heads", settings["num_key_value_heads"])
    return width, heads


class KeyValueModule(PromptModule):
    """Keys and values of N virtual tokens in each of L layers, as PEFT's files have them: (N, 2 L D) fp32.

    Seen as (N, 2 L, heads, D / heads), number 2 l is the keys of layer l, and number 2 l + 1 its values.
    """

    def __init__(self, config: PromptLearningConfig) -> None:
        nn.Module.__init__(self)  # what it owns differs from method to method
        check_needed(self, config, "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
        assert config.num_virtual_tokens and config.token_dim and config.num_layers
        self.total_virtual_tokens, self.token_dim = config.num_virtual_tokens, config.token_dim
        self.product_width = 2 * config.num_layers * config.token_dim
        self.inference_mode = config.inference_mode


@dataclass
class PrefixTuningConfig(KeyValueConfig):
    """Prefix tuning (Li and Liang, arXiv 2101.00190); PEFT class `PrefixTuningConfig`.

    Args:
        init_weights: None draws N(0, 1); "zero" begins with keys and values of 0.
        encoder_hidden_size: H, the width between the two layers of the projection; None takes `token_dim`.
        prefix_projection: keys and values are what two layers make of a table (N, D).
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    method: ClassVar[PeftType | str | None] = PeftType.PREFIX_TUNING

    def validate(self) -> None:
        super().validate()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights: expected None or 'zero', got {self.init_weights!r}")
        check_count("encoder_hidden_size", self.encoder_hidden_size)
        if not isinstance(self.prefix_projection, bool):
            raise TypeError(f"prefix_projection: expected a bool, got {self.prefix_projection!r}")

    def derive(self, base_config: Any) -> None:
        super().derive(base_config)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim


class PrefixEncoder(KeyValueModule):
    """Keys and values that are trained, with or without a projection; PEFT class `PrefixEncoder`.

    Attributes:
        embedding: `nn.Embedding` (N, 2 L D) fp32; with a projection (N, D).
        transform: with a projection, `nn.Sequential`: Linear (H, D), Tanh, Linear (2 L D, H).

    Args:
        config: `PrefixTuningConfig`, resolved.
        word_embeddings: the base model's input embedding, which is not read.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        config = as_config(config, PrefixTuningConfig)
        super().__init__(config)
        self.prefix_projection = config.prefix_projection and not config.inference_mode
        width = self.token_dim if self.prefix_projection else self.product_width
        self.embedding = nn.Embedding(self.total_virtual_tokens, width)
        if self.prefix_projection:
            hidden = config.encoder_hidden_size or self.token_dim
            self.transform = nn.Sequential(
                nn.Linear(self.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, self.product_width)
            )
        if config.init_weights == "zero":
            for weight in self.transform[2].parameters() if self.prefix_projection else (self.embedding.weight,):
                nn.init.zeros_(weight)

    def encode(self) -> Tensor:
        """Keys and values, (N, 2 L D)."""
        rows: Tensor = self.embedding.weight
        return _project(self.transform, rows) if self.prefix_projection else rows

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        if self.prefix_projection:
            raise ValueError(
                "prompt_embeddings: expected an adapter without prefix_projection, whose keys and values nothing can "
                "turn back into the projection's input"
            )
        super().load_prompt_embeddings(prompt_embeddings)


def _project(transform: nn.Sequential, rows: Tensor) -> Tensor:
    """(N, D) to (N, 2 L D)."""
    return run_mlp(transform, rows, activation="tanh")


def _parts(encoder: Any) -> Iterator[Part]:
    yield "transform", encoder.transform, nn.Sequential
    for index, layer in enumerate(encoder.transform):
        yield f"transform.{index}", layer, nn.Tanh if index % 2 else nn.Linear


def _run_peft(encoder: Any, indices: Tensor) -> Tensor:
    return _project(encoder.transform, encoder.embedding(indices)[0])


@torch.no_grad()
def _from_prompt(module: Any, prompt: Tensor) -> None:
    module.load_prompt_embeddings(prompt)


register_method(
    Method(
        PrefixTuningConfig,
        PrefixEncoder,
        ops=lambda module: ("mlp",) if "transform" in module._modules else (),
        product=CACHE,
        saves_encoder=lambda config: bool(config.prefix_projection),
        from_prompt=_from_prompt,
        peft=PeftEncoder("PrefixEncoder", _parts, _run_peft),
    )
)
