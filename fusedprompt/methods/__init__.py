"""Prompt-learning methods: one file a method. Importing this package registers them."""

from .cpt import CPTConfig, CPTEmbedding
from .method import Method, Targets, find_method, method_of, register_method
from .module import PromptModule
from .p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from .prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit

__all__ = [
    "CPTConfig",
    "CPTEmbedding",
    "Method",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptModule",
    "PromptTuningConfig",
    "PromptTuningInit",
    "Targets",
    "find_method",
    "method_of",
    "register_method",
]
