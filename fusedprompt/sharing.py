"""Whether a batch may take the shared route, and whether that pays.

The route is exact where virtual token p's hidden states depend on virtual tokens 0 ... p alone, and can reach the text
only through a key/value cache that holds all of them. Every objection here is a clause that completes "route 'shared'
cannot run: ...".
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .base_model import BaseFacts
from .config import TaskType
from .ops._backend import AUTO, BackendUnavailable

if TYPE_CHECKING:
    from .model import PromptModel
    from .tasks import Batch

SHARED, SPLICE = "shared", "splice"
ROUTES = (AUTO, SHARED, SPLICE)
# Arguments of a forward call that mean the same on both routes.
_UNDERSTOOD = ("use_cache", "return_dict", "output_hidden_states", "num_items_in_batch", "input_type_mask")


@dataclass(frozen=True)
class SharingFacts:
    """What decides about the route once and for all: properties of the base model's class and configuration.

    objection: why no prompt of this base model can be shared, or None.
    window: the fewest positions that a layer attends to, or None; longer sequences are not shared.
    takes_logits_to_keep: the base model can leave out logits.
    """

    objection: str | None
    window: int | None = None
    takes_logits_to_keep: bool = False

    @classmethod
    def of(cls, base: nn.Module, facts: BaseFacts) -> SharingFacts:
        """Look at a transformers model."""
        if facts.encoder_decoder or not facts.causal:
            return cls("the base model's attention looks to the right too, so that virtual tokens depend on the text")
        decoder = transformers_model(base)
        if decoder is None:
            return cls(f"{type(base).__name__} is no model of transformers, and nothing is known about its cache")
        parameters = inspect.signature(decoder.forward).parameters
        if not {"past_key_values", "inputs_embeds", "use_cache"} <= parameters.keys():
            return cls(f"{type(decoder).__name__} takes no key/value cache")
        if decoder.config.get_text_config(decoder=True) is not decoder.config:
            return cls(f"{type(decoder).__name__} is multimodal, and its attention may depend on more than order")
        supports = getattr(decoder, "_supports_default_dynamic_cache", None)
        if getattr(decoder, "_is_stateful", False) or (supports is not None and not supports()):
            return cls(f"{type(decoder).__name__} keeps a state that is not a key/value cache")
        for module in decoder.modules():
            kinds = getattr(module, "rope_type", None)
            for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
                if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                    return cls(f"rotary embeddings of type '{kind}' depend on the length of the sequence")
            name, origin = type(module).__name__, type(module).__module__
            if origin.startswith("torch.ao.nn.quantized.dynamic") or name == "Linear8bitLt":
                return cls(f"a quantised {name} rounds its input by the values of the whole batch")
        return cls._of_cache(decoder, "logits_to_keep" in parameters)

    @classmethod
    def _of_cache(cls, decoder: Any, takes_logits_to_keep: bool) -> SharingFacts:
        from transformers.cache_utils import DynamicCache

        layers = DynamicCache(config=decoder.config).layers
        count = decoder.config.num_hidden_layers
        odd = [type(layer).__name__ for layer in layers if not keeps_all(layer)]
        if odd or len(layers) != count:
            found = f"a layer of kind {odd[0]}" if odd else f"{len(layers)} cached layers of {count}"
            return cls(f"the base model's cache has {found}, which does not hold every token's keys and values")
        windows = [layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")]
        return cls(None, min(windows, default=None), takes_logits_to_keep)


def transformers_model(base: nn.Module) -> Any:
    """The model whose code is transformers' own: `base`, or the one that it wraps (torch.compile, LoRA); else None."""
    for module in base.modules():
        own = any(parent.__module__.startswith("transformers.models.") for parent in type(module).__mro__)
        if own and hasattr(module, "config"):
            return module
    return None


