"""Which implementation of an op runs, decided in one place.

A backend is a name, a function that says why it cannot run on given arguments, and the function that runs. `auto` takes
the first backend without an objection; a backend asked for by name either runs or raises with its objection.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

AUTO = "auto"
NAMES = ("reference", "triton", "native")


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run on these arguments; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    name: one of `NAMES`.
    why_not: called with the op's arguments, or the first alone; returns None, or one clause that says why this backend
        cannot run on them.
    call: the implementation, called with the same arguments.
    """

    name: str
    why_not: Callable[..., str | None]
    call: Callable[..., Any]


@dataclass
class Op:
    """An op and its backends, fastest first. The reference backend comes last and never objects."""

    name: str
    backends: list[Backend] = field(default_factory=list)

    def add(self, name: str, call: Callable[..., Any], why_not: Callable[..., str | None]) -> None:
        """Register a backend in front of those already there.

        Raises:
            ValueError: there is one of that name, or it is none of `NAMES`.
        """
        if name not in NAMES or any(backend.name == name for backend in self.backends):
            raise ValueError(f"name: expected one of {NAMES} that op '{self.name}' has not yet, got {name!r}")
        self.backends.insert(0, Backend(name, why_not, call))

    def select(self, requested: str | None, *args: Any) -> Backend:
        """The backend to run on `args`.

        requested: the caller's choice: a name, or None or "auto" to follow `use_backend` and FUSEDPROMPT_BACKEND.

        Raises:
            ValueError: `requested` names no backend of this op.
            BackendUnavailable: the requested backend objects.
        """
        is_auto = (requested or AUTO) == AUTO
        name = _preferred() if is_auto else requested
        if name != AUTO and all(backend.name != name for backend in self.backends):
            if not is_auto:
                choices = (AUTO, *(backend.name for backend in self.backends))
                raise ValueError(f"backend: expected one of {choices} for op '{self.name}', got {requested!r}")
            name = AUTO  # a preference set for all ops applies to those that have such a backend
        for backend in self.backends:
            if name in (AUTO, backend.name):
                reason = backend.why_not(*args)
                if reason is None:
                    return backend
                if name != AUTO:
                    raise BackendUnavailable(f"backend '{name}' of op '{self.name}' cannot run: it {reason}")
        raise AssertionError(f"the reference backend of op '{self.name}' must accept everything")

    def run(self, requested: str | None, *args: Any) -> Any:
        """What the backend that `select` chooses makes of `args`."""
        return self.select(requested, *args).call(*args)

    def explain(self, *args: Any) -> dict[str, str]:
        """For each backend, "runs", or why it cannot run on `args`. `auto` takes the first that runs."""
        return {backend.name: backend.why_not(*args) or "runs" for backend in self.backends}


def never_objects(*args: Any) -> str | None:
    """The `why_not` of a reference backend."""
    return None


def checked_name(source: str, name: str) -> str:
    """A backend's name, if it is one; source: names it in the error."""
    if name not in (AUTO, *NAMES):
        raise ValueError(f"{source}: expected one of {(AUTO, *NAMES)}, got {name!r}")
    return name


# Read once from the environment.
_default = checked_name("FUSEDPROMPT_BACKEND", os.environ.get("FUSEDPROMPT_BACKEND") or AUTO)
_preference: ContextVar[str | None] = ContextVar("fusedprompt_backend", default=None)
# The same for what torch.compile traces, which cannot read a ContextVar: of all threads, the last entry being in force.
_traced, _lock = [_default], threading.Lock()


def _preferred() -> str:
    """The backend that `auto` means here."""
    return _traced[-1] if torch.compiler.is_compiling() else _preference.get() or _default


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend for every op that has it, within a `with` block: in its thread (or task of asyncio) alone.

    Raises:
        ValueError: `name` is not "auto", "reference", "triton" or "native".
    """
    with _lock:
        _traced.append(checked_name("backend", name))
    token = None if torch.compiler.is_compiling() else _preference.set(name)
    try:
        yield
    finally:
        if token is not None:
            _preference.reset(token)
        with _lock:
            del _traced[-1 - _traced[::-1].index(name)]  # another thread's may stand behind it


def using(backend: str) -> contextlib.AbstractContextManager[None]:
    """`use_backend`, but that "auto" changes nothing: it follows `use_backend` and FUSEDPROMPT_BACKEND."""
    return contextlib.nullcontext() if backend == AUTO else use_backend(backend)
