"""The checks of each mapping, in the order in which they run."""

from __future__ import annotations

from typing import Any

from . import forward, generation, peers

_BY_TASK: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": {**forward.CHECKS, **generation.CHECKS, **peers.CHECKS},
}


def of(task: str) -> dict[str, Any]:
    """The checks of a mapping's classes, by name."""
    return _BY_TASK.get(task, {})