def keeps_all(layer: Any) -> bool:
    """Whether a layer of a cache is a growing tensor of all keys (or of those in its window) and another of values."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)  # subclasses keep further states


def active_noise(module: nn.Module) -> str | None:
    """A dropout (or router noise) above 0 in a part that is in training mode: "attention_dropout = 0.1"; else None."""
    for name, part in module.named_modules():
        if not part.training:
            continue
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{name or 'dropout'} = {part.p}"
        # Some transformers models read their configuration as they run.
        for settings in (vars(part), vars(part.config) if "config" in vars(part) else {}):
            for key, value in settings.items():
                if type(value) is not float or value <= 0 or key.startswith(("classifier", "summary")):
                    continue
                if "drop" in key or "jitter" in key:
                    return f"{key} = {value}"
    return None


def why_not_model(model: PromptModel, *adapter_names: str) -> str | None:
    """An objection to sharing the prompts of adapters, whatever the batch, or None."""
    if model.sharing.objection is not None:
        return model.sharing.objection
    if not adapter_names:
        return "no row has a prompt"
    for name in adapter_names:
        task = TaskType(model.peft_config[name].task_type)
        if task not in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
            return f"it serves CAUSAL_LM and SEQ_CLS, and the adapter's task is {task.value}"
        if model.template_of(name) is not None:
            return "the adapter's template does not put the whole prompt in front"
        if model.prompt_start[name]:
            return f"the prompt stands behind {model.prompt_start[name]} tokens of text (prompt_start)"
    noise = active_noise(model.base_model)
    if noise is not None:
        return f"the base model is in training mode with {noise}, which would be the same in every row"
    for part in model.base_model.modules():
        if part.training and vars(part).get("gradient_checkpointing"):
            return "gradient checkpointing recomputes layers without a cache"
    config = model.base_model.config
    for name in ("output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            return f"config.{name} asks for values of every row's virtual tokens"
    return None


def why_not_batch(model: PromptModel, batch: Batch) -> str | None:
    """An objection to this batch with its adapters, or None."""
    objection = why_not_model(model, *batch.adapters(model))
    if objection is not None:
        return objection
    (size, length), others = batch.shape, batch.others
    if batch.layout is not None:
        return "the slots say where each prompt row goes, and it is not in front of all text"
    if not size or not length:
        return "the batch has no tokens"
    for name, value in others.items():
        if value is not None and value is not False and name not in _UNDERSTOOD:
            return f"{name} is an argument of the base model that would have to cover the virtual tokens"
    if batch.position_ids is not None and batch.attention_mask is None and others.get("use_cache") is False:
        return "position_ids without a mask and a cache may mean several texts in a row"
    return why_not_length(model, batch.prompt_length(model) + length)


def why_not_worth(model: PromptModel, batch: Batch, kept: bool) -> str | None:
    """What `cost_rule` says of a batch."""
    prompts = len(batch.adapters(model))
    return cost_rule(batch.prompt_length(model), *batch.shape, kept, batch.tokens.device.type, prompts)


def why_not_length(model: PromptModel, total: int) -> str | None:
    """An objection to `total` positions, of prompt and text, generated ones included, or None."""
    window = model.sharing.window
    if window is not None and total > window:
        return f"{total} positions do not fit into the base model's window of {window}"
    return None


def cost_rule(rows: int, size: int, length: int, kept: bool, device: str = "cpu", prompts: int = 1) -> str | None:
    """The cost rule: why `auto` leaves a batch (size, length) to splice, though sharing would be exact; or None.

    A pass of the prompt's own reads the base model's weights once more. On a CPU that costs as much as 20 to 28 tokens
    (6-layer Llama, D=512, CPU time of a training step: 1.04 of splice's where sharing saved 20 tokens, 0.93 where it
    saved 28). On a GPU it comes out at some 250 tokens by arithmetic: 2 bytes and 2 FLOP per weight and token, at 3.3
    TB/s and 800 TFLOP/s; that has not been measured. A forward pass that trains nothing has no pass of the prompt's
    own, but joined logits cost up to 7 % of it.

    kept: the prompt's keys and values are at hand, or will be for the next batch. prompts: how many there are.
    """
    spliced = size * (rows + length)
    saved = spliced - size * length - (0 if kept else prompts * rows)
    fewest, share = (16, 0.08) if kept else (64 if device == "cpu" else 256, 0.04)
    if saved < max(fewest, share * spliced):
        return f"sharing would save {saved} of {spliced} tokens, which is too few to pay"
    return None


def choose(requested: str, objection: str | None, not_worth: str | None) -> bool:
    """Whether the shared route runs.

    Raises:
        BackendUnavailable: it was asked for by name, and cannot.
    """
    if requested == SHARED and objection is not None:
        raise BackendUnavailable(f"route 'shared' cannot run: {objection}")
    return requested == SHARED or (requested == AUTO and objection is None and not_worth is None)


def checked_route(route: Any) -> str:
    """`route`, if it is one.

    Raises:
        ValueError: it is not.
    """
    if route not in ROUTES:
        raise ValueError(f"route: expected one of {ROUTES}, got {route!r}")
    return str(route)
