"""PEFT models as soon as they are whole, wherever and by whichever name a program makes them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_watchers: list[Callable[[Any], None]] = []
_replaced: list[tuple[type, str, Any]] = []
_unfinished: ContextVar[list[Any] | None] = ContextVar("fusedprompt_unfinished", default=None)


def watch(made: Callable[[Any], None]) -> Callable[[], None]:
    """Call `made` with every `peft.PeftModel` that is made from now on, of whatever method.

    Its classes' `__init__` say when: `get_peft_model`, `from_pretrained`, trainers and programs' own subclasses all
    come there, also those that imported these names before. A model that is loaded is announced with its weights.

    Returns:
        A function that ends it.
    """
    if not _watchers:
        _install()
    _watchers.append(made)

    def end() -> None:
        if made in _watchers:
            _watchers.remove(made)
            if not _watchers:
                _uninstall()

    return end


def _install() -> None:
    import peft

    for kind in vars(peft.peft_model).values():
        if isinstance(kind, type) and issubclass(kind, peft.PeftModel) and "__init__" in vars(kind):
            _replace(kind, "__init__", _announcing(vars(kind)["__init__"]))
    loader = vars(peft.PeftModel)["from_pretrained"]
    _replace(peft.PeftModel, "from_pretrained", classmethod(_loading(loader.__func__)))


def _replace(kind: type, name: str, method: Any) -> None:
    _replaced.append((kind, name, vars(kind)[name]))
    setattr(kind, name, method)


def _uninstall() -> None:
    while _replaced:
        setattr(*_replaced.pop())


def _announcing(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with _collecting() as found:
            plain(self, *args, **kwargs)
            if all(model is not self for model in found):
                found.append(self)

    return __init__


def _loading(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _collecting():
            return plain(cls, *args, **kwargs)

    return from_pretrained


@contextlib.contextmanager
def _collecting() -> Iterator[list[Any]]:
    """What is made within the outermost of such blocks is announced behind it, unless it ends in an error."""
    found = _unfinished.get()
    if found is not None:
        yield found
        return
    found = []
    token = _unfinished.set(found)
    try:
        yield found
    finally:
        _unfinished.reset(token)
    for model in found:
        for made in tuple(_watchers):
            made(model)
