"""Who reads the prefix of a cache where it is: see `prefixed_cache`, whose classes need transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class NotRead(RuntimeError):
    """An attention did not read a prefix that it was given; the message says why."""


@dataclass
class Reader:
    """An attention that knows of a cache's prefix. unread: the layer that was filled last, until it is read. reads: how
    often one was."""

    cache: Any
    unread: Any = None
    reads: int = 0

    def holds(self, layer: Any) -> bool:
        """Whether a layer has a prefix that is read."""
        return layer.prefix is not None and any(one is layer for one in getattr(self.cache, "layers", ()))

    def layer_of(self, key: Tensor, index: int | None) -> Any:
        """The layer whose own keys these are: the module's, or one whose keys it shares; None for other keys."""
        layers = getattr(self.cache, "layers", ())
        first = layers[index : index + 1] if index is not None else ()
        found = next((one for one in (*first, *layers) if getattr(one, "own_keys", None) is key), None)
        if found is None and self.unread is not None:
            raise NotRead("its attention changes the keys that a cache gives")
        self.unread, self.reads = None, self.reads + (found is not None)
        return found


_reader: ContextVar[Reader | None] = ContextVar("fusedprompt_reader", default=None)


def reader() -> Reader | None:
    """Whose attention knows of a prefix, in this thread; or None."""
    return _reader.get()


@contextlib.contextmanager
def reading(cache: Any = None) -> Iterator[Reader]:
    """Within the block attention reads the prefix of a cache; of none, until the reader gets one.

    Raises:
        NotRead: none did.
    """
    own = Reader(cache)
    token = _reader.set(own)
    try:
        yield own
        if own.cache is not None and (own.unread is not None or not own.reads):
            raise NotRead("its attention is not one of transformers' registry")
    finally:
        _reader.reset(token)
