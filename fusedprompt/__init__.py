"""fusedprompt: fused kernels for soft prompts (P-tuning, prompt tuning, CPT) on Hugging Face transformers.

Names are imported when they are first used, so that `python -m fusedprompt doctor` can report on an installation whose
torch does not import. Importing the package, and all of it but models, needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops
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
    from .integrations.peft import apply
    from .layout import Layout
    from .model import PromptModel, get_prompt_model
    from .modules import CPTEmbedding, PromptEmbedding, PromptEncoder
    from .ops import BackendUnavailable, explain, use_backend
    from .packing import PackingCollator, pack
    from .rendering import TemplateCollator
    from .template import Template

_MODULE_OF = {
    "BackendUnavailable": "ops",
    "CPTConfig": "config",
    "CPTEmbedding": "modules",
    "Layout": "layout",
    "PackingCollator": "packing",
    "PeftType": "config",
    "PromptEmbedding": "modules",
    "PromptEncoder": "modules",
    "PromptEncoderConfig": "config",
    "PromptEncoderReparameterizationType": "config",
    "PromptLearningConfig": "config",
    "PromptModel": "model",
    "PromptTuningConfig": "config",
    "PromptTuningInit": "config",
    "TaskType": "config",
    "Template": "template",
    "TemplateCollator": "rendering",
    "apply": "integrations.peft",
    "explain": "ops",
    "get_prompt_model": "model",
    "pack": "packing",
    "use_backend": "ops",
}

__all__ = [
    "BackendUnavailable",
    "CPTConfig",
    "CPTEmbedding",
    "Layout",
    "PackingCollator",
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
    "Template",
    "TemplateCollator",
    "__version__",
    "apply",
    "explain",
    "get_prompt_model",
    "ops",
    "pack",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
