"""CPT's Triton kernels: one launch in either direction. Numbers are upcast to fp32 before any arithmetic."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .._kernels import wait_for_kernel_before


@triton.jit
def cpt_forward(
    embedding_ptr,  # (P, D)
    delta_ptr,  # (P, D)
    epsilon_ptr,  # (P,)
    rows_ptr,  # (P, D)
    projected_ptr,  # (P, D)
    D,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """projected = delta * min(1, epsilon / |delta|), rounded; rows = embedding + projected.

    A program has one row. It reads delta twice, the second time from the cache.
    """
    if PDL:
        wait_for_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + column
        delta = tl.load(delta_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        squares += delta * delta
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    epsilon = tl.load(epsilon_ptr + row).to(tl.float32)
    is_long = norm > epsilon  # not of NaN, and not of 0: short changes keep their bits
    scale = tl.where(is_long, tl.div_rn(epsilon, tl.where(is_long, norm, 1.0)), 1.0)
    for start in range(0, D, BLOCK_D):
        d = start + column
        delta = tl.load(delta_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        projected = (delta * scale).to(projected_ptr.dtype.element_ty)
        tl.store(projected_ptr + row * D + d, projected, mask=d < D)
        embedding = tl.load(embedding_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        moved = embedding + projected.to(tl.float32)
        tl.store(rows_ptr + row * D + d, moved.to(rows_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def cpt_backward(
    d_rows_ptr,  # (P, D)
    trainable_ptr,  # (P,) bytes of 0 and 1
    d_delta_ptr,  # (P, D)
    D,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """d_delta = d_rows where trainable, else 0, without reading there. A program has BLOCK_D columns of one row."""
    if PDL:
        wait_for_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    width = tl.where(tl.load(trainable_ptr + row) != 0, D, 0)
    value = tl.load(d_rows_ptr + row * D + d, mask=d < width, other=0.0)
    tl.store(d_delta_ptr + row * D + d, value, mask=d < D)
