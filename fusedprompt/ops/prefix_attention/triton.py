"""Attention to a shared prefix on Triton: one launch forward, three backward.

Forward, a program has a block of one row's queries, goes over the prefix's keys and then over the row's own with one
running softmax, and writes the result: merging two kernels' results would write and read each of them in fp32. The
queries of a group, which read the same keys, share a block. Rows of very few queries, as in generation, would fill a
block with nothing: there a launch of its own takes the queries of all rows to the prefix first, and the second goes on
from what it found.

Backward, one kernel makes d_query over all keys, one d_key and d_value of the rows' own keys, and one those of the
prefix, in which a program has a block of keys and goes over the queries of all rows that read it, in their order. Where
that makes too few programs, rows are split among some more, whose sums are added up at the end. No atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._requirements import multiplies_exactly
from .._triton import INTERPRETED, Launch, cdiv, supports_pdl
from ._configs import FEW_QUERIES, Kind, configurations, constants, tile
from ._gradients import attention_d_keys, attention_d_query
from ._kernels import attention_forward
from ._op import Arguments, new_gradients, new_heads, new_lse, register

# Programs that keep the largest chips busy, two on each of 132 multiprocessors. A constant: sums have one order.
_PROGRAMS = 264
Strides = tuple[int, int, int]


@functools.cache
def _launch(kernel: Any, kind: Kind, few: bool, dtypes: tuple[torch.dtype, ...], **flags: Any) -> Launch:
    """Made once for all that a kernel is compiled for: see `Launch`. dtypes: of the inputs and of the results."""
    sizes = tile(kernel, kind, few)
    return Launch(kernel, constants(kernel, kind, few, flags), sizes["num_warps"], sizes["num_stages"], kind.pdl)


def _kind(given: Arguments) -> Kind:
    precision = ""
    if given.query.dtype == torch.float32:
        precision = "ieee" if multiplies_exactly() else "tf32"
    return Kind(
        given.group,
        given.query.shape[3],
        given.value.shape[3],
        given.scale,
        given.softcap,
        given.window,
        precision,
        supports_pdl(given.query.device),
        INTERPRETED,
    )


def _strides(tensor: Tensor) -> Strides | None:
    """Of rows, heads and places, in rows of the last dimension; None if they cannot be counted so."""
    width = tensor.shape[3]
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride())]
    if strides[3] != (1 if width > 1 else 0) or any(stride % width for stride in strides[:3]):
        return None
    return strides[0] // width, strides[1] // width, strides[2] // width


def _laid_out(*tensors: Tensor) -> tuple[list[Tensor], Strides]:
    """Tensors of one layout, copied where they have none in common."""
    found = {_strides(tensor) for tensor in tensors}
    given = list(tensors)
    if len(found) > 1 or None in found:
        given = [tensor.contiguous() for tensor in tensors]
        found = {_strides(tensor) for tensor in given}
    (strides,) = found
    assert strides is not None
    return given, strides


class _Inputs:
    """What the kernels are called with."""

    def __init__(self, given: Arguments) -> None:
        self.kind, self.given = _kind(given), given
        (query,), query_strides = _laid_out(given.query)
        prefix, prefix_strides = _laid_out(given.prefix_key, given.prefix_value)
        own, key_strides = _laid_out(given.key, given.value)
        self.query, self.prefix, self.own = query, prefix, own
        self.query_strides, self.prefix_strides, self.key_strides = query_strides, prefix_strides, key_strides
        self.index = query if given.readers is None else given.readers.contiguous()
        self.prefix_mask, self.mask = (
            query if mask is None else mask.contiguous().view(torch.uint8) for mask in (given.prefix_mask, given.mask)
        )
        self.batch, self.heads, self.length, _ = query.shape
        self.kv_heads, self.own_length = given.key.shape[1:3]
        self.prefixes, _, self.prefix_length, _ = given.prefix_key.shape
        self.few = self.length * given.group <= FEW_QUERIES

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.query, *self.prefix, *self.own, self.index, self.prefix_mask, self.mask)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.length, self.own_length, self.prefix_length, self.prefixes

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.query_strides, *self.prefix_strides, *self.key_strides)

    @property
    def flags(self) -> dict[str, bool]:
        given = self.given
        return {
            "HAS_INDEX": given.readers is not None,
            "HAS_PREFIX_MASK": given.prefix_mask is not None,
            "HAS_MASK": given.mask is not None,
        }

    def new_out(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, (B, Hq, T, dv) and (B, Hq, T), which the kernels see as (B, T, Hq, .)."""
        like = self.query if dtype is None else self.query.new_empty(0, dtype=dtype)
        shape = (self.batch, self.heads, self.length)
        return new_heads(like, *shape, self.given.value.shape[3]), new_lse(like, *shape)

    def attend(self, part: str, before: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> None:
        """part: see `attention_forward`. before: what "own" goes on from."""
        flags, rows = self.flags, self.length * self.given.group
        if part == "prefix":
            flags["HAS_MASK"] = False
        elif part == "own":
            flags |= {"HAS_INDEX": False, "HAS_PREFIX_MASK": False}
        few = self.batch * rows <= FEW_QUERIES if part == "prefix" else self.few
        dtypes = (self.query.dtype, out[0].dtype, before[0].dtype)
        launch = _launch(attention_forward, self.kind, few, dtypes, PART=part, **flags)
        block = tile(attention_forward, self.kind, few)["BLOCK_M"]
        blocks = cdiv(self.batch * rows, block) if part == "prefix" else self.batch * cdiv(rows, block)
        launch((blocks, self.kv_heads, 1), (*self.tensors, *before, *out), (self.batch, *self.sizes, *self.strides))


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    given = Arguments(*args)
    inputs = _Inputs(given)
    out = inputs.new_out()
    if given.query.numel() == 0:
        return out
    if inputs.few and given.readers is None and inputs.batch > 1:
        before = inputs.new_out(torch.float32)
        inputs.attend("prefix", before, before)
        inputs.attend("own", before, out)
    else:
        inputs.attend("both", out, out)
    return out


def _d_keys(inputs: _Inputs, prefix: bool, of_queries: tuple[Tensor, ...]) -> list[Tensor]:
    """d_key and d_value of the prefixes, or of the rows. of_queries: d_out, log-sum-exp and delta, (B, T, Hq, .)."""
    dtype, few = inputs.query.dtype, inputs.few and not prefix
    keys, mask, flags = inputs.own, inputs.mask, {"HAS_INDEX": False, "HAS_MASK": inputs.flags["HAS_MASK"]}
    last0, strides, splits = inputs.own_length - inputs.length, inputs.key_strides, 1
    if prefix:
        keys, mask, strides = inputs.prefix, inputs.prefix_mask, inputs.prefix_strides
        flags = {"HAS_INDEX": inputs.flags["HAS_INDEX"], "HAS_MASK": inputs.flags["HAS_PREFIX_MASK"]}
        last0 += inputs.prefix_length
    owners, heads, length, _ = keys[0].shape
    blocks = owners * cdiv(length, tile(attention_d_keys, inputs.kind, few)["BLOCK_N"])
    if prefix:
        splits = min(inputs.batch, max(1, _PROGRAMS // (blocks * heads)))
    rows_each = cdiv(inputs.batch, splits)
    splits = cdiv(inputs.batch, rows_each)
    sums_dtype = dtype if splits == 1 else torch.float32
    sums = [inputs.query.new_empty(splits, owners, length, heads, one.shape[3], dtype=sums_dtype) for one in keys]
    launch = _launch(attention_d_keys, inputs.kind, few, (dtype, sums_dtype), PREFIX=prefix, **flags)
    launch(
        (blocks, heads, splits),
        (inputs.query, *keys, inputs.index, mask, *of_queries, *sums),
        (inputs.batch, inputs.length, length, last0, rows_each, *inputs.query_strides, *strides),
    )
    return [(one[0] if splits == 1 else one.sum(0).to(dtype)).transpose(1, 2) for one in sums]


def _backward(d_out: Tensor, out: Tensor, lse: Tensor, needs: list[bool], *args: Any) -> list[Tensor]:
    given = Arguments(*args)
    if given.query.numel() == 0:
        return [one.zero_() for one in new_gradients(needs, given)]
    gradients = [given.query.new_empty(0) for _ in needs]
    inputs = _Inputs(given)
    d_out, out, lse = (one.transpose(1, 2).contiguous() for one in (d_out, out, lse))
    delta, d_query = torch.empty_like(lse), new_heads(inputs.query, *inputs.query.shape)
    launch = _launch(attention_d_query, inputs.kind, inputs.few, (d_out.dtype,), **inputs.flags)
    rows = inputs.length * given.group
    blocks = inputs.batch * cdiv(rows, tile(attention_d_query, inputs.kind, inputs.few)["BLOCK_M"])
    launch(
        (blocks, inputs.kv_heads, 1),
        (*inputs.tensors, d_out, out, lse, delta, d_query),
        (*inputs.sizes, *inputs.strides),
    )
    if needs[0]:
        gradients[0] = d_query
    for first, prefix in ((1, True), (3, False)):
        if any(needs[first : first + 2]):
            found = _d_keys(inputs, prefix, (d_out, lse, delta))
            for number, one in enumerate(found, first):
                gradients[number] = one if needs[number] else gradients[number]
    return gradients


prefix_attention = register("_triton", _forward, _backward)

__all__ = ["configurations", "prefix_attention"]
