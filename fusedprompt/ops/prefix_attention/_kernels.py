"""The forward Triton kernel of prefix_attention, and what it shares with those of the backward pass.

Queries are numbered m = (b T + t) GROUP + g in each head of keys: the heads of a group, which read the same keys, stand
beside each other. Query t of a row sees keys up to place S - T + t of its own, and N + S - T + t of the prefix: all of
it. Strides count rows of WIDTH (or VALUE_WIDTH) numbers, so that what divides an address is known. Offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._kernels import tanh, wait_for_kernel_before

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# No batch, no text length and no layout may compile anything.
CHANGING = ["B", "T", "S", "N", "A", "length", "last0", "rows_each"]
CHANGING += [f"{tensor}_{along}" for tensor in ("query", "prefix", "key") for along in ("row", "head", "place")]


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a b in fp32. The interpreter multiplies the bits of bf16 numbers."""
    if INTERPRETED:
        total += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def load_rows(base_ptr, row, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK): rows of WIDTH numbers by their number in memory; zeros behind them, and where not inside."""
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(base_ptr + row[:, None] * WIDTH + column, mask=inside[:, None] & (column < WIDTH), other=0.0)


@triton.jit
def store_rows(base_ptr, row, value, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse."""
    column, value = tl.arange(0, BLOCK)[None, :], value.to(base_ptr.dtype.element_ty)
    tl.store(base_ptr + row[:, None] * WIDTH + column, value, mask=inside[:, None] & (column < WIDTH))


