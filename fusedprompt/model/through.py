"""A model in front of a base model: its class, and which attributes are its own and which the base model's.

Tools look classes up by name and read signatures: a pipeline asks whether it serves `BertForTokenClassification`,
Trainer keeps the columns that `forward` names. So each model's class is made for its base model: a subclass with the
base model's class name, and with its arguments beside ours.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from inspect import Parameter, Signature
from typing import Any

from torch import nn

from ..base.facts import transformers_model
from ..base.saved_modules import SavedModule

# What accelerate and torch leave in a module that they wrap: the base model's is about the base model.
_OF_ONE_MODULE = ("_hf_hook", "_old_forward", "_original_forward", "_orig_mod", "_former_parameters", "_is_replica")
_PREFIXES_OF_ONE_MODULE = ("_fsdp", "_is_fsdp", "_ddp")
# Functions of transformers' models that are about `self` as a whole: parameters, operations.
_ABOUT_SELF = (
    "estimate_tokens",
    "floating_point_ops",
    "get_memory_footprint",
    "get_parameter_or_buffer",
    "named_non_persistent_buffers",
    "num_parameters",
    "retrieve_modules_from_names",
)
# Those that would do to the base model what was asked of this one, and for which there is nothing here.
_REFUSED = (
    "disable_adapters",
    "enable_adapters",
    "enable_peft_hotswap",
    "get_adapter_state_dict",
    "init_weights",
    "initialize_weights",
    "post_init",
    "register_for_auto_class",
)


class ReadsThrough(nn.Module):
    """Attributes that it lacks are those of `base_model`, to be read and, once `__init__` is through, to be written."""

    base_model: Any

    def __new__(cls, base_model: Any = None, *args: Any, **kwargs: Any) -> Any:
        root = vars(cls).get("_made_from", (cls,))[0]
        if isinstance(base_model, nn.Module) and not isinstance(base_model, ReadsThrough):
            kind: Any = type(transformers_model(base_model) or base_model)
            cls = _class_for(root, kind)
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the classes that its own is made from, which has no place to be found at."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        made_from = getattr(type(self), "_made_from", None)
        return reduced if made_from is None else (_blank, made_from, *reduced[2:])

    def __repr__(self) -> str:
        return "PromptModel" + super().__repr__()[len(type(self).__name__) :]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or _is_of_one_module(name):
                raise
        if name in _REFUSED:
            raise AttributeError(f"{name}: a PromptModel has none; the base model's is `model.base_model.{name}`")
        found = getattr(self.base_model, name)
        function = getattr(found, "__func__", None)
        return types.MethodType(function, self) if name in _ABOUT_SELF and function is not None else found

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self._owner(name)
        if owner is None:
            super().__setattr__(name, value)
            return
        if isinstance(vars(owner)["_modules"].get(name), SavedModule):
            raise AttributeError(
                f"{name}: there is a copy for each adapter; set one of `model.{name}.modules_to_save`, or delete the "
                "adapters first"
            )
        setattr(owner, name, value)

    def _owner(self, name: str) -> nn.Module | None:
        """The module behind this one whose attribute it is; None for our own, and for new ones."""
        own = self.__dict__
        if not own.get("_complete") or name in own or hasattr(type(self), name) or _is_of_one_module(name):
            return None
        if any(name in own[kind] for kind in ("_modules", "_parameters", "_buffers")):
            return None
        base = self.base_model
        return next((module for module in (base, transformers_model(base)) if _has(module, name)), None)


def _is_of_one_module(name: str) -> bool:
    return name in _OF_ONE_MODULE or name.startswith(_PREFIXES_OF_ONE_MODULE)


def _has(module: Any, name: str) -> bool:
    """Whether an attribute is a module's own, rather than one that it reads from another."""
    if module is None:
        return False
    own = vars(module)
    return name in own or hasattr(type(module), name) or any(name in own[k] for k in ("_modules", "_parameters"))


@functools.cache
def _class_for(root: Any, kind: Any) -> Any:
    """The subclass of `root` for base models of the class `kind`: with its name, and its arguments of `forward`."""

    @functools.wraps(root.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return root.forward(self, *args, **kwargs)

    forward.__signature__ = _signature(root.forward, kind.forward)  # type: ignore[attr-defined]
    own = {"forward": forward, "_made_from": (root, kind), "__module__": root.__module__, "__doc__": root.__doc__}
    return type(kind.__name__, (root,), own)


def _signature(ours: Any, theirs: Any) -> Signature:
    """The base model's arguments and those that we add. By position as long as both agree on what comes next."""
    own, base = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    if "input_ids" not in base:
        return inspect.signature(ours)
    return Signature([*_merged(own, base)])


def _merged(own: Any, base: Any) -> Iterator[Parameter]:
    first = next(iter(own))
    by_position, rest = {first: own[first]}, Parameter("kwargs", Parameter.VAR_KEYWORD)
    for name, one in own.items():
        if name == first:
            continue
        if one.kind is not Parameter.POSITIONAL_OR_KEYWORD or name not in base:
            break
        by_position[name] = one
    yield from by_position.values()
    named = [one for one in base.values() if one.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)]
    added = [one for one in own.values() if one.kind is Parameter.KEYWORD_ONLY]
    others = {one.name: one for one in (*added, *named) if one.name not in by_position}
    yield from (one.replace(kind=Parameter.KEYWORD_ONLY) for one in others.values())
    yield rest


def _blank(root: Any, kind: Any) -> Any:
    made = _class_for(root, kind)
    return made.__new__(made)
