"""Prompts' rows in memory, up to a number of bytes; the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

Key = tuple[int, torch.device]


class Rows(nn.Module):
    """A prompt's rows (P, D) as a frozen module, as calls ask for them."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(
            rows.shape[0], rows.shape[1], _weight=rows, _freeze=True
        )  # draws no random numbers

    @property
    def weight(self) -> Tensor:
        """The rows, (P, D)."""
        weight: Tensor = self.embedding.weight
        return weight

    def forward(self) -> Tensor:
        """The rows, (P, D)."""
        return self.weight


class Resident:
    """The versions of prompts that are in memory, on whichever device.

    Whoever has got one keeps it, whatever becomes of it here. Use from several threads is safe; two that miss the same
    one at the same time both read it, and get the same object.

    Attributes:
        max_bytes: what they may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[Key, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are in memory."""
        return self._bytes

    def get(self, key: Key, load: Callable[[], Tensor]) -> Rows:
        """A version's rows: those in memory, or what `load` reads."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        with torch.inference_mode(False):
            loaded = Rows(load())  # without the lock: others go on meanwhile
        with self._lock:
            found = self._kept.setdefault(key, loaded)
            if found is loaded:
                self._bytes += _size(loaded)
            self._kept.move_to_end(key)
            while self._bytes > self.max_bytes:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
            return found

    def drop(self, serials: set[int]) -> None:
        """Forget versions that will not be asked for again."""
        with self._lock:
            for key in [key for key in self._kept if key[0] in serials]:
                self._bytes -= _size(self._kept.pop(key))


def _size(rows: Rows) -> int:
    return rows.weight.numel() * rows.weight.element_size()
