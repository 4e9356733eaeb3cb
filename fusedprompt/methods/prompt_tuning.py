"""Prompt tuning: a table of embeddings."""

from __future__ import annotations

import copy
import enum
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import PeftType, PromptLearningConfig, as_config, as_enum
from .method import Method, register_method
from .module import PromptModule


class PromptTuningInit(str, enum.Enum):
    """Where the first value of a prompt-tuning table comes from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (Lester et al., arXiv 2104.08691); PEFT class `PromptTuningConfig`.

    Args:
        prompt_tuning_init: RANDOM draws N(0, 1), SAMPLE_VOCAB copies random word embeddings, TEXT a text's.
        prompt_tuning_init_text: the text, for TEXT.
        tokenizer_name_or_path: the tokenizer to read it with, for TEXT.
        tokenizer_kwargs: arguments for `AutoTokenizer.from_pretrained`, only with TEXT; `trust_remote_code` is dropped.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    method: ClassVar[PeftType | str | None] = PeftType.PROMPT_TUNING
    inits: ClassVar[type[enum.Enum]] = PromptTuningInit

    def validate(self) -> None:
        super().validate()
        init: Any = as_enum(self.inits, "prompt_tuning_init", self.prompt_tuning_init)
        self.prompt_tuning_init = init
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            for field in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                value, rule = getattr(self, field), "a non-empty string with prompt_tuning_init='TEXT'"
                if not value:
                    raise ValueError(f"{field}: expected {rule}, got {value!r}")
        elif self.tokenizer_kwargs:
            raise ValueError(
                "tokenizer_kwargs: expected None unless prompt_tuning_init='TEXT', "
                f"got {self.tokenizer_kwargs!r} with {init.value!r}"
            )

    def blank(self) -> PromptTuningConfig:
        # Beginning from a text would ask for a tokenizer, and from a source for a file, that may be elsewhere.
        blank = copy.copy(self)
        blank.prompt_tuning_init = PromptTuningInit.RANDOM
        return blank


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
        config = as_config(config, PromptTuningConfig)
        super().__init__(config)
        if config.inference_mode:
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            vocabulary: int = word_embeddings.num_embeddings  # type: ignore[assignment]
            self.copy_words(word_embeddings, torch.randint(0, vocabulary, (self.total_virtual_tokens,)))
        elif config.prompt_tuning_init == PromptTuningInit.TEXT:
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


def _from_prompt(module: Any, prompt: Tensor) -> None:
    module.embedding.weight.copy_(prompt)


register_method(
    Method(PromptTuningConfig, PromptEmbedding, lambda module: (), saves_encoder=False, from_prompt=_from_prompt)
)
