"""A cache whose rows read the keys and values of one prefix, without a copy of their own.

transformers' layers put a prefix and the text's keys into one tensor (B, heads, N + S, width) at every step: B copies
of the prefix in each layer, and of its gradient. Here a layer keeps the two apart and gives attention the text's alone,
as a layer with a window gives those in its window: masks begin behind the prefix, positions count it. Only an attention
that knows of the prefix may read such a layer, within `reading`; for everything else the layer is one of transformers'
own kind, whose keys and values are joined when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .reading import NotRead, reader


class PrefixedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer: those of A prefixes, which rows share, and each row's own behind them.

    Args:
        prefix: keys and values (A, heads, N, width) each. They are not changed.
        index: (B,) int64, which of them a row reads, -1 for none; None for one prefix that all B rows read.
        mask: (A, N) bool, what of the prefixes counts; None for all.
        size: B.
    """

    def __init__(
        self, prefix: tuple[Tensor, Tensor], index: Tensor | None = None, mask: Tensor | None = None, size: int = 1
    ) -> None:
        self.prefix: tuple[Tensor, Tensor] | None = prefix
        self.index, self.mask, self.size = index, mask, size
        self.own_keys: Tensor | None = None
        self.own_values: Tensor | None = None
        self.dtype, self.device, self.is_initialized = prefix[0].dtype, prefix[0].device, True

    @property
    def rows(self) -> int:
        """N, or 0 where prefix and text have been joined."""
        return 0 if self.prefix is None else self.prefix[0].shape[2]

    def _joined(self, which: int) -> Tensor | None:
        own = (self.own_keys, self.own_values)[which]
        if self.prefix is None:
            return own
        shared = self.prefix[which]
        if self.index is None:
            shared = shared.expand(self.size, *shared.shape[1:])
        else:
            shared = shared.index_select(0, self.index.clamp(min=0))
        return shared if own is None else torch.cat((shared, own), 2)

    def _replace(self, which: int, joined: Tensor | None) -> None:
        """What is put in stands for prefix and text."""
        if self.prefix is not None:
            self.own_keys, self.own_values = self._joined(0), self._joined(1)
            self.prefix = self.index = self.mask = None
        if which:
            self.own_values = joined
        else:
            self.own_keys = joined

    keys = property(lambda self: self._joined(0), lambda self, joined: self._replace(0, joined))
    values = property(lambda self: self._joined(1), lambda self, joined: self._replace(1, joined))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values (B, heads, T, width) behind the row's own.

        Returns:
            All (B, heads, N + S, width) of them; or the row's own (B, heads, S, width), for an attention that knows
            of the prefix.
        """
        now = reader()
        if now is None or not now.holds(self):
            self.keys = self.keys
            joined: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return joined
        if now.unread is not None:
            raise NotRead("its attention is not one of transformers' registry")
        if self.own_keys is None or self.own_values is None:
            self.own_keys, self.own_values = key_states, value_states
        else:
            self.own_keys = torch.cat((self.own_keys, key_states), 2)
            self.own_values = torch.cat((self.own_values, value_states), 2)
        now.unread = self
        return self.own_keys, self.own_values

    def get_seq_length(self, *args: Any) -> int:
        """Positions so far, the prefix included."""
        return self.rows + (0 if self.own_keys is None else self.own_keys.shape[-2])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """How many keys attention gets with `query_length` more, and the position of the first."""
        more = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)  # before transformers 5
        total = self.get_seq_length() + more
        now = reader()
        rows = self.rows if now is not None and now.holds(self) else 0
        return total - rows, rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        rows = torch.arange(self._size(), device=self.device).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.size = indices.shape[0] if indices.dtype != torch.bool else int(indices.sum())
        if self.index is not None:
            self.index = self.index[indices.to(self.index.device)]
        if self.own_keys is not None and self.own_values is not None:
            indices = indices.to(self.device)
            self.own_keys, self.own_values = self.own_keys[indices], self.own_values[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search: row i goes on from row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens. Negative: so many; positive, before transformers 5: all behind so many."""
        total = self.get_seq_length()
        keep = total + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
        if tokens_to_remove == 0 or keep >= total:
            return
        if keep < self.rows:
            self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]
            return
        if self.own_keys is not None and self.own_values is not None:
            length = keep - self.rows
            self.own_keys, self.own_values = self.own_keys[..., :length, :], self.own_values[..., :length, :]

    def _size(self) -> int:
        return self.size if self.own_keys is None else self.own_keys.shape[0]


def prefixed_cache(
    prefix: Sequence[tuple[Tensor, Tensor]], size: int, index: Tensor | None = None, mask: Tensor | None = None
) -> DynamicCache:
    """A cache for `size` rows of text behind prefixes, of which each layer has keys and values; see `PrefixedLayer`."""
    cache = DynamicCache()
    cache.layers = [PrefixedLayer(each, index, mask, size) for each in prefix]
    cache.prompt_first = True
    return cache
