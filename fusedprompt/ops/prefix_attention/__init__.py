"""Attention to a prefix that rows share, and to each row's own keys behind it, without a copy of the prefix per row."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ...base import check
from .._backend import Op, never_objects
from .._requirements import multiplies_exactly, why_not_triton
from . import reference

# Numbers of a head in a kernel's registers and shared memory; of products without tensor cores.
_WIDEST, _WIDEST_EXACT = 256, 128


def _triton(*args: Any) -> Tensor:
    from . import triton

    return triton.prefix_attention(*args)


def _why_not_triton(query: Tensor, *args: Any) -> str | None:
    """Also of the query alone, for `explain`."""
    reason = why_not_triton(query)
    if reason is not None:
        return reason
    width = max(query.shape[3], *(args[3].shape[3:] if args else ()), 1)
    if width > _WIDEST:
        return f"needs heads of at most {_WIDEST} numbers, got {width}"
    if width > _WIDEST_EXACT and query.dtype == torch.float32 and multiplies_exactly():
        return f"leaves exact products in fp32 of heads of more than {_WIDEST_EXACT} numbers to PyTorch, got {width}"
    if query.shape[:3].numel() >= 2**30:  # which are counted in 32 bits
        return f"needs fewer than 2**30 queries, got {query.shape[:3].numel()}"
    return None


OP = Op("prefix_attention")
OP.add("reference", reference.prefix_attention, never_objects)
OP.add("triton", _triton, _why_not_triton)


def prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    index: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k scale) v over the prefix that a row reads and, causally, its own keys.

    The prefix is read by all rows at once, and never copied: no tensor has N positions for each row. Both parts are
    merged by their log-sum-exps, and the backward pass gives each part the merged ones, which is exact; a prefix's
    gradient is one product over all rows, and deterministic. The idea is that of Hydragen (arXiv:2402.05099) and of
    Prefix Grouper (arXiv:2506.05433), here for a prefix that is learned.

    Args:
        query: (B, Hq, T, d) floating point, any strides.
        prefix_key: (A, Hkv, N, d) A distinct prefixes, N >= 1, and prefix_value: (A, Hkv, N, dv); Hkv divides Hq.
        key: (B, Hkv, S, d) the row's own keys, S >= T, of which the queries are the last T, and value: (B, Hkv, S, dv).
        index: (B,) int64 in [-1, A): which prefix a row reads, -1 for none; None where A is 1. One out of range is an
            IndexError on a CPU; on CUDA the row becomes NaN.
        prefix_mask: (A, N) bool, False at padding between prefixes of different lengths; None for all True.
        mask: (B, S) bool, False at padding, which may be anywhere; None for all True.
        scale: None for d ** -0.5.
        window: a query sees its own position and the window - 1 positions before it, counted over prefix and own keys,
            padding included, as transformers counts them; None for all.
        softcap: scores become softcap * tanh(scores / softcap); positive, or None.
        backend: "auto", "reference" or "triton" (CUDA).

    Returns:
        (B, Hq, T, dv). A query that sees no key at all gets zeros, and gives none of the inputs a gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    _check_heads(query, prefix_key, prefix_value, key, value)
    _check_choice(query, prefix_key, key, index, prefix_mask, mask)
    width = query.shape[3]
    scale = width**-0.5 if scale is None else scale
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive number or None, got {window!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")
    device = query.device.type
    tensors: tuple[Tensor, ...] = (query, prefix_key, prefix_value, key, value)
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        tensors = tuple(one.to(torch.get_autocast_dtype(device)) for one in tensors)
    for name, one in zip(("prefix_key", "prefix_value", "key", "value"), tensors[1:]):
        check.same_dtype(name, one, "query", tensors[0])
    with torch.autocast(device, enabled=False):
        choice, options = (index, prefix_mask, mask), (float(scale), window or 0, softcap or 0.0)
        return cast(Tensor, OP.run(backend, *tensors, *choice, *options))


def _check_heads(query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor) -> None:
    check.tensor("query", query, "(B, Hq, T, d)", 4)
    check.floating("query", query)
    check.tensor("prefix_key", prefix_key, "(A, Hkv, N, d)", 4)
    check.tensor("prefix_value", prefix_value, "(A, Hkv, N, dv)", 4)
    check.tensor("key", key, "(B, Hkv, S, d)", 4)
    check.tensor("value", value, "(B, Hkv, S, dv)", 4)
    (batch, heads, length, width), (prefixes, kv_heads, prefix_length, _) = query.shape, prefix_key.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"prefix_key: expected Hkv heads that divide the {heads} of query, got {kv_heads}")
    if prefixes < 1 or prefix_length < 1:
        raise ValueError(f"prefix_key: expected A >= 1 prefixes of N >= 1 positions, got {tuple(prefix_key.shape)}")
    check.shape("prefix_key", prefix_key, "(A, Hkv, N, d)", (prefixes, kv_heads, prefix_length, width))
    check.shape("key", key, "(B, Hkv, S, d)", (batch, kv_heads, key.shape[2], width))
    if key.shape[2] < length:
        raise ValueError(f"key: expected S >= T = {length} positions, got {key.shape[2]}")
    value_width = value.shape[3]
    check.shape("value", value, "(B, Hkv, S, dv)", (*key.shape[:3], value_width))
    check.shape("prefix_value", prefix_value, "(A, Hkv, N, dv)", (*prefix_key.shape[:3], value_width))
    if width < 1 or value_width < 1:
        raise ValueError(f"query, value: expected widths of at least 1, got {width} and {value_width}")
    for name, one in (("prefix_key", prefix_key), ("prefix_value", prefix_value), ("key", key), ("value", value)):
        check.same_device(name, one, "query", query)


def _check_choice(
    query: Tensor,
    prefix_key: Tensor,
    key: Tensor,
    index: Tensor | None,
    prefix_mask: Tensor | None,
    mask: Tensor | None,
) -> None:
    if index is None and prefix_key.shape[0] != 1:
        raise ValueError(f"index: expected which of the {prefix_key.shape[0]} prefixes each row reads, got None")
    if index is not None:
        check.tensor("index", index, "(B,)", 1)
        check.shape("index", index, "(B,)", query.shape[:1])
        if index.dtype != torch.int64:
            raise TypeError(f"index: expected torch.int64, got {index.dtype}")
    shapes = (("prefix_mask", prefix_mask, "(A, N)", prefix_key), ("mask", mask, "(B, S)", key))
    for name, one, rule, of in shapes:
        if one is not None:
            check.tensor(name, one, rule, 2)
            check.shape(name, one, rule, (of.shape[0], of.shape[2]))
            if one.dtype != torch.bool:
                raise TypeError(f"{name}: expected torch.bool, got {one.dtype}")
    for name, one in (("index", index), ("prefix_mask", prefix_mask), ("mask", mask)):
        if one is not None:
            check.same_device(name, one, "query", query)
