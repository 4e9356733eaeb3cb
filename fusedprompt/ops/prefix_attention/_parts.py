"""Attention of a batch of queries to keys of one kind, forward and backward: on a CPU by PyTorch's flash kernels, which
give and take log-sum-exps, and otherwise in plain PyTorch, a few queries at a time.

The flash kernels check little: keys of fewer heads or rows than the queries' are read out of bounds, no keys at all end
the process, and the stride of the last dimension is taken for 1. Their causal mask starts at the first query and the
first key. They may have it together with a mask, and serve fp64, fp32, bf16 and fp16 (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._op import NOTHING, Arguments, new_heads, new_lse

_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCORES_AT_ONCE = 1 << 21  # of plain PyTorch: 8 MB in fp32
# The flash kernel's backward adds up d_key and d_value in the inputs' dtype, 256 queries at a time. In 16 bits the sums
# over 25600 queries are then 5 times as wrong as row by row. So it adds up 4 times, and we the rest in fp32.
_QUERIES_AT_ONCE = 1024
Gradients = tuple[Tensor, Tensor, Tensor]


class Part(NamedTuple):
    """Queries and the keys that they may see.

    query: (P, H, M, d). key: (P, H, N, d). value: (P, H, N, dv).
    mask: (P, N) bool, or None for all True.
    flash: PyTorch's flash kernels serve it: see `serves_flash`.
    causal: query m sees no key behind m; M = N. Of flash alone.
    last, window: query m sees the keys in (last[m] - window, last[m]], last: (M,) int64, or all if None. Not of flash.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    flash: bool
    causal: bool = False
    last: Tensor | None = None
    window: int = 0


def serves_flash(given: Arguments) -> bool:
    """Whether the flash kernels have these dtypes and sizes; they know no soft cap and no window."""
    return (
        given.query.device.type == "cpu"
        and given.query.dtype in _FLASH_DTYPES
        and given.key.shape[3] == given.value.shape[3]
        and given.softcap == 0
    )


