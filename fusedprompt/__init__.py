"""fusedprompt: fused kernels for soft prompts (P-tuning, prompt tuning, CPT) on Hugging Face transformers.

Importing this package needs torch alone.
"""

from __future__ import annotations

from . import ops
from ._version import __version__
from .config import (
    CPTConfig,
    PeftType,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from .layout import Layout
from .model import PromptModel, get_prompt_model
from .modules import CPTEmbedding, PromptEmbedding, PromptEncoder
from .ops import BackendUnavailable, explain, use_backend

__all__ = [
    "BackendUnavailable",
    "CPTConfig",
    "CPTEmbedding",
    "Layout",
    "PeftType",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptModel",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "__version__",
    "explain",
    "get_prompt_model",
    "ops",
    "use_backend",
]
