"""fusedprompt: fused kernels for soft prompts, of rows or of keys and values, on Hugging Face transformers.

Names are imported when they are first used, so that `python -m fusedprompt doctor` can report on an installation whose
torch does not import. Importing the package, and all of it but models, needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import ops as ops
    from .bank.bank import PromptBank as PromptBank
    from .base.tasks import TaskType as TaskType
    from .integrations.callback import FusedPromptCallback as FusedPromptCallback
    from .integrations.peft import apply as apply
    from .layouts.collator import TemplateCollator as TemplateCollator
    from .layouts.layout import Layout as Layout
    from .layouts.shared_text import find_shared_prefix as find_shared_prefix
    from .layouts.shared_text import split_shared_prefix as split_shared_prefix
    from .layouts.template import Template as Template
    from .methods.cartridge import CartridgeConfig as CartridgeConfig
    from .methods.cartridge import CartridgeEncoder as CartridgeEncoder
    from .methods.config import PeftType as PeftType
    from .methods.config import PromptLearningConfig as PromptLearningConfig
    from .methods.cpt import CPTConfig as CPTConfig
    from .methods.cpt import CPTEmbedding as CPTEmbedding
    from .methods.cpt_template import CPTTemplate as CPTTemplate
    from .methods.multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from .methods.multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from .methods.multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from .methods.p_tuning import PromptEncoder as PromptEncoder
    from .methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .methods.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .methods.prefix_tuning import PrefixEncoder as PrefixEncoder
    from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompt_tuning import PromptEmbedding as PromptEmbedding
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .model.prompt_model import PromptModel as PromptModel
    from .model.prompt_model import get_prompt_model as get_prompt_model
    from .model.starting import compose_cartridge_adapters as compose_cartridge_adapters
    from .model.starting import initialize_kv_prefix_from_adapter as initialize_kv_prefix_from_adapter
    from .model.starting import initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values
    from .model.starting import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
    from .model.starting import prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values
    from .ops import BackendUnavailable as BackendUnavailable
    from .ops import explain as explain
    from .ops import use_backend as use_backend
    from .routes.choice import RouteUnavailable as RouteUnavailable
    from .routes.packing import PackingCollator as PackingCollator
    from .routes.packing import pack as pack

_NAMES_IN = {
    "bank.bank": ("PromptBank",),
    "base.tasks": ("TaskType",),
    "integrations.callback": ("FusedPromptCallback",),
    "integrations.peft": ("apply",),
    "layouts.collator": ("TemplateCollator",),
    "layouts.layout": ("Layout",),
    "layouts.shared_text": ("find_shared_prefix", "split_shared_prefix"),
    "layouts.template": ("Template",),
    "methods.cartridge": ("CartridgeConfig", "CartridgeEncoder"),
    "methods.config": ("PeftType", "PromptLearningConfig"),
    "methods.cpt": ("CPTConfig", "CPTEmbedding"),
    "methods.cpt_template": ("CPTTemplate",),
    "methods.multitask": ("MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"),
    "methods.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "methods.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "methods.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "model.prompt_model": ("PromptModel", "get_prompt_model"),
    "model.starting": (
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_adapter",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "ops": ("BackendUnavailable", "explain", "use_backend"),
    "routes.choice": ("RouteUnavailable",),
    "routes.packing": ("PackingCollator", "pack"),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

if not TYPE_CHECKING:  # type checkers read the imports above, where `import x as x` hands a name on
    __all__ = sorted(("__version__", "ops", *_MODULE_OF))


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return ["__version__", "ops", *_MODULE_OF]
