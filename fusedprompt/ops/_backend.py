"""Which implementation of an op runs, decided in one place.

A backend is a name, a function that says why it cannot run on given arguments, and the function that runs. `auto` takes
the first backend without an objection; a backend asked for by name either runs or raises with its objection.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
NAMES = ("reference", "triton", "native")


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run on these arguments; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    name: one of `NAMES`.
    why_not: called with the op's arguments; returns None, or one clause that says why this backend cannot run on them.
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
        """Register a backend in front of those already there."""
        assert name in NAMES and all(backend.name != name for backend in self.backends)
        self.backends.insert(0, Backend(name, why_not, call))

    def select(self, requested: str | None, *args: Any) -> Backend:
        """The backend to run on `args`.

        requested: the caller's choice: a name, or None or "auto" to follow `use_backend` and FUSEDPROMPT_BACKEND.

        Raises:
            ValueError: `requested` names no backend of this op.
            BackendUnavailable: the requested backend objects.
        """
        name = requested or AUTO
        if name == AUTO:
            # A preference set for all ops applies to those that have such a backend.
            name = _preference[-1]
            if all(backend.name != name for backend in self.backends):
                name = AUTO
        elif all(backend.name != name for backend in self.backends):
            choices = (AUTO, *(backend.name for backend in self.backends))
            raise ValueError(f"backend: expected one of {choices} for op '{self.name}', got {requested!r}")
        for backend in self.backends:
            if name in (AUTO, backend.name):
                reason = backend.why_not(*args)
                if reason is None:
                    return backend
                if name != AUTO:
                    raise BackendUnavailable(f"backend '{name}' of op '{self.name}' cannot run: it {reason}")
        raise AssertionError(f"the reference backend of op '{self.name}' must accept everything")

    def explain(self, *args: Any) -> dict[str, str]:
        """For each backend, "runs", or why it cannot run on `args`. `auto` takes the first that runs."""
        return {backend.name: backend.why_not(*args) or "runs" for backend in self.backends}


def never_objects(*args: Any) -> str | None:
    """The `why_not` of a reference backend."""
    return None


def _checked_name(source: str, name: str) -> str:
    if name not in (AUTO, *NAMES):
        raise ValueError(f"{source}: expected one of {(AUTO, *NAMES)}, got {name!r}")
    return name


# The last entry is in force; the first is read once from the environment.
_preference = [_checked_name("FUSEDPROMPT_BACKEND", os.environ.get("FUSEDPROMPT_BACKEND") or AUTO)]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend for every op that has it, within a `with` block of this process.

    Raises:
        ValueError: `name` is not "auto", "reference", "triton" or "native".
    """
    _preference.append(_checked_name("backend", name))
    try:
        yield
    finally:
        _preference.pop()
