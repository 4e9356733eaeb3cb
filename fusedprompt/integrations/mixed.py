"""Batches that mix adapters, for a PEFT model: PEFT itself has one prompt for a whole batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import generation
from ..base_model import cache_length
from ..heads import call_by_rows
from ..mixed import Mixture, refuse_cache
from ..tasks import FORWARD, TENSORS, Batch

if TYPE_CHECKING:
    from ..model import PromptModel


def forward(view: PromptModel, given: dict[str, Any]) -> Any:
    """A forward call with `adapter_names`: this package's own, with padding where it changes nothing."""
    names = given.pop("adapter_names")
    given.pop("task_ids", None)
    tensors: dict[str, Any] = {name: given.pop(name, None) for name in TENSORS}
    batch = Batch(**tensors, others=given, route=view.route)
    if cache_length(given.get("past_key_values")):
        refuse_cache(names)
    batch.mixture = Mixture.of(view, names, batch.tokens)
    with view.heads_for_rows(names):
        return FORWARD[batch.mixture.task](view, batch)


def generate(view: PromptModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`generate` with `adapter_names`."""
    kwargs.pop("task_ids", None)
    with torch.no_grad():
        return generation.generate(view, args[0] if args else kwargs.pop("inputs", None), view.route, **kwargs)


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
