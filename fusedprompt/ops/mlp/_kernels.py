"""The MLP encoder's Triton kernels: one launch a layer, each weight read once, in either direction. A layer that is
much wider than its input takes one more backward.

With P prompt rows the products are matrix-vector-like: the weights are all the traffic. So the weights are the large
operand, a program owns a strip of them over the whole inner dimension, and bias, activation and dropout mask are
applied before the result leaves registers. Sums run in a fixed order, without atomics. Offsets into weights are
64-bit; those into activations fit 32 bits with at most 128 rows, and halve the registers that addresses take.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._kernels import tanh, wait_for_kernel_before


@triton.jit
def _wait_for_kernel_before(weights):
    """Bring the cache lines of some weights to L2 while the kernel before this one ends; then let the next one start.

    To L2 and no further: who updates the weights may still be running, and what it writes replaces the line there, but
    would not replace what a register holds.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [weights], dtype=tl.int32, is_pure=False, pack=1
    )
    wait_for_kernel_before()


@triton.jit
def _before_activation(d_value, value, mask_ptr, at, inside, ACTIVATION: tl.constexpr, HAS_MASK: tl.constexpr):
    """The gradient of what goes into an activation. value: what it gave, after its mask; d_value: that one's gradient.

    ReLU(x)' is 1 where it gave more than 0; tanh(x)' is 1 - tanh(x)^2.
    """
    if ACTIVATION == "relu":
        d_value = tl.where(value.to(tl.float32) <= 0, 0.0, d_value)
    if HAS_MASK:
        mask = tl.load(mask_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_value *= mask
    if ACTIVATION == "tanh":
        given = value.to(tl.float32)
        if HAS_MASK:
            given /= tl.where(mask == 0, 1.0, mask)
        d_value *= 1 - given * given
    return d_value


@triton.jit(do_not_specialize=["P"])
def linear_forward(
    x_ptr,  # (P, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    mask_ptr,  # (P, N) dropout mask, read if HAS_MASK
    out_ptr,  # (P, N)
    P,
    K,
    N,
    ACTIVATION: tl.constexpr,  # "relu", "tanh", or "" for none
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of the product's operands, to which both are cast in registers
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,  # started before the kernel that writes x has ended
    INTERPRETED: tl.constexpr,
):
    """out = activation(x W^T + b) * mask, computed as (W x^T)^T: BLOCK_N columns by BLOCK_P rows a program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    weight_at = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + p[None, :] * K + k[:, None]
    if PDL:
        line: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
        column = tl.minimum(tl.arange(0, 8) * line, K - 1)
        _wait_for_kernel_before(weight_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + column[None, :])
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        weight = tl.load(
            weight_at + start, mask=(n < N)[:, None] & in_k[None, :], other=0.0, eviction_policy="evict_first"
        )
        x = tl.load(x_at + start, mask=in_k[:, None] & (p < P)[None, :], other=0.0)
        if INTERPRETED:  # its dot multiplies the bits of bf16 numbers
            total += tl.dot(weight.to(COMPUTE).to(tl.float32), x.to(COMPUTE).to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(weight.to(COMPUTE), x.to(COMPUTE), total, input_precision=PRECISION)
    total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # keeps NaN, as torch.relu does
    if ACTIVATION == "tanh":
        total = tanh(total)
    inside = (n < N)[:, None] & (p < P)[None, :]
    at = p[None, :] * N + n[:, None]
    if HAS_MASK:
        total *= tl.load(mask_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P"])
def linear_backward(
    d_out_ptr,  # (P, N)
    x_ptr,  # (P, K) the layer's input: the activation of the layer before
    weight_ptr,  # (N, K)
    mask_ptr,  # (P, K) dropout mask of the layer before, read if HAS_MASK
    d_x_ptr,  # (P, K); (parts, P, K) fp32 if SPLIT
    d_weight_ptr,  # (N, K)
    d_bias_ptr,  # (N,)
    P,
    K,
    N,
    ACTIVATION: tl.constexpr,  # of the layer before
    HAS_MASK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least P: a program sees all rows
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,  # started before the kernel that writes d_out has ended
    INTERPRETED: tl.constexpr,
    SPLIT: tl.constexpr,  # of N each program has a part, and `sum_of_parts` ends what d_x begins
):
    """d_x = (d_out W) * activation' * mask, d_weight = d_out^T x, d_bias = sum of d_out, in one pass over W.

    A program owns BLOCK_K columns of W, or a part of their rows; the first ones also sum the bias gradient.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin, end = 0, N
    if SPLIT:
        size = tl.cdiv(tl.cdiv(N, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        begin = tl.program_id(1) * size
        end = tl.minimum(begin + size, N)
    if PDL:
        first = tl.minimum(begin + n, N - 1).to(tl.int64)
        _wait_for_kernel_before(weight_ptr + first * K + tl.program_id(0) * BLOCK_K)
    inside = (p < P)[:, None] & (k < K)[None, :]
    at = p[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    operand = x.to(COMPUTE).to(tl.float32) if INTERPRETED else x.to(COMPUTE)
    d_x = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_N):
        in_n = n < N - start
        d_out = tl.load(
            d_out_ptr + p[:, None] * N + start + n[None, :],
            mask=(p < P)[:, None] & in_n[None, :],
            other=0.0,
        )
        if tl.program_id(0) == 0:
            d_bias = tl.sum(d_out.to(tl.float32), axis=0)
            tl.store(d_bias_ptr + start + n, d_bias.to(d_bias_ptr.dtype.element_ty), mask=in_n)
        weight_at = (start + n)[:, None].to(tl.int64) * K + k[None, :]
        in_weight = in_n[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + weight_at, mask=in_weight, other=0.0, eviction_policy="evict_first")
        if INTERPRETED:
            gradient = d_out.to(COMPUTE).to(tl.float32)
            d_x += tl.dot(gradient, weight.to(COMPUTE).to(tl.float32), input_precision="ieee")
            d_weight = tl.dot(tl.trans(gradient), operand, input_precision="ieee")
        else:
            gradient = d_out.to(COMPUTE)
            d_x = tl.dot(gradient, weight.to(COMPUTE), d_x, input_precision=PRECISION)
            d_weight = tl.dot(tl.trans(gradient), operand, input_precision=PRECISION)
        tl.store(d_weight_ptr + weight_at, d_weight.to(d_weight_ptr.dtype.element_ty), mask=in_weight)
    if SPLIT:
        d_x_ptr += tl.program_id(1).to(tl.int64) * P * K
    else:
        d_x = _before_activation(d_x, x, mask_ptr, at, inside, ACTIVATION, HAS_MASK)
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_parts(
    parts_ptr,  # (PARTS, P, K) fp32
    x_ptr,  # (P, K), as are the others: see `linear_backward`
    mask_ptr,
    d_x_ptr,
    SIZE,  # P * K
    ACTIVATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """d_x = (sum of parts) * activation' * mask, summed in their order."""
    if PDL:
        wait_for_kernel_before()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * SIZE + at, mask=inside, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    total = _before_activation(total, x, mask_ptr, at, inside, ACTIVATION, HAS_MASK)
    tl.store(d_x_ptr + at, total.to(d_x_ptr.dtype.element_ty), mask=inside)
