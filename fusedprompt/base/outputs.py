"""Outputs whose full-length tensors are put together when somebody looks at them.

On the shared route the logits of prompt and text exist as two tensors. Joining them into PEFT's (B, P + T, V) took 170
of 1310 ms of a training step (B=4, P=200, T=210, V=32000), and a training loop reads the loss alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Finish = Callable[[], dict[str, Any]]
_READY = ("loss", "__class__", "__dict__")


def replaced(output: Any, **fields: Any) -> Any:
    """A copy of a transformers output with other or further fields, in the class's own order."""
    return type(output)(**{**dict(output.items()), **fields})


def defer(output: Any, finish: Finish) -> Any:
    """`output` with the fields of `finish()`, which is called when anything but the loss is read.

    Args:
        output: a transformers output; it is changed. Until then it holds stand-ins of the deferred fields.
        finish: makes the fields. It runs once, with gradients enabled or not as they are now.
    """
    if torch.compiler.is_compiling():
        return replaced(output, **finish())
    original: Any = type(output)
    vars(output)["_finish"] = (original, finish, torch.is_grad_enabled())
    output.__class__ = _deferred_class(original)
    return output


def _finish(output: Any) -> Any:
    """The output as its own class again, complete."""
    pending = vars(output).pop("_finish", None)
    if pending is not None:
        original, finish, grad_enabled = pending
        with torch.set_grad_enabled(grad_enabled):
            fields = finish()
        output.__class__ = original
        for name, value in fields.items():
            output[name] = value
    return output


@functools.cache
def _deferred_class(original: Any) -> Any:
    def __getattribute__(self: Any, name: str) -> Any:
        if name not in _READY:
            _finish(self)
        return original.__getattribute__(self, name)

    def __getitem__(self: Any, key: Any) -> Any:
        return self.loss if key == "loss" and self.loss is not None else _finish(self)[key]

    def __contains__(self: Any, key: Any) -> bool:
        return (key == "loss" and self.loss is not None) or key in _finish(self)

    def of_complete(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(_finish(self), name)(*args)

    methods = {method.__name__: method for method in (__getattribute__, __getitem__, __contains__)}
    others = {name: of_complete(name) for name in ("__iter__", "__reduce_ex__", "__repr__", "__eq__")}
    return type(f"Deferred{original.__name__}", (original,), {**methods, **others})
