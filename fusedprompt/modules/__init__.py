"""The modules that own a prompt's parameters, under PEFT's names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import CPTConfig, PromptEncoderConfig, PromptLearningConfig, PromptTuningConfig
from ._base import PromptModule
from .cpt import CPTEmbedding
from .prompt_embedding import PromptEmbedding
from .prompt_encoder import PromptEncoder


def build(config: PromptLearningConfig, word_embeddings: nn.Module) -> PromptModule:
    """The module for a resolved configuration."""
    constructors: dict[type[PromptLearningConfig], Any] = {
        PromptEncoderConfig: lambda: PromptEncoder(config),
        PromptTuningConfig: lambda: PromptEmbedding(config, word_embeddings),
        CPTConfig: lambda: CPTEmbedding(config, word_embeddings),
    }
    module: PromptModule = constructors[type(config)]()
    return module


__all__ = ["CPTEmbedding", "PromptEmbedding", "PromptEncoder", "PromptModule", "build"]
