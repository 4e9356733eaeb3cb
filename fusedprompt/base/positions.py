"""Position ids for decoders whose forward takes none, but counts columns: those of the BART kind."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .own_forward import own_forward, replaced_forwards
from .remembered import Remembered

_tables: Remembered[tuple[nn.Embedding | None]] = Remembered()


def position_table(base: Any) -> nn.Embedding | None:
    """The table in which a decoder looks up the positions that it counts, if that takes `position_ids` too; else None.

    The modules around it have no such argument to pass on.
    """
    held = _tables.get(base)
    if held is None:
        found = [part for part in base.modules() if isinstance(part, nn.Embedding) and _is_told_positions(part)]
        width = getattr(base.config, "hidden_size", None)
        # RoFormer has one too, of a head's width: it turns keys and queries.
        held = (found[0] if len(found) == 1 and found[0].embedding_dim == width else None,)
        _tables.put(base, held)
    return held[0]


def _is_told_positions(part: nn.Module) -> bool:
    return {"past_key_values_length", "position_ids"} <= inspect.signature(type(part).forward).parameters.keys()


def count_positions(mask: Tensor, first: int) -> Tensor:
    """Position ids (B, S) of a mask (B, S), from `first` on: padding does not count."""
    return ((mask != 0).cumsum(1) - 1).clamp(min=0) + first


@contextlib.contextmanager
def numbered(base: nn.Module, arguments: dict[str, Any], takes_position_ids: bool) -> Iterator[None]:
    """Within the block a call of `base(**arguments)` counts positions as `position_ids` says, (B, S) or (1, S).

    takes_position_ids: its forward does. Otherwise they are taken out of `arguments`, and its table is told.
    """
    table = None if takes_position_ids or "position_ids" not in arguments else position_table(base)
    if table is None:
        yield
        return
    positions: Tensor = arguments.pop("position_ids")
    with _told(table, lambda *_, **__: positions):
        yield


@contextlib.contextmanager
def counted_behind(base: nn.Module, padding: Tensor) -> Iterator[None]:
    """Within the block such a decoder does not count padding (B,) at the left of each row."""
    table = position_table(base)
    if table is None:
        yield
        return

    def positions(counted: Any, past_key_values_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        columns = position_ids
        if columns is None:
            length = (counted if isinstance(counted, (tuple, torch.Size)) else counted.shape)[1]
            columns = past_key_values_length + torch.arange(length, device=padding.device)
        return (columns - padding.unsqueeze(1)).clamp(min=0)

    with _told(table, positions):
        yield


@contextlib.contextmanager
def _told(table: nn.Embedding, positions_of: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block a table looks up the positions (B, S) that `positions_of` makes of its arguments."""
    own = own_forward(table)

    def look_up(counted: Any, *args: Any, **kwargs: Any) -> Tensor:
        positions = positions_of(counted, *args, **kwargs)
        # A row of positions is what such tables expect.
        rows: Tensor = own(counted, position_ids=positions.flatten())
        return rows.reshape(*positions.shape, -1)

    with replaced_forwards({table: look_up}):
        yield
