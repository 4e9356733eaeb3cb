"""Attention to a shared prefix in PyTorch: one product of all rows with the prefix, and one of each row with itself.

    out_i = softmax(s_i) V_i,  L_i = log sum exp s_i   of part i,          s = q k scale
    L = log(exp L_1 + exp L_2),  out = sum_i exp(L_i - L) out_i

With delta = rowsum(d_out * out) and p = exp(s_i - L) the usual backward of part i gives its share of the whole's: it is
called with the merged out and L.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._op import NOTHING, Arguments, new_heads, new_lse, register
from ._parts import Part, attend, attend_backward, serves_flash

Rows = slice | Tensor  # numbers along the first dimension
_ALL = slice(None)


@dataclass(frozen=True)
class _Piece:
    """Where a part comes from, and where what it gives belongs.

    across: its rows' queries are one product's, with a prefix; otherwise each row has its own keys.
    rows, heads: which of (B, Hkv, group, T, .) its queries are. owner: which prefix. keys: which positions.
    """

    across: bool
    rows: Rows
    heads: slice
    owner: Rows
    keys: slice

    def fold(self, grouped: Tensor) -> Tensor:
        """(B, Hkv, group, T, .) as the part's (P, Hkv, M, .), positions before heads."""
        some = _take(grouped, self.rows)[:, :, self.heads].transpose(2, 3)
        return some.transpose(0, 1).flatten(1, 3).unsqueeze(0) if self.across else some.flatten(2, 3)

    def unfold(self, folded: Tensor, grouped: Tensor) -> Tensor:
        """The inverse, a view of the shape that those of `grouped` have."""
        group, length = grouped[:, :, self.heads].shape[2:4]
        if self.across:
            heads = folded.squeeze(0)
            return heads.view(heads.shape[0], -1, length, group, heads.shape[2]).transpose(0, 1).transpose(2, 3)
        return folded.view(*folded.shape[:2], length, group, folded.shape[3]).transpose(2, 3)


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _add(total: Tensor, rows: Rows, some: Tensor) -> None:
    if isinstance(rows, slice):
        total[rows] += some
    else:
        total.index_add_(0, rows, some.to(total.dtype))


