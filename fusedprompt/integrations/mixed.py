"""Batches that mix adapters, for a PEFT model: PEFT itself has one prompt for a whole batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..heads import call_by_rows
from .encoders import why_not_adapter

if TYPE_CHECKING:
    from ..model import PromptModel


def check_methods(view: PromptModel, names: Sequence[str]) -> None:
    """Refuse adapters whose method is left to PEFT.

    Raises:
        ValueError: one of them is named.
    """
    for name in dict.fromkeys(names):
        reason = why_not_adapter(view.peft_config[name]) if name in view.peft_config else None
        if reason is not None:
            raise ValueError(f"adapter_names: expected adapters that are served here, got {name!r}: {reason}")


@contextlib.contextmanager
def heads_for_rows(base: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it, each row of a batch goes through its own adapter's copies of PEFT's `modules_to_save`."""
    from peft.utils import ModulesToSaveWrapper

    found = [part for part in base.modules() if isinstance(part, ModulesToSaveWrapper)]
    before = [vars(wrapper).get("forward") for wrapper in found]
    for wrapper in found:
        wrapper.__dict__["forward"] = functools.partial(_forward, wrapper, names)
    try:
        yield
    finally:
        for wrapper, forward in zip(found, before):
            del wrapper.__dict__["forward"]
            if forward is not None:
                wrapper.__dict__["forward"] = forward


def _forward(wrapper: Any, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    return call_by_rows(wrapper, names, args, kwargs)