def attend(part: Part, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Output (P, H, M, dv), and log-sum-exp (P, H, M): about NOTHING where no key is seen, and any finite output."""
    if not part.flash:
        return _attend_plain(part, scale, softcap)
    query, key, value = map(_with_rows, part[:3])
    out, lse = _FLASH(query, key, value, 0.0, part.causal, attn_mask=_added(part), scale=scale)
    return out, lse


def attend_backward(part: Part, scale: float, softcap: float, d_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """Of query, key and value, where `out` and `lse` are those of all keys, of other parts too."""
    if not part.flash:
        return _attend_plain_backward(part, scale, softcap, d_out, out, lse)
    query, key, value, d_out, out = map(_with_rows, (*part[:3], d_out, out))
    added = _added(part)

    def run(query: Tensor, d_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        keys = (one.expand(query.shape[0], -1, -1, -1) for one in (key, value))
        d_query, d_key, d_value = _FLASH_BACKWARD(
            d_out, query, *keys, out, lse, 0.0, part.causal, attn_mask=added, scale=scale
        )
        return d_query, d_key, d_value

    products, heads, count, _ = query.shape
    times = 1 if part.causal or products > 1 else -(-torch.get_num_threads() // heads)  # a thread has a head at least
    size = -(-count // times)
    if products == 1 and not part.causal and query.dtype.itemsize == 2:
        size = min(size, _QUERIES_AT_ONCE)
    if size == count:
        return run(query, d_out, out, lse)
    return _in_turns(run, size, times, (query, d_out, out, lse.unsqueeze(3)), key, value)


def _in_turns(
    run: Callable[..., Gradients], size: int, times: int, of_queries: tuple[Tensor, ...], key: Tensor, value: Tensor
) -> Gradients:
    """The gradients of one product, `times` times `size` queries at once. of_queries: (1, H, M, .); lse's has 1."""
    query, wide = of_queries[0], of_queries[3]
    d_query = new_heads(query, *query.shape)
    d_key, d_value = (new_heads(wide, *one.shape).zero_() for one in (key, value))
    count, start = query.shape[2], 0
    while start < count:
        times = max(1, min(times, (count - start) // size))
        stop = min(start + times * size, count)

        def split(one: Tensor, start: int = start, stop: int = stop, times: int = times) -> Tensor:
            some = one[0, :, start:stop]
            return some.view(some.shape[0], times, -1, some.shape[2]).transpose(0, 1)  # (times, H, size, .)

        *split_ones, some_lse = map(split, of_queries)
        d_some, *d_keys = run(*split_ones, some_lse.squeeze(3))
        split(d_query).copy_(d_some)
        for total, some in zip((d_key, d_value), d_keys):
            total += some.sum(0, keepdim=True, dtype=total.dtype)
        start = stop
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)


def _with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _added(part: Part) -> Tensor | None:
    """The mask as what is added to scores, (P, 1, 1, N)."""
    if part.mask is None:
        return None
    dtype = torch.promote_types(part.query.dtype, torch.float32)
    added = torch.zeros(part.mask.shape, dtype=dtype, device=part.mask.device)
    return added.masked_fill_(~part.mask, NOTHING)[:, None, None]


def _chunks(part: Part) -> Iterator[tuple[slice, slice]]:
    """Of products and of queries, so that their scores are few."""
    products, heads, queries, _ = part.query.shape
    most = max(1, _SCORES_AT_ONCE // (heads * part.key.shape[2]))  # queries at once
    rows, size = max(1, most // queries), min(queries, most)
    for row in range(0, products, rows):
        for start in range(0, queries, size):
            yield slice(row, row + rows), slice(start, start + size)


def _visible(part: Part, rows: slice, queries: slice) -> Tensor | None:
    """Broadcastable to (rows, 1, queries, N), or None if every key is."""
    visible = None if part.mask is None else part.mask[rows, None, None]
    if part.last is not None:
        at, last = torch.arange(part.key.shape[2], device=part.last.device), part.last[queries, None]
        band = (at <= last) & (at > last - part.window)
        visible = band if visible is None else visible & band
    return visible


def _scores(
    part: Part, scale: float, softcap: float, rows: slice, queries: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key and scores in fp32 at least, NOTHING where not visible, and the scores' slope at the soft cap."""
    wide = torch.promote_types(part.query.dtype, torch.float32)
    query, key = part.query[rows, :, queries].to(wide), part.key[rows].to(wide)
    scores = query @ key.mT
    scores *= scale
    slope = torch.full((), scale, dtype=wide, device=scores.device)
    if softcap:
        scores.div_(softcap).tanh_()
        slope = scores.square().neg_().add_(1).mul_(scale)
        scores *= softcap
    visible = _visible(part, rows, queries)
    if visible is not None:
        scores.masked_fill_(~visible, NOTHING)
    return query, key, scores, slope


def _attend_plain(part: Part, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    products, heads, count, _ = part.query.shape
    out = new_heads(part.query, products, heads, count, part.value.shape[3])
    lse = new_lse(part.query, products, heads, count)
    for rows, queries in _chunks(part):
        _, _, scores, _ = _scores(part, scale, softcap, rows, queries)
        some = torch.logsumexp(scores, 3)
        scores.sub_(some.unsqueeze(3)).exp_()
        out[rows, :, queries] = (scores @ part.value[rows].to(scores.dtype)).to(out.dtype)
        lse[rows, :, queries] = some
    return out, lse


def _attend_plain_backward(
    part: Part, scale: float, softcap: float, d_out: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    d_query = new_heads(part.query, *part.query.shape)
    d_key, d_value = (new_heads(lse, *one.shape).zero_() for one in part[1:3])
    for rows, queries in _chunks(part):
        query, key, scores, slope = _scores(part, scale, softcap, rows, queries)
        value, d_some = part.value[rows].to(lse.dtype), d_out[rows, :, queries].to(lse.dtype)
        delta = (d_some * out[rows, :, queries]).sum(3, keepdim=True)
        scores.sub_(lse[rows, :, queries, None]).exp_()
        d_value[rows] += scores.mT @ d_some
        d_scores = (d_some @ value.mT).sub_(delta).mul_(scores).mul_(slope)
        d_query[rows, :, queries] = (d_scores @ key).to(d_query.dtype)
        d_key[rows] += d_scores.mT @ query
    return d_query, d_key.to(part.key.dtype), d_value.to(part.value.dtype)