@triton.jit
def score(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in powers of 2, and d scores / d products, but for the scale: 1 without a soft cap."""
    scores = products * SCALE
    slope = 1.0
    if SOFTCAP > 0:
        share = tanh(scores / SOFTCAP)
        scores = share * SOFTCAP
        slope = 1 - share * share
    return scores * LOG2_E, slope


@triton.jit
def is_seen(place, last, length, mask_ptr, HAS_MASK: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries, whose last keys are at `last`, see the keys at `place`; one of both is a row, one a column."""
    seen = (place < length) & (place <= last)
    if WINDOW > 0:
        seen = seen & (place > last - WINDOW)
    if HAS_MASK:
        seen = seen & (tl.load(mask_ptr + place, mask=place < length, other=0) != 0)
    return seen


@triton.jit
def first_seen(last, WINDOW: tl.constexpr):
    """The first key that a query sees."""
    return tl.maximum(last - WINDOW + 1, 0) if WINDOW > 0 else 0


@triton.jit
def queries_of_a_row(T, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a program's block: the row, its queries' numbers and where the row's end; its first t, and its last + 1."""
    blocks = tl.cdiv(T * GROUP, BLOCK_M)
    row, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    m, end = row * T * GROUP + start + tl.arange(0, BLOCK_M), (row + 1) * T * GROUP
    return row.to(tl.int64), m, end, start // GROUP, tl.minimum((start + BLOCK_M - 1) // GROUP + 1, T)


@triton.jit
def addresses(m, h, heads, T, query_row, query_head, query_place, GROUP: tl.constexpr):
    """Of queries: their t, and their rows in the query's memory and in that of (B, T, Hq, .)."""
    row, t, head = (m // GROUP // T).to(tl.int64), m // GROUP % T, h * GROUP + m % GROUP
    return t, row * query_row + head * query_head + t * query_place, (row * T + t) * heads * GROUP + head


@triton.jit
def _attend_to(
    most,  # (M,) the largest score so far,
    total,  # (M,) the sum of weights,
    sums,  # (M, BLOCK_V) and of weighted values
    query,  # (M, BLOCK_D)
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
    """A softmax, gone on with over the keys from begin to end."""
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        row = place.to(tl.int64) * key_place
        key = load_rows(key_ptr, row, place < length, WIDTH, BLOCK_D)
        value = load_rows(value_ptr, row, place < length, VALUE_WIDTH, BLOCK_V)
        nothing = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
        scores, _ = score(dot(query, tl.trans(key), nothing, PRECISION, INTERPRETED), SCALE, SOFTCAP)
        seen = is_seen(place[None, :], last[:, None], length, mask_ptr, HAS_MASK, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weights, axis=1)
        sums = dot(weights.to(value.dtype), value, sums * fade[:, None], PRECISION, INTERPRETED)
        most = new
    return most, total, sums


@triton.jit
def _begin(ptr, lse_ptr, out_at, inside, GOES_ON: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr):
    """A softmax over nothing, or over what others saw: see `_attend_to`."""
    if GOES_ON:
        most = tl.load(lse_ptr + out_at, mask=inside, other=float("inf")) * LOG2_E
        total = tl.where(most == float("inf"), 0.0, 1.0)
        most = tl.where(total == 0, float("-inf"), most)
        sums = load_rows(ptr, out_at, inside, WIDTH, BLOCK_V)
    else:
        total = tl.zeros(out_at.shape, tl.float32)
        most = total - float("inf")
        sums = tl.zeros((out_at.shape[0], BLOCK_V), tl.float32)
    return most, total, sums


@triton.jit(do_not_specialize=CHANGING)
def attention_forward(
    query_ptr,  # (B, Hq, T, d)
    prefix_key_ptr,  # (A, Hkv, N, d), read unless PART is "own"
    prefix_value_ptr,  # (A, Hkv, N, dv)
    key_ptr,  # (B, Hkv, S, d), read unless PART is "prefix"
    value_ptr,  # (B, Hkv, S, dv)
    index_ptr,  # (B,) int64, read if HAS_INDEX
    prefix_mask_ptr,  # (A, N) uint8, read if HAS_PREFIX_MASK
    mask_ptr,  # (B, S) uint8, read if HAS_MASK
    before_ptr,  # (B, T, Hq, dv) fp32, and
    before_lse_ptr,  # (B, T, Hq) fp32: what "prefix" gave, read if PART is "own"
    out_ptr,  # (B, T, Hq, dv)
    lse_ptr,  # (B, T, Hq) fp32
    B: tl.int32,
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
    PART: tl.constexpr,  # "both" kinds of keys, or one
    GROUP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    WIDTH: tl.constexpr,  # d
    VALUE_WIDTH: tl.constexpr,  # dv
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = softmax(scores) v and log(sum of exp(scores)), over the prefix and then over the row's own keys; 0 and inf
    where nothing is seen. Grid (B times blocks of BLOCK_M queries, Hkv); for the prefix alone, blocks of all rows."""
    if PDL:
        wait_for_kernel_before()
    h, heads = tl.program_id(1), tl.num_programs(1)
    if PART == "prefix":
        row, first, behind = tl.zeros((), tl.int64), 0, T
        m, end = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), B * T * GROUP
    else:
        row, m, end, first, behind = queries_of_a_row(T, GROUP, BLOCK_M)
    inside, own = m < end, row * key_row + h * key_head
    t, query_at, out_at = addresses(m, h, heads, T, query_row, query_head, query_place, GROUP)
    query = load_rows(query_ptr, query_at, inside, WIDTH, BLOCK_D)
    most, total, sums = _begin(before_ptr, before_lse_ptr, out_at, inside, PART == "own", VALUE_WIDTH, BLOCK_V)
    if PART != "own":
        number = tl.load(index_ptr + row) if HAS_INDEX else row * 0
        is_wrong = (number < -1) | (number >= A)  # of a prefix that is none all is NaN
        stop, total = tl.where((number < 0) | is_wrong, 0, N), tl.where(is_wrong, float("nan"), total)
        prefix = number * prefix_row + h * prefix_head
        most, total, sums = _attend_to(
            most, total, sums, query, N + S - T + t, prefix_key_ptr + prefix * WIDTH,
            prefix_value_ptr + prefix * VALUE_WIDTH, prefix_mask_ptr + number * N, prefix_place,
            first_seen(N + S - T + first, WINDOW), stop, N, HAS_PREFIX_MASK, WINDOW,
            SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
        )  # fmt: skip
    if PART != "prefix":
        most, total, sums = _attend_to(
            most, total, sums, query, S - T + t, key_ptr + own * WIDTH, value_ptr + own * VALUE_WIDTH,
            mask_ptr + row * S, key_place, first_seen(S - T + first, WINDOW), S - T + behind, S, HAS_MASK,
            WINDOW, SCALE, SOFTCAP, WIDTH, VALUE_WIDTH, PRECISION, BLOCK_N, BLOCK_D, BLOCK_V, INTERPRETED,
        )  # fmt: skip
    lse = tl.where(total == 0, float("inf"), (most + tl.log2(total)) * LN_2)
    sums = sums / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(lse_ptr + out_at, lse, mask=inside)
    store_rows(out_ptr, out_at, sums, inside, VALUE_WIDTH, BLOCK_V)