def _grouped(tensor: Tensor, group: int) -> Tensor:
    """(B, Hq, T, .) as (B, Hkv, group, T, .), a view."""
    batch, heads, length, width = tensor.shape
    return tensor.view(batch, heads // group, group, length, width)


def _readers(given: Arguments) -> Iterator[tuple[Rows, Rows, Tensor | None]]:
    """The rows that read a prefix, its number, and whether they do (1, 1) where only the device knows."""
    index, rows = given.readers, given.query.shape[0]
    if index is None:
        yield _ALL, _ALL, None
    elif index.device.type != "cpu":  # sorting the rows would wait for the device
        for row in range(rows):
            own = index[row : row + 1]
            yield slice(row, row + 1), own.clamp(min=0), own.unsqueeze(1) >= 0
    else:
        readers: dict[int, list[int]] = {}
        for row, number in enumerate(index.tolist()):
            readers.setdefault(number, []).append(row)
        for number, some in sorted(readers.items()):
            if not -1 <= number < given.prefix_key.shape[0]:
                raise IndexError(f"index: expected numbers in [-1, {given.prefix_key.shape[0]}), got {number}")
            first, last = some[0], some[-1]
            if number >= 0:
                are_neighbours = last - first + 1 == len(some)
                chosen = slice(first, last + 1) if are_neighbours else torch.tensor(some, device="cpu")
                yield _ALL if len(some) == rows else chosen, slice(number, number + 1), None


def _prefix_parts(given: Arguments, grouped: Tensor) -> Iterator[tuple[_Piece, Part]]:
    (_, _, group, length, _), keys_end = grouped.shape, given.prefix_key.shape[2]
    behind = given.key.shape[2] - length + keys_end  # the first query's position
    window = given.window or behind + length
    keys = slice(min(max(behind - window + 1, 0), keys_end), keys_end)  # what any query sees
    is_cut = behind + length - window > keys.start
    if keys.start == keys_end or given.query.numel() == 0:
        return
    for rows, owner, reads in _readers(given):
        piece = _Piece(True, rows, _ALL, owner, keys)
        query = piece.fold(grouped)
        mask = None if given.prefix_mask is None else _some(_take(given.prefix_mask, owner)[:, keys])
        if reads is not None:
            mask = reads.expand(1, keys_end - keys.start) if mask is None else mask & reads
        last = None
        if is_cut:
            times = query.shape[2] // (length * group)
            last = _last(query, behind - keys.start, length, group).repeat(times)
        key, value = (_take(one, owner)[:, :, keys] for one in given[1:3])
        yield piece, Part(query, key, value, mask, serves_flash(given) and not is_cut, last=last, window=window)


def _own_parts(given: Arguments, grouped: Tensor) -> Iterator[tuple[_Piece, Part]]:
    (_, _, group, length, _), end = grouped.shape, given.key.shape[2]
    past = end - length  # the first query's position
    window = given.window or end
    start = max(past - window + 1, 0)
    is_cut = end - window > start
    if given.query.numel() == 0:
        return

    def one(heads: slice, keys: slice, flash: bool, causal: bool) -> tuple[_Piece, Part]:
        piece = _Piece(False, _ALL, heads, _ALL, keys)
        mask = None if given.mask is None else _some(given.mask[:, keys])
        query, key, value = piece.fold(grouped), given.key[:, :, keys], given.value[:, :, keys]
        last = None if flash else _last(query, past - start, length, group)
        return piece, Part(query, key, value, mask, flash, causal, last, window)

    if not serves_flash(given) or is_cut:
        yield one(_ALL, slice(start, end), False, False)
    elif length == 1:
        yield one(_ALL, slice(start, end), True, False)
    else:  # the flash kernels' causal mask begins at the first key
        if start < past:
            yield one(_ALL, slice(start, past), True, False)
        for head in range(group):
            yield one(slice(head, head + 1), slice(past, end), True, True)


def _some(mask: Tensor) -> Tensor | None:
    """A mask, if it says anything; only a CPU can be asked."""
    return None if mask.device.type == "cpu" and bool(mask.all()) else mask


def _last(query: Tensor, first: int, length: int, group: int) -> Tensor:
    """The last key that each query of a row sees, (T * group,)."""
    return torch.arange(first, first + length, device=query.device).repeat_interleave(group)


def _forward(*args: object) -> tuple[Tensor, Tensor]:
    given = Arguments(*args)  # type: ignore[arg-type]
    grouped = _grouped(given.query, given.group)
    out, lse = _attend_to_prefix(given, grouped)
    outs, sums = _grouped(out, given.group), _grouped(lse.unsqueeze(3), given.group)
    for piece, part in _own_parts(given, grouped):
        some, some_lse = attend(part, given.scale, given.softcap)
        some, some_lse = piece.unfold(some, grouped), piece.unfold(some_lse.unsqueeze(3), grouped)
        _merge(outs[:, :, piece.heads], sums[:, :, piece.heads], some, some_lse)
    if given.mask is not None:  # otherwise every query sees itself
        sees_nothing = lse < NOTHING / 2
        if lse.device.type != "cpu" or bool(sees_nothing.any()):
            out.masked_fill_(sees_nothing.unsqueeze(3), 0)
            lse.masked_fill_(sees_nothing, torch.inf)
    return out, lse


def _attend_to_prefix(given: Arguments, grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the prefix alone: 0 and NOTHING where a row reads none."""
    batch, heads, length, _ = given.query.shape
    out, lse = None, new_lse(given.query, batch, heads, length)
    for piece, part in _prefix_parts(given, grouped):
        some, some_lse = attend(part, given.scale, given.softcap)
        some, some_lse = piece.unfold(some, grouped), piece.unfold(some_lse.unsqueeze(3), grouped)
        if piece.rows is _ALL and given.group == 1:
            return some.flatten(1, 2), some_lse.flatten(1, 2).squeeze(3)
        if out is None:
            out = new_heads(given.query, batch, heads, length, given.value.shape[3]).zero_()
            lse.fill_(NOTHING)
        _grouped(out, given.group)[piece.rows] = some
        _grouped(lse.unsqueeze(3), given.group)[piece.rows] = some_lse
    if out is None:
        out = new_heads(given.query, batch, heads, length, given.value.shape[3]).zero_()
        lse.fill_(NOTHING)
    return out, lse


def _merge(out: Tensor, lse: Tensor, some: Tensor, some_lse: Tensor) -> None:
    """Another part's output and log-sum-exp (B, Hkv, ., T, 1) into those of the parts before it."""
    share = torch.sigmoid(some_lse - lse)
    if out.dtype == share.dtype:
        out.lerp_(some, share)
    else:
        out.copy_(out * (1 - share) + some * share)
    lse.copy_(torch.logaddexp(lse, some_lse))


class _Gradients:
    """The five, as sums of what the parts give."""

    def __init__(self, needs: list[bool], given: Arguments) -> None:
        self.inputs = (given.query, given.prefix_key, given.prefix_value, given.key, given.value)
        self.needs, self.group = needs, given.group
        self.totals: list[Tensor | None] = [None] * 5

    def _total(self, number: int) -> Tensor:
        total = self.totals[number]
        if total is None:
            like = self.inputs[number]
            # A group's heads are added up, which in 16 bits would round each time.
            wide = torch.float32 if number > 2 and self.group > 1 and like.dtype.itemsize == 2 else like.dtype
            total = self.totals[number] = new_heads(like.new_empty(0, dtype=wide), *like.shape).zero_()
        return total

    def add_query(self, piece: _Piece, some: Tensor) -> None:
        """some: (rows, Hkv, heads, T, d)."""
        if not self.needs[0]:
            return
        if piece.rows is _ALL and self.group == 1 and self.totals[0] is None:
            self.totals[0] = some.flatten(1, 2)
        else:
            _add(_grouped(self._total(0), self.group)[:, :, piece.heads], piece.rows, some)

    def add_keys(self, piece: _Piece, number: int, some: Tensor) -> None:
        """number: of the input, whose positions in `piece.keys` it is."""
        if not self.needs[number]:
            return
        like = self.inputs[number]
        is_whole = piece.owner is _ALL and some.shape == like.shape and (number < 3 or self.group == 1)
        if is_whole and self.totals[number] is None:
            self.totals[number] = some
        else:
            _add(self._total(number)[:, :, piece.keys], piece.owner, some)

    def sums(self) -> list[Tensor]:
        return [
            self._total(number).to(like.dtype) if self.needs[number] else like.new_empty(0)
            for number, like in enumerate(self.inputs)
        ]


def _backward(d_out: Tensor, out: Tensor, lse: Tensor, needs: list[bool], *args: object) -> list[Tensor]:
    given, gradients = Arguments(*args), _Gradients(needs, Arguments(*args))  # type: ignore[arg-type]
    whole = (given.query, d_out, out, lse.unsqueeze(3))
    grouped, d_outs, outs, sums = (_grouped(one, given.group) for one in whole)
    for parts, first in ((_prefix_parts, 1), (_own_parts, 3)):
        if not (needs[0] or any(needs[first : first + 2])):
            continue
        for piece, part in parts(given, grouped):
            d_folded, folded, some_lse = (piece.fold(one) for one in (d_outs, outs, sums))
            d_some, *d_keys = attend_backward(part, given.scale, given.softcap, d_folded, folded, some_lse.squeeze(3))
            gradients.add_query(piece, piece.unfold(d_some, grouped))
            for number, some in enumerate(d_keys, first):
                gradients.add_keys(piece, number, some)
    return gradients.sums()


prefix_attention = register("", _forward, _backward)
