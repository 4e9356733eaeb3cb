"""Prompt tuning's table of embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..config import PromptTuningConfig, PromptTuningInit, as_config
from ._base import PromptModule


class PromptEmbedding(PromptModule):
    """A table of prompt rows, trained directly (arXiv 2104.08691); PEFT class `PromptEmbedding`.

    Attributes:
        embedding: `nn.Embedding` (R, D) fp32: N(0, 1) for RANDOM, word embeddings for SAMPLE_VOCAB (drawn with
            replacement from the CPU generator) and TEXT (the text's ids with the tokenizer's special tokens, repeated
            or cut to R). In inference mode the table waits to be loaded.

    Args:
        config: `PromptTuningConfig` with `token_dim` and `num_virtual_tokens`.
        word_embeddings: the base model's input embedding.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        config = as_config(config)
        if not isinstance(config, PromptTuningConfig):
            raise TypeError(f"config: expected a PromptTuningConfig, got {type(config).__name__}")
        super().__init__(config)
        if config.inference_mode:
            return
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            vocabulary: int = word_embeddings.num_embeddings  # type: ignore[assignment]
            self.copy_words(word_embeddings, torch.randint(0, vocabulary, (self.total_virtual_tokens,)))
        elif config.prompt_tuning_init is PromptTuningInit.TEXT:
            ids = _tokenize(config)
            repeats = math.ceil(self.total_virtual_tokens / len(ids))
            self.copy_words(word_embeddings, (ids * repeats)[: self.total_virtual_tokens])


def _tokenize(config: PromptTuningConfig) -> list[int]:
    from transformers import AutoTokenizer

    # A checkpoint's configuration must not be able to run code.
    kwargs = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **kwargs)
    ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(
            f"prompt_tuning_init_text: expected text with at least one token, got {config.prompt_tuning_init_text!r}"
        )
    return ids
