"""The Triton kernel of `head_loss`: one program a row of logits, which become their own gradient.

A row is read twice and written once: 6 bytes a logit of 16 bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._kernels import tanh, wait_for_kernel_before


@triton.jit
def _capped(logits_ptr, at, inside, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """The logits that the loss is of; -inf outside of a row."""
    value = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32) * SCALE
    if SOFT_CAP > 0:
        value = tl.where(inside, SOFT_CAP * tanh(value / SOFT_CAP), float("-inf"))
    elif SCALE <= 0:
        value = tl.where(inside, value, float("-inf"))
    return value


@triton.jit
def loss_in_place(
    logits_ptr,  # (R, V); becomes d_losses / d_logits, times the factors, if TRAINS
    labels_ptr,  # (R,) int64
    factors_ptr,  # (R,) fp32, read if HAS_FACTORS
    losses_ptr,  # (R,) fp32
    V,
    HAS_FACTORS: tl.constexpr,
    TRAINS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # 0 for none
    IGNORED: tl.constexpr,  # the label of rows that count nothing
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """loss = (log sum exp y - y[label]) * factor, where y = SOFT_CAP * tanh(SCALE * logits / SOFT_CAP).

    A label outside of the row makes its loss and its gradient NaN.
    """
    if PDL:
        wait_for_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * V
    column = tl.arange(0, BLOCK)
    if label == IGNORED:
        tl.store(losses_ptr + row, 0.0)
        if TRAINS:
            for start in range(0, V, BLOCK):
                at = start + column
                tl.store(logits_ptr + at, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=at < V)
    else:
        factor = 1.0
        if HAS_FACTORS:
            factor = tl.load(factors_ptr + row)
        is_inside = (label >= 0) & (label < V)
        factor = tl.where(is_inside, factor, float("nan"))
        own = _capped(logits_ptr, label, is_inside, SCALE, SOFT_CAP)
        # Each place of a block keeps its own maximum and sum, so that no step waits for the others of its program.
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + column
            value = _capped(logits_ptr, at, at < V, SCALE, SOFT_CAP)
            new = tl.maximum(largest, value)
            shift = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
            total = total * tl.exp(largest - shift) + tl.exp(value - shift)
            largest = new
        most = tl.max(largest, axis=0)
        total = tl.sum(total * tl.exp(largest - tl.where(most == float("-inf"), 0.0, most)), axis=0)
        # The row's own largest logit has the loss log(total) exactly.
        tl.store(losses_ptr + row, (most - own + tl.log(total)) * factor)
        if TRAINS:
            for start in tl.range(0, V, BLOCK, num_stages=STAGES):
                at = start + column
                value = _capped(logits_ptr, at, at < V, SCALE, SOFT_CAP)
                softmax = tl.exp(value - most) / total
                gradient = (softmax - tl.where(at == label, 1.0, 0.0)) * factor * SCALE
                if SOFT_CAP > 0:
                    gradient *= 1 - (value / SOFT_CAP) * (value / SOFT_CAP)
                tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)
