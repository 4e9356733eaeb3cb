"""The Triton kernels of splice, apart from the code that launches them: Triton's functions have no types to check.

Row offsets are 64-bit: B * S * D passes 2**31 in real batches.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._kernels import wait_for_kernel_before

# Sizes that change from batch to batch: no text length may compile anything.
_CHANGING = ["R", "S", "T", "V", "filled_stride", "fill0", "fill1", "fill2", "step0", "step1", "step2"]


@triton.jit
def _carry(field_ptr, filled_ptr, token_at, at, inside, is_token, is_prompt, prompt_row, fill, step, R):
    """filled = fill + step * prompt row, or the token's value + step * R; step is 1 for position ids, else 0."""
    value = tl.load(field_ptr + token_at, mask=is_token, other=0) + step * R
    value = tl.where(is_prompt, fill + step * prompt_row, value)
    tl.store(filled_ptr + at, value.to(filled_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sources(slots_ptr, s, at, inside, R, T, PREFIX: tl.constexpr):
    """Of columns s: the slot, the prompt row that a negative one means, and which of them are prompt and token."""
    if PREFIX:
        prompt_row = s.to(tl.int64)
        slot = prompt_row - R
        is_prompt = inside & (slot < 0)
        is_token = inside & (slot >= 0)
    else:
        slot = tl.load(slots_ptr + at, mask=inside, other=0)
        prompt_row = -1 - slot
        is_prompt = inside & (slot < 0) & (prompt_row < R)
        is_token = inside & (slot >= 0) & (slot < T)
    return slot, prompt_row, is_prompt, is_token


@triton.jit(do_not_specialize=_CHANGING)
def splice_forward(
    prompt_ptr,  # (R, D)
    slots_ptr,  # (B, S) int64, read unless PREFIX
    ids_ptr,  # (B, T) ids, read if FROM_TABLE
    rows_ptr,  # (V, D) table if FROM_TABLE, else (B, T, D)
    field0_ptr,  # (B, T), as are the next two, as far as NUM_FIELDS goes
    field1_ptr,
    field2_ptr,
    out_ptr,  # (B, S, D)
    filled_ptr,  # (NUM_FIELDS, B, S)
    R: tl.int32,
    S: tl.int32,
    T: tl.int32,
    D,
    V: tl.int32,
    filled_stride: tl.int64,  # B * S
    fill0: tl.int64,
    fill1: tl.int64,
    fill2: tl.int64,
    step0: tl.int32,
    step1: tl.int32,
    step2: tl.int32,
    PREFIX: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    TABLE_POLICY: tl.constexpr,  # what L2 shall do with the table's rows
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[b, s] = prompt[~slot] if slot < 0 else token row `slot`; NaN for an id or a slot outside its table.
    Grid (B * cdiv(S, ROWS),): a program writes ROWS rows of one b, BLOCK_D columns at a time."""
    if PDL:
        wait_for_kernel_before()
    tiles = tl.cdiv(S, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    s = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = s < S
    at = b * S + s
    slot, prompt_row, is_prompt, is_token = _sources(slots_ptr, s, at, inside, R, T, PREFIX)
    token_at = b * T + slot
    if FROM_TABLE:
        row = tl.load(ids_ptr + token_at, mask=is_token, other=0).to(tl.int64)
        from_rows = is_token & (row >= 0) & (row < V)
    else:
        row, from_rows = token_at, is_token
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D))[None, :]
        in_row = d < D
        # A vocabulary may be read many times, ready-made rows are read once.
        taken = tl.load(
            rows_ptr + row[:, None] * D + d,
            mask=from_rows[:, None] & in_row,
            other=0.0,
            eviction_policy=TABLE_POLICY if FROM_TABLE else "evict_first",
        )
        prompt = tl.load(
            prompt_ptr + prompt_row[:, None] * D + d,
            mask=is_prompt[:, None] & in_row,
            other=0.0,
            eviction_policy="evict_last",
        )
        value = tl.where(from_rows[:, None], taken.to(tl.float32), float("nan"))
        value = tl.where(is_prompt[:, None], prompt.to(tl.float32), value)
        tl.store(
            out_ptr + at[:, None] * D + d,
            value.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & in_row,
            cache_modifier=".cs",
        )
    if NUM_FIELDS > 0:
        _carry(field0_ptr, filled_ptr, token_at, at, inside, is_token, is_prompt, prompt_row, fill0, step0, R)
    if NUM_FIELDS > 1:
        at1 = at + filled_stride
        _carry(field1_ptr, filled_ptr, token_at, at1, inside, is_token, is_prompt, prompt_row, fill1, step1, R)
    if NUM_FIELDS > 2:
        at2 = at + filled_stride + filled_stride
        _carry(field2_ptr, filled_ptr, token_at, at2, inside, is_token, is_prompt, prompt_row, fill2, step2, R)


@triton.jit(do_not_specialize=["B"])
def splice_prefix_backward(
    d_out_ptr,  # (B, S, D), rows contiguous
    d_prompt_ptr,  # (R, D) fp32
    B: tl.int32,
    stride_b,
    stride_s,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """d_prompt[r] = sum over b of d_out[b, r], in fp32 and always in the same order; ROWS batch rows in flight."""
    if PDL:
        wait_for_kernel_before()
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, B, ROWS):
        b = start + tl.arange(0, ROWS)
        at = (b.to(tl.int64) * stride_b + r * stride_s)[:, None] + d[None, :]
        total += tl.load(d_out_ptr + at, mask=(b < B)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(d_prompt_ptr + r * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def segment_sum(
    rows_ptr,  # (N, D)
    order_ptr,  # (N,) int64: rows sorted by target, stable
    bounds_ptr,  # (targets + 1,) int64: target t has the places bounds[t] ... bounds[t + 1] - 1 of `order`
    out_ptr,  # (targets, D)
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = sum of the rows whose target is t, in fp32 and always in the same order; ROWS of them in flight."""
    if PDL:
        wait_for_kernel_before()
    target = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(bounds_ptr + target + 1)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(tl.load(bounds_ptr + target), end, ROWS):
        place = start + tl.arange(0, ROWS)
        row = tl.load(order_ptr + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (d < D)[None, :]
        total += tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + target * D + d, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=d < D)
