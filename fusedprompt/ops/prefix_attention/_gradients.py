"""The Triton kernels of prefix_attention's backward pass: see _kernels.py for how queries and keys are counted."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._kernels import wait_for_kernel_before
from ._kernels import (
    CHANGING,
    LOG2_E,
    addresses,
    dot,
    first_seen,
    is_seen,
    load_rows,
    queries_of_a_row,
    score,
    store_rows,
)


@triton.jit
def _d_query_of(
    d_query,  # (M, BLOCK_D)
    query,  # (M, BLOCK_D)
    d_out,  # (M, BLOCK_V)
    lse,  # (M,) in powers of 2
    delta,  # (M,)
    last,  # (M,)
    key_ptr,
    value_ptr,
    mask_ptr,
    key_place,
    begin,
    end,
    length,
    HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """d_query, but for the scale, and what the keys from begin to end add to it."""
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = place.to(tl.int64) * key_place
        key = load_rows(key_ptr, row, place < length, WIDTH, BLOCK_D)
        value = load_rows(value_ptr, row, place < length, VALUE_WIDTH, BLOCK_V)
        nothing = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
        scores, slope = score(dot(query, tl.trans(key), nothing, PRECISION, INTERPRETED), SCALE, SOFTCAP)
        seen = is_seen(place[None, :], last[:, None], length, mask_ptr, HAS_MASK, WINDOW)
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = dot(d_out, tl.trans(value), nothing, PRECISION, INTERPRETED)
        d_scores = weights * (d_weights - delta[:, None]) * slope
        d_query = dot(d_scores.to(key.dtype), key, d_query, PRECISION, INTERPRETED)
    return d_query


@triton.jit(do_not_specialize=CHANGING)
def attention_d_query(
    query_ptr,  # (B, Hq, T, d)
    prefix_key_ptr,  # (A, Hkv, N, d)
    prefix_value_ptr,  # (A, Hkv, N, dv)
    key_ptr,  # (B, Hkv, S, d)
    value_ptr,  # (B, Hkv, S, dv)
    index_ptr,  # (B,) int64, read if HAS_INDEX
    prefix_mask_ptr,  # (A, N) uint8, read if HAS_PREFIX_MASK
    mask_ptr,  # (B, S) uint8, read if HAS_MASK
    d_out_ptr,  # (B, T, Hq, dv)
    out_ptr,  # (B, T, Hq, dv)
    lse_ptr,  # (B, T, Hq) fp32
    delta_ptr,  # (B, T, Hq) fp32
    d_query_ptr,  # (B, T, Hq, d)
    T: tl.int32,
    S: tl.int32,
    N: tl.int32,
    A: tl.int32,
    query_row: tl.int64,
    query_head: tl.int64,
    query_place: tl.int64,
    prefix_row: tl.int64,
    prefix_head: tl.int64,
    prefix_place: tl.int64,
    key_row: tl.int64,
    key_head: tl.int64,
    key_place: tl.int64,
    GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """delta = rowsum(d_out out); d_query = sum of p (d_out v - delta) slope k over all keys, p = exp(score - lse), with
    the lse of both parts. Grid (B times blocks of BLOCK_M queries, Hkv)."""
    if PDL:
        wait_for_kernel_before()
    h, heads = tl.program_id(1), tl.num_programs(1)
    row, m, end, first, behind = queries_of_a_row(T, GROUP, BLOCK_M)
    inside = m < end
    t, query_at, out_at = addresses(m, h, heads, T, query_row, query_head, query_place, GROUP)
    query = load_rows(query_ptr, query_at, inside, WIDTH, BLOCK_D)
    d_out = load_rows(d_out_ptr, out_at, inside, VALUE_WIDTH, BLOCK_V)
    out = load_rows(out_ptr, out_at, inside, VALUE_WIDTH, BLOCK_V)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + out_at, delta, mask=inside)
    lse = tl.load(lse_ptr + out_at, mask=inside, other=float("inf")) * LOG2_E
    number = tl.load(index_ptr + row) if HAS_INDEX else row * 0
    stop = tl.where((number < 0) | (number >= A), 0, N)
    number = tl.where(stop == 0, 0, number)
    prefix, own = number * prefix_row + h * prefix_head, row * key_row + h * key_head
    d_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_query = _d_query_of(
        d_query, query, d_out, lse, delta, N + S - T + t, prefix_key_ptr + prefix * WIDTH,
        prefix_value_ptr + prefix * VALUE_WIDTH, prefix_mask_ptr + number * N, prefix_place,
        first_seen(N + S - T + first, WINDOW), stop, N, HAS_PREFIX_MASK, WINDOW,
        SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
    )  # fmt: skip
    d_query = _d_query_of(
        d_query, query, d_out, lse, delta, S - T + t, key_ptr + own * WIDTH, value_ptr + own * VALUE_WIDTH,
        mask_ptr + row * S, key_place, first_seen(S - T + first, WINDOW), S - T + behind, S, HAS_MASK,
        WINDOW, SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
    )  # fmt: skip
    store_rows(d_query_ptr, out_at, d_query * SCALE, inside, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def attention_d_keys(
    query_ptr,  # (B, Hq, T, d)
    key_ptr,  # (owners, Hkv, length, d): of the prefixes if PREFIX, else of the rows
    value_ptr,  # (owners, Hkv, length, dv)
    index_ptr,  # (B,) int64, read if HAS_INDEX
    mask_ptr,  # (owners, length) uint8, read if HAS_MASK
    d_out_ptr,  # (B, T, Hq, dv)
    lse_ptr,  # (B, T, Hq) fp32
    delta_ptr,  # (B, T, Hq) fp32
    d_key_ptr,  # (splits, owners, length, Hkv, d)
    d_value_ptr,  # (splits, owners, length, Hkv, dv)
    B: tl.int32,
    T: tl.int32,
    length: tl.int32,
    last0: tl.int32,  # the last key of a row's first query
    rows_each: tl.int32,  # rows of a split, if PREFIX
    query_row: tl.int64,
    query_head: tl.int64,
    query_place: tl.int64,
    key_row: tl.int64,
    key_head: tl.int64,
    key_place: tl.int64,
    PREFIX: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """d_value = sum of p d_out and d_key = sum of p (d_out v - delta) slope q over the queries, in their order: of one
    row, or of all that read a prefix, rows_each in a split. Grid (owners times blocks of BLOCK_N keys, Hkv, splits)."""
    if PDL:
        wait_for_kernel_before()
    h, heads, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(length, BLOCK_N)
    owner, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    place = start + tl.arange(0, BLOCK_N)
    key_at = owner.to(tl.int64) * key_row + h * key_head + place.to(tl.int64) * key_place
    key = load_rows(key_ptr, key_at, place < length, WIDTH, BLOCK_D)
    value = load_rows(value_ptr, key_at, place < length, VALUE_WIDTH, BLOCK_V)
    if PREFIX:
        begin, end = tl.program_id(2) * rows_each * T * GROUP, (tl.program_id(2) + 1) * rows_each * T * GROUP
        end = tl.minimum(end, B * T * GROUP)
    else:  # from the first query that sees the first key, to the last that sees the last one
        begin, end = (owner * T + tl.maximum(start - last0, 0)) * GROUP, (owner + 1) * T * GROUP
        if WINDOW > 0:
            end = (owner * T + tl.minimum(start + BLOCK_N - 1 + WINDOW - last0, T)) * GROUP
    mask_ptr += owner.to(tl.int64) * length
    d_key, d_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for step in range(begin, end, BLOCK_M):
        m = step + tl.arange(0, BLOCK_M)
        inside, is_read = m < end, True
        if HAS_INDEX:  # other prefixes' readers are passed over
            inside = inside & (tl.load(index_ptr + m // GROUP // T, mask=inside, other=-1) == owner)
            is_read = tl.max(inside.to(tl.int32), axis=0) > 0
        if is_read:
            t, query_at, out_at = addresses(m, h, heads, T, query_row, query_head, query_place, GROUP)
            query = load_rows(query_ptr, query_at, inside, WIDTH, BLOCK_D)
            d_out = load_rows(d_out_ptr, out_at, inside, VALUE_WIDTH, BLOCK_V)
            lse = tl.load(lse_ptr + out_at, mask=inside, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + out_at, mask=inside, other=0.0)
            nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            scores, slope = score(dot(key, tl.trans(query), nothing, PRECISION, INTERPRETED), SCALE, SOFTCAP)
            seen = is_seen(place[:, None], (last0 + t)[None, :], length, mask_ptr, HAS_MASK, WINDOW)
            weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
            d_value = dot(weights.to(d_out.dtype), d_out, d_value, PRECISION, INTERPRETED)
            d_weights = dot(value, tl.trans(d_out), nothing, PRECISION, INTERPRETED) - delta[None, :]
            d_key = dot((weights * d_weights * slope).to(query.dtype), query, d_key, PRECISION, INTERPRETED)
    at = ((tl.program_id(2).to(tl.int64) * (tl.num_programs(0) // blocks) + owner) * length + place) * heads + h
    store_rows(d_key_ptr, at, d_key * SCALE, place < length, WIDTH, BLOCK_D)
    store_rows(d_value_ptr, at, d_value, place < length, VALUE_WIDTH, BLOCK_V)
