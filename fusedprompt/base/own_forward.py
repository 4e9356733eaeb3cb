"""Another function in place of a module's `forward`, for the calls of one context: other threads see nothing of it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

Forward = Callable[..., Any]

# What stands in for which module, by id, in this context.
_in_force: ContextVar[Mapping[int, Forward]] = ContextVar("fusedprompt_forwards", default={})  # noqa: B039
_lock = threading.Lock()


class _Switch:
    """What stands in a module's `__dict__` while some context has another function for it.

    before: the `forward` that stood there, or None for the class's. users: blocks that are running.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before, self.users = module, vars(module).get("forward"), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = _in_force.get().get(id(self.module), self.before)
        if function is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return function(*args, **kwargs)


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within the block, and in its context alone, these modules' calls run these functions (hooks run as ever)."""
    switches = [_enter(module) for module in forwards]
    token = _in_force.set({**_in_force.get(), **{id(module): forward for module, forward in forwards.items()}})
    try:
        yield
    finally:
        _in_force.reset(token)
        for switch in switches:
            _leave(switch)


def _enter(module: nn.Module) -> _Switch:
    with _lock:
        switch = vars(module).get("forward")
        if not isinstance(switch, _Switch):
            # The instance's dictionary, without nn.Module.__setattr__ (which DDP and others watch).
            switch = module.__dict__["forward"] = _Switch(module)
        switch.users += 1
        return switch


def _leave(switch: _Switch) -> None:
    with _lock:
        switch.users -= 1
        own = vars(switch.module)
        if switch.users or own.get("forward") is not switch:
            return
        del own["forward"]
        if switch.before is not None:
            own["forward"] = switch.before


def has_own_forward(module: nn.Module) -> bool:
    """Whether something other than this file has put a `forward` into an instance."""
    forward = vars(module).get("forward")
    return forward.before is not None if isinstance(forward, _Switch) else forward is not None


def own_forward(module: nn.Module) -> Forward:
    """A module's `forward` without what this file has put there: its instance's (accelerate's), or its class's."""
    forward = vars(module).get("forward")
    if isinstance(forward, _Switch):
        forward = forward.before
    return functools.partial(type(module).forward, module) if forward is None else forward
