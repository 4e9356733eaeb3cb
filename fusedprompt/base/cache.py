"""A base model's key/value cache: whether it can hold a prompt for all rows, and how long one is."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from .facts import BaseFacts, local_windows, transformers_model


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
        count = getattr(decoder.config, "num_hidden_layers", None)
        if count is None:
            return cls(f"{type(decoder).__name__} does not say how many layers a cache of it has")
        layers = new_cache(decoder).layers
        found = _odd_layer(layers) or (None if len(layers) == count else f"{len(layers)} cached layers of {count}")
        if found is not None:
            return cls(f"the base model's cache has {found}, which does not hold every token's keys and values")
        return cls(None, shortest_window(decoder), "logits_to_keep" in parameters)


def shortest_window(base: nn.Module) -> int | None:
    """The fewest positions that a layer of a decoder attends to, or None."""
    windows = [layer.sliding_window for layer in new_cache(base).layers if hasattr(layer, "sliding_window")]
    # Those of `sliding_window` are the cache's, where they are in use; of others it knows nothing (GPT-Neo's).
    windows += [size for name, size in local_windows(transformers_model(base).config) if name != "sliding_window"]
    return min(windows, default=None)


def cache_taker(base: nn.Module) -> nn.Module | None:
    """The module whose forward takes a key/value cache: the model itself, or the stack under its head; or None."""
    model = transformers_model(base)
    for module in () if model is None else (model, model.base_model):
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return module  # type: ignore[no-any-return]
    return None


def why_no_prefix(base: nn.Module, facts: BaseFacts) -> str | None:
    """Why no text of a base model can be run behind keys and values that are given, or None."""
    model = transformers_model(base)
    if model is None:
        return f"{type(base).__name__} is no model of transformers, and nothing is known about its cache"
    if cache_taker(base) is None:
        return f"{type(model).__name__} takes no key/value cache"
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if facts.stateful or (facts.causal and supports is not None and not supports()):
        return f"{type(model).__name__} keeps a state that is not a key/value cache"
    if facts.causal and facts.needs_ids:  # CPM-Ant
        return f"{type(model).__name__} reads ids alone, and puts a prompt of its own in front of them"
    if getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None) is None:
        return f"{type(model).__name__} does not say how many layers a cache of it has"
    layers = [layer for layer in new_cache(model).layers if not reads_another(layer)]
    found = _odd_layer(layers) or (None if layers else "no number of layers")
    if found is not None:
        return f"its cache has {found}, which does not hold every token's keys and values"
    return None


def reads_another(layer: Any) -> bool:
    """Whether a layer of a cache is empty for good, because its attention reads an earlier layer's (Gemma 4)."""
    from transformers import cache_utils

    return isinstance(layer, getattr(cache_utils, "DummyLayer", ()))


def told_key_shapes(base: nn.Module) -> tuple[tuple[int, int], ...] | None:
    """(heads, width) of the keys and of the values of each layer, where a configuration says that layers differ in them
    (Gemma 4); or None."""
    config: Any = transformers_model(base).config.get_text_config(decoder=True)
    if not getattr(config, "is_heterogeneous", False):
        return None
    found = []
    for layer in config.per_layer_config:
        heads, width = getattr(layer, "num_key_value_heads", None), getattr(layer, "head_dim", None)
        if heads is None or width is None:
            return None
        found += [(int(heads), int(width))] * 2
    return tuple(found)


def new_cache(base: nn.Module) -> Any:
    """An empty cache, as transformers' decoders make for themselves."""
    from transformers.cache_utils import DynamicCache

    model = transformers_model(base)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):  # T5's tells the encoder's layers, and its decoder's its own
        config = getattr(model.get_decoder(), "config", config)
    return DynamicCache(config=config)


def told_layers(base: nn.Module) -> int:
    """How many layers a prefix has by PEFT's count: of a T5 those of its encoder, if its decoder has no more."""
    told = getattr(transformers_model(base).config.get_text_config(decoder=True), "num_hidden_layers", 0)
    return max(int(told), len(new_cache(base).layers))


def _odd_layer(layers: Any) -> str | None:
    """The first layer of a cache that does not keep all, in words."""
    return next((f"a layer of kind {type(layer).__name__}" for layer in layers if not keeps_all(layer)), None)


def keeps_all(layer: Any) -> bool:
    """Whether a layer of a cache is a growing tensor of all keys (or of those in its window) and another of values."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)  # subclasses keep further states


def cache_length(past_key_values: Any) -> int:
    """Tokens already held by a key/value cache (transformers' Cache, or the older tuple of tensors)."""
    if past_key_values is None:
        return 0
    layers = getattr(past_key_values, "layers", None)
    if layers:  # some hold a state instead, and have no length (linear attention) or none to speak of (MiniMax's)
        lengths = (int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length"))
        return next(filter(None, lengths), 0)
    if hasattr(past_key_values, "get_seq_length"):
        return int(past_key_values.get_seq_length())
    if not isinstance(past_key_values, (tuple, list)):
        got = type(past_key_values).__name__
        raise TypeError(f"past_key_values: expected a cache of transformers', or a tuple of tensors, got {got}")
    return int(past_key_values[0][0].shape[-2]) if len(past_key_values) else 0
