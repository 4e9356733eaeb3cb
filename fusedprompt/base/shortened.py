"""The first layers of a model as a model of its own, with the same weights: enough to see how it treats positions."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn


def shortened(model: Any) -> Any:
    """A transformers model cut down to its first layers, in which each kind of layer occurs, two at least; or all of it
    where its layers are not found.

    Weights are the model's own, the modules around them copies without hooks, in evaluation mode. Nothing of the model
    is changed.
    """
    config, layers = _config_and_layers(model)
    number = 0 if layers is None else len(layers)
    kept = 0 if layers is None else max(2, *(index + 1 for index in _first_of_kind(layers)))
    if kept >= number:
        return bare(model)
    small = copy.copy(config)
    vars(small).update({key: value[:kept] for key, value in vars(config).items() if _is_per_layer(value, number)})
    vars(small)[getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")] = kept
    return _bare(model, {id(config): small}, {id(layers): kept}, {})


def first_of_kind(model: Any) -> list[int] | None:
    """For each layer of a transformers model, the first one of its kind, which `shortened` keeps; None where its layers
    are not found."""
    layers = _config_and_layers(model)[1]
    return None if layers is None else _first_of_kind(layers)


def _config_and_layers(model: Any) -> tuple[Any, nn.ModuleList | None]:
    """The configuration that says how many layers there are, and the layers, if they can be left out one by one."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    number = int(getattr(config, "num_hidden_layers", None) or 0)
    if any(getattr(config, name, None) for name in _OF_ALL):
        return config, None
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == number]
    return config, lists[0] if number and len(lists) == 1 else None


def bare(module: nn.Module) -> Any:
    """A copy of a module and its parts without hooks, with the same tensors, in evaluation mode."""
    return _bare(module, {}, {}, {})


def _is_per_layer(value: Any, number: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == number


def _bare(module: Any, configs: dict[int, Any], lengths: dict[int, int], copies: dict[int, Any]) -> Any:
    """See `bare`.

    configs: others, by the id of those that they stand for. lengths: of lists of modules that are cut.
    """
    if id(module) in copies:
        return copies[id(module)]
    if module is None or "forward" in vars(module):
        return module  # accelerate's forward brings weights to where they are used, and is bound to the original
    bare = copies[id(module)] = copy.copy(module)
    own = vars(bare)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        own[hooks] = type(own[hooks])()
    own["_compiled_call_impl"], own["training"] = None, False
    if id(own.get("config")) in configs:
        own["config"] = configs[id(own["config"])]
    parts = list(module._modules.items())[: lengths.get(id(module))]
    own["_modules"] = {name: _bare(part, configs, lengths, copies) for name, part in parts}
    return bare


def _first_of_kind(layers: nn.ModuleList) -> list[int]:
    kinds = [_kind(layer) for layer in layers]
    return [kinds.index(kind) for kind in kinds]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer's parts say of themselves, but for what counts layers."""
    said: list[Any] = []
    for part in layer.modules():
        said.append(type(part))
        said += [
            (key, value) for key, value in vars(part).items() if type(value) in _SIMPLE and not _COUNTS.search(key)
        ]
    return tuple(said)


# Gemma 3n's and Gemma 4's: keys of layers that count from the end, and a table of inputs for all of them.
_OF_ALL = ("num_kv_shared_layers", "hidden_size_per_layer_input")
_SIMPLE = (bool, int, str, type(None))
_COUNTS = re.compile("^_|idx|index|layer_id|number")
