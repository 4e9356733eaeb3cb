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
    from .base.tasks import TaskType
    from .integrations.peft import apply
    from .layouts.collator import TemplateCollator
    from .layouts.layout import Layout
    from .layouts.template import Template
    from .methods import (
        CPTConfig,
        CPTEmbedding,
        PromptEmbedding,
        PromptEncoder,
        PromptEncoderConfig,
        PromptEncoderReparameterizationType,
        PromptTuningConfig,
        PromptTuningInit,
    )
    from .methods.config import PeftType, PromptLearningConfig
    from .model.prompt_model import PromptModel, get_prompt_model
    from .ops import BackendUnavailable, explain, use_backend
    from .routes.choice import RouteUnavailable
    from .routes.packing import PackingCollator, pack

_MODULE_OF = {
    "BackendUnavailable": "ops",
    "CPTConfig": "methods",
    "CPTEmbedding": "methods",
    "Layout": "layouts.layout",
    "PackingCollator": "routes.packing",
    "PeftType": "methods.config",
    "PromptEmbedding": "methods",
    "PromptEncoder": "methods",
    "PromptEncoderConfig": "methods",
    "PromptEncoderReparameterizationType": "methods",
    "PromptLearningConfig": "methods.config",
    "PromptModel": "model.prompt_model",
    "PromptTuningConfig": "methods",
    "PromptTuningInit": "methods",
    "RouteUnavailable": "routes.choice",
    "TaskType": "base.tasks",
    "Template": "layouts.template",
    "TemplateCollator": "layouts.collator",
    "apply": "integrations.peft",
    "explain": "ops",
    "get_prompt_model": "model.prompt_model",
    "pack": "routes.packing",
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
    "RouteUnavailable",
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
