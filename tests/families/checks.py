"""The checks of each mapping, in the order in which they run."""

from __future__ import annotations

from typing import Any

from . import forward, generation, masked, peers

_BOTH = {**forward.CHECKS, **peers.CHECKS}
_BY_TASK: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": {**forward.CHECKS, **generation.CHECKS, **peers.CHECKS},
    "SEQ_CLS": _BOTH,
    "TOKEN_CLS": {**_BOTH, **masked.LOSS},
    "QUESTION_ANS": _BOTH,
    "SEQ_2_SEQ_LM": {**_BOTH, **generation.SAID},
    "MASKED_LM": {**_BOTH, **masked.LOSS, **masked.CHECKS},
}
STEPS = ("routes", "every gradient", "embeddings", "PEFT", "apply", "loss")  # with labels or gradients


def of(task: str) -> dict[str, Any]:
    """The checks of a mapping's classes, by name."""
    return _BY_TASK[task]


def everything() -> dict[str, Any]:
    """All checks, by name."""
    return {name: check for found in _BY_TASK.values() for name, check in found.items()}
