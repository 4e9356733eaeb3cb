"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def number(rule: str, is_right: Callable[[float], bool]) -> Callable[[str], float]:
    """Of finite numbers of which something is true, the kind of argument; `rule` says it in words."""

    def kind(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_right(value)):
            raise argparse.ArgumentTypeError(f"expected {rule}, got {text!r}")
        return value

    return kind


positive = number("a positive number", lambda value: value > 0)


def device(text: str) -> torch.device:
    """cpu, cuda, or auto, which takes cuda where it is."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("expected cpu, because PyTorch finds no CUDA device, got 'cuda'")
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu or cuda, got {text!r}")
    return torch.device(text)


def missing(command: str, packages: tuple[str, ...], extra: str) -> str | None:
    """What to install for a command; None if all of its packages are there."""
    import importlib.util

    names = " and ".join(name for name in packages if importlib.util.find_spec(name) is None)
    return f"{command} needs {names}; install with: pip install fusedprompt[{extra}]" if names else None
