"""The Triton kernels of prefix_attention, apart from the code that launches them.

Queries are numbered m = (b T + t) GROUP + g in each head of keys: the heads of a group, which read the same keys, stand
beside each other. Query t of a row sees keys up to place S - T + t of its own, and N + S - T + t of the prefix: all of
it, unless a window ends before. Offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._math import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# No batch, no text length and no stride may compile anything.
_TENSORS = ("query", "pkey", "pvalue", "key", "value")
_CHANGING = ["B", "T", "S", "N", "A", "window", "length", "last0", "rows_each"]
_CHANGING += [f"{tensor}_{along}" for tensor in _TENSORS for along in ("row", "head", "place")]


@triton.jit
def _wait_for_kernel_before():
    """With programmatic dependent launch: nothing is read before the kernel before this one has ended."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a b in fp32. The interpreter multiplies the bits of bf16 numbers."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _rows(base_ptr, offset, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """(rows, BLOCK): the WIDTH numbers at each offset; zeros behind them, and where not inside."""
    column = tl.arange(0, BLOCK)
    if ALIGNED:  # to 16 bytes of 16 bits
        offset = tl.multiple_of(offset, 8)
    return tl.load(base_ptr + offset[:, None] + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _scores(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in powers of 2, and d scores / d products, but for the scale: 1 without a soft cap."""
    scores = products * SCALE
    slope = 1.0
    if SOFTCAP > 0:
        share = tanh(scores / SOFTCAP)
        scores = share * SOFTCAP
        slope = 1 - share * share
    return scores * LOG2_E, slope


@triton.jit
def _seen(place, last, length, mask_ptr, window, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether queries, whose last keys are at `last`, see the keys at `place`; one of both is a row, one a column."""
    seen = (place < length) & (place <= last)
    if HAS_WINDOW:
        seen = seen & (place > last - window)
    if HAS_MASK:
        seen = seen & (tl.load(mask_ptr + place, mask=place < length, other=0) != 0)
    return seen


@triton.jit
def _attend_to(
    most,  # (M,) the largest score so far,
    total,  # (M,) the sum of weights
    sums,  # (M, BLOCK_V) and of weighted values
    query,  # (M, BLOCK_D)
    last,  # (M,)
    key_ptr,
    value_ptr,
    mask_ptr,
    key_place,
    value_place,
    begin,
    end,
    length,
    window,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A softmax, gone on with over the keys from begin to end."""
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        key = _rows(key_ptr, place.to(tl.int64) * key_place, place < length, WIDTH, BLOCK_D, ALIGNED)
        value = _rows(value_ptr, place.to(tl.int64) * value_place, place < length, VALUE_WIDTH, BLOCK_V, ALIGNED)
        products = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
        scores, _ = _scores(_dot(query, tl.trans(key), products, PRECISION, INTERPRETED), SCALE, SOFTCAP)
        seen = _seen(place[None, :], last[:, None], length, mask_ptr, window, HAS_MASK, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weights, axis=1)
        sums = _dot(weights.to(value.dtype), value, sums * fade[:, None], PRECISION, INTERPRETED)
        most = new
    return most, total, sums


@triton.jit
def _d_query_of(
    d_query,  # (M, BLOCK_D)
    query,
    d_out,  # (M, BLOCK_V)
    lse,  # (M,) in powers of 2
    delta,  # (M,)
    last,
    key_ptr,
    value_ptr,
    mask_ptr,
    key_place,
    value_place,
    begin,
    end,
    length,
    window,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """d_query, but for the scale, with what the keys from begin to end add to it."""
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        key = _rows(key_ptr, place.to(tl.int64) * key_place, place < length, WIDTH, BLOCK_D, ALIGNED)
        value = _rows(value_ptr, place.to(tl.int64) * value_place, place < length, VALUE_WIDTH, BLOCK_V, ALIGNED)
        nothing = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
        scores, slope = _scores(_dot(query, tl.trans(key), nothing, PRECISION, INTERPRETED), SCALE, SOFTCAP)
        seen = _seen(place[None, :], last[:, None], length, mask_ptr, window, HAS_MASK, HAS_WINDOW)
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = _dot(d_out, tl.trans(value), nothing, PRECISION, INTERPRETED)
        d_scores = weights * (d_weights - delta[:, None]) * slope
        d_query = _dot(d_scores.to(key.dtype), key, d_query, PRECISION, INTERPRETED)
    return d_query


@triton.jit
def _begin(first, window, HAS_WINDOW: tl.constexpr):
    """The first key that a window lets queries see, the first of which has its last key at `first`."""
    return tl.maximum(first - window + 1, 0) if HAS_WINDOW else 0


@triton.jit(do_not_specialize=_CHANGING)
def attention_forward(
    query_ptr,  # (B, Hq, T, d)
    pkey_ptr,  # (A, Hkv, N, d), read if HAS_PREFIX
    pvalue_ptr,  # (A, Hkv, N, dv)
    key_ptr,  # (B, Hkv, S, d), read if HAS_OWN
    value_ptr,  # (B, Hkv, S, dv)
    index_ptr,  # (B,) int64, read if HAS_INDEX
    prefix_mask_ptr,  # (A, N) uint8, read if HAS_PREFIX_MASK
    mask_ptr,  # (B, S) uint8, read if HAS_MASK
    before_ptr,  # (B, T, Hq, dv) fp32 and
    before_lse_ptr,  # (B, T, Hq) fp32: of other keys, read if GOES_ON
    out_ptr,  # (B, T, Hq, dv)
    lse_ptr,  # (B, T, Hq) fp32
    B: tl.int32,
    T: tl.int32,
    S: tl.int32,
    N: tl.int32,
    A: tl.int32,
    window: tl.int32,
    query_row: tl.int64,
    query_head: tl.int64,
    query_place: tl.int64,
    pkey_row: tl.int64,
    pkey_head: tl.int64,
    pkey_place: tl.int64,
    pvalue_row: tl.int64,
    pvalue_head: tl.int64,
    pvalue_place: tl.int64,
    key_row: tl.int64,
    key_head: tl.int64,
    key_place: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    value_place: tl.int64,
    HEADS: tl.constexpr,  # Hkv
    GROUP: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_OWN: tl.constexpr,
    GOES_ON: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    WIDTH: tl.constexpr,  # d
    VALUE_WIDTH: tl.constexpr,  # dv
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = softmax(scores) v and the log of the sum of exp(scores), over the prefix and then over the row's own keys.

    Grid (blocks of BLOCK_M queries, HEADS): blocks of a row, one row after the other, or of all rows without HAS_OWN.
    A query that sees nothing gets 0, and inf. A row whose index is out of range gets NaN.
    """
    if PDL:
        _wait_for_kernel_before()
    h = tl.program_id(1)
    if HAS_OWN:
        blocks = tl.cdiv(T * GROUP, BLOCK_M)
        row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        m, end = row * T * GROUP + block * BLOCK_M + tl.arange(0, BLOCK_M), (row + 1) * T * GROUP
        first, behind = block * BLOCK_M // GROUP, tl.minimum((block + 1) * BLOCK_M // GROUP + 1, T)
    else:
        row = 0
        m, end = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), B * T * GROUP
        first, behind = 0, T
    row = row.to(tl.int64) if HAS_OWN else row
    inside, t = m < end, m // GROUP % T
    query_at = (m // GROUP // T).to(tl.int64) * query_row + (h * GROUP + m % GROUP) * query_head + t * query_place
    query = _rows(query_ptr, query_at, inside, WIDTH, BLOCK_D, ALIGNED)
    out_at = (m // GROUP).to(tl.int64) * (HEADS * GROUP) + h * GROUP + m % GROUP
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    is_wrong = False
    if GOES_ON:
        most = tl.load(before_lse_ptr + out_at, mask=inside, other=0.0) * LOG2_E
        nothing = most == float("inf")
        total = tl.where(nothing, 0.0, 1.0)
        most = tl.where(nothing, float("-inf"), most)
        sums = _rows(before_ptr, out_at * VALUE_WIDTH, inside, VALUE_WIDTH, BLOCK_V, False)
    if HAS_PREFIX:
        number = tl.load(index_ptr + row) if HAS_INDEX else tl.zeros((), tl.int64)
        is_wrong = (number < -1) | (number >= A)
        stop = tl.where((number >= 0) & (number < A), N, 0)
        number = tl.where(is_wrong, 0, number)
        last0 = N + S - T
        most, total, sums = _attend_to(
            most, total, sums, query, last0 + t,
            pkey_ptr + number * pkey_row + h * pkey_head, pvalue_ptr + number * pvalue_row + h * pvalue_head,
            prefix_mask_ptr + number * N, pkey_place, pvalue_place,
            _begin(last0 + first, window, HAS_WINDOW), stop, N, window, HAS_PREFIX_MASK, HAS_WINDOW,
            SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, ALIGNED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
        )  # fmt: skip
    if HAS_OWN:
        last0 = S - T
        most, total, sums = _attend_to(
            most, total, sums, query, last0 + t,
            key_ptr + row * key_row + h * key_head, value_ptr + row * value_row + h * value_head,
            mask_ptr + row * S, key_place, value_place,
            _begin(last0 + first, window, HAS_WINDOW), last0 + behind, S, window, HAS_MASK, HAS_WINDOW,
            SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, ALIGNED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
        )  # fmt: skip
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    total = tl.where(is_wrong, float("nan"), total)
    lse = tl.where(nothing & (total == 1), float("inf"), (most + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + out_at, lse, mask=inside)
    column = tl.arange(0, BLOCK_V)[None, :]
    out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at[:, None] * VALUE_WIDTH + column, out, mask=inside[:, None] & (column < VALUE_WIDTH))


@triton.jit(do_not_specialize=_CHANGING)
def attention_d_query(
    query_ptr,  # as of attention_forward, down to
    pkey_ptr,
    pvalue_ptr,
    key_ptr,
    value_ptr,
    index_ptr,
    prefix_mask_ptr,
    mask_ptr,
    d_out_ptr,  # (B, T, Hq, dv)
    out_ptr,  # (B, T, Hq, dv)
    lse_ptr,  # (B, T, Hq) fp32
    delta_ptr,  # (B, T, Hq) fp32
    d_query_ptr,  # (B, T, Hq, d)
    B: tl.int32,
    T: tl.int32,
    S: tl.int32,
    N: tl.int32,
    A: tl.int32,
    window: tl.int32,
    query_row: tl.int64,
    query_head: tl.int64,
    query_place: tl.int64,
    pkey_row: tl.int64,
    pkey_head: tl.int64,
    pkey_place: tl.int64,
    pvalue_row: tl.int64,
    pvalue_head: tl.int64,
    pvalue_place: tl.int64,
    key_row: tl.int64,
    key_head: tl.int64,
    key_place: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    value_place: tl.int64,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """delta = rowsum(d_out out), and d_query = sum of p (d_out v - delta) slope k, p = exp(score - lse), over all keys.

    Grid (B times blocks of BLOCK_M queries, HEADS).
    """
    if PDL:
        _wait_for_kernel_before()
    h = tl.program_id(1)
    blocks = tl.cdiv(T * GROUP, BLOCK_M)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, t = place < T * GROUP, place // GROUP
    first, behind = block * BLOCK_M // GROUP, tl.minimum((block + 1) * BLOCK_M // GROUP + 1, T)
    query_at = row * query_row + (h * GROUP + place % GROUP) * query_head + t * query_place
    query = _rows(query_ptr, query_at, inside, WIDTH, BLOCK_D, ALIGNED)
    out_at = (row * T + t) * (HEADS * GROUP) + h * GROUP + place % GROUP
    d_out = _rows(d_out_ptr, out_at * VALUE_WIDTH, inside, VALUE_WIDTH, BLOCK_V, ALIGNED)
    out = _rows(out_ptr, out_at * VALUE_WIDTH, inside, VALUE_WIDTH, BLOCK_V, ALIGNED)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + out_at, delta, mask=inside)
    lse = tl.load(lse_ptr + out_at, mask=inside, other=float("inf")) * LOG2_E
    d_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    number = tl.load(index_ptr + row) if HAS_INDEX else tl.zeros((), tl.int64)
    stop = tl.where((number >= 0) & (number < A), N, 0)
    number = tl.where(number < A, number, 0)
    last0 = N + S - T
    d_query = _d_query_of(
        d_query, query, d_out, lse, delta, last0 + t,
        pkey_ptr + number * pkey_row + h * pkey_head, pvalue_ptr + number * pvalue_row + h * pvalue_head,
        prefix_mask_ptr + number * N, pkey_place, pvalue_place,
        _begin(last0 + first, window, HAS_WINDOW), stop, N, window, HAS_PREFIX_MASK, HAS_WINDOW,
        SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, ALIGNED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
    )  # fmt: skip
    last0 = S - T
    d_query = _d_query_of(
        d_query, query, d_out, lse, delta, last0 + t,
        key_ptr + row * key_row + h * key_head, value_ptr + row * value_row + h * value_head,
        mask_ptr + row * S, key_place, value_place,
        _begin(last0 + first, window, HAS_WINDOW), last0 + behind, S, window, HAS_MASK, HAS_WINDOW,
        SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, ALIGNED, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    d_query = (d_query * SCALE).to(d_query_ptr.dtype.element_ty)
    tl.store(d_query_ptr + out_at[:, None] * WIDTH + column, d_query, mask=inside[:, None] & (column < WIDTH))


@triton.jit(do_not_specialize=_CHANGING)
def attention_d_keys(
    query_ptr,  # (B, Hq, T, d)
    key_ptr,  # (owners, Hkv, length, d): of prefixes if PREFIX, else of the rows
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
    rows_each: tl.int32,  # of a split, if PREFIX
    window: tl.int32,
    query_row: tl.int64,
    query_head: tl.int64,
    query_place: tl.int64,
    key_row: tl.int64,
    key_head: tl.int64,
    key_place: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    value_place: tl.int64,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PREFIX: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """d_value = sum of p d_out and d_key = sum of p (d_out v - delta) slope q, in the order of the queries that see a key:
    those of one row, or of all rows that read a prefix, rows_each of them in each split.

    Grid (owners times blocks of BLOCK_N keys, HEADS, splits).
    """
    if PDL:
        _wait_for_kernel_before()
    blocks = tl.cdiv(length, BLOCK_N)
    h, split = tl.program_id(1), tl.program_id(2)
    owner, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key_ptr += owner * key_row + h * key_head
    value_ptr += owner * value_row + h * value_head
    key = _rows(key_ptr, place.to(tl.int64) * key_place, place < length, WIDTH, BLOCK_D, ALIGNED)
    value = _rows(value_ptr, place.to(tl.int64) * value_place, place < length, VALUE_WIDTH, BLOCK_V, ALIGNED)
    d_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_value = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if PREFIX:
        begin = split * rows_each * T * GROUP
        end = tl.minimum((split + 1) * rows_each, B) * T * GROUP
    else:  # the queries at and behind the first key; and within reach of the last one
        begin = (owner.to(tl.int32) * T + tl.maximum(block * BLOCK_N - last0, 0)) * GROUP
        end = T
        if HAS_WINDOW:
            end = tl.minimum((block + 1) * BLOCK_N - 1 + window - last0, T)
        end = (owner.to(tl.int32) * T + end) * GROUP
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside, t, row = m < end, m // GROUP % T, (m // GROUP // T).to(tl.int64)
        if HAS_INDEX:
            inside = inside & (tl.load(index_ptr + row, mask=inside, other=-1) == owner)
        head = h * GROUP + m % GROUP
        query_at = row * query_row + head * query_head + t * query_place
        out_at = (m // GROUP).to(tl.int64) * (HEADS * GROUP) + head
        query = _rows(query_ptr, query_at, inside, WIDTH, BLOCK_D, ALIGNED)
        d_out = _rows(d_out_ptr, out_at * VALUE_WIDTH, inside, VALUE_WIDTH, BLOCK_V, ALIGNED)
        lse = tl.load(lse_ptr + out_at, mask=inside, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + out_at, mask=inside, other=0.0)
        nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        scores, slope = _scores(_dot(key, tl.trans(query), nothing, PRECISION, INTERPRETED), SCALE, SOFTCAP)
        seen = _seen(place[:, None], (last0 + t)[None, :], length, mask_ptr + owner * length, window, HAS_MASK, HAS_WINDOW)
        weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
        d_value = _dot(weights.to(d_out.dtype), d_out, d_value, PRECISION, INTERPRETED)
        d_weights = _dot(value, tl.trans(d_out), nothing, PRECISION, INTERPRETED)
        d_scores = weights * (d_weights - delta[None, :]) * slope
        d_key = _dot(d_scores.to(query.dtype), query, d_key, PRECISION, INTERPRETED)
    owners = tl.num_programs(0) // blocks
    at = ((split * owners + owner) * length + place) * HEADS + h
    column = tl.arange(0, BLOCK_D)[None, :]
    d_key = (d_key * SCALE).to(d_key_ptr.dtype.element_ty)
    tl.store(d_key_ptr + at[:, None] * WIDTH + column, d_key, mask=(place < length)[:, None] & (column < WIDTH))
    column = tl.arange(0, BLOCK_V)[None, :]
    d_value = d_value.to(d_value_ptr.dtype.element_ty)
    tl.store(d_value_ptr + at[:, None] * VALUE_WIDTH + column, d_value, mask=(place < length)[:, None] & (column < VALUE_WIDTH))
