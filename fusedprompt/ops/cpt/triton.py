"""CPT's projection on Triton: one launch forward, one backward. Sums have a fixed order, without atomics."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._library import define, is_traced
from .._triton import Launch, cdiv, supports_pdl
from ._configs import config, configurations
from ._kernels import cpt_backward, cpt_forward
from ._op import register

# Made once for all that the kernels are compiled for: see `Launch`.


@functools.cache
def _launch(kernel: Any, width: int, dtypes: tuple[torch.dtype, ...], pdl: bool) -> tuple[int, Launch]:
    """Columns of a program, and the launch."""
    tile = config(width)
    constants = {"BLOCK_D": tile["BLOCK_D"], "PDL": pdl}
    return tile["BLOCK_D"], Launch(kernel, constants, num_warps=tile["num_warps"], pdl=pdl)


def _cpt(embedding: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor) -> tuple[Tensor, Tensor]:
    rows, projected = _cpt_fake(embedding, delta, epsilon, trainable)
    if rows.numel():
        count, width = rows.shape
        _, launch = _launch(cpt_forward, width, (rows.dtype, epsilon.dtype), supports_pdl(rows.device))
        given = (embedding.contiguous(), delta.contiguous(), epsilon.contiguous())
        launch((count, 1, 1), (*given, rows, projected), (width,))
    return rows, projected


def _cpt_fake(embedding: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor) -> tuple[Tensor, Tensor]:
    return embedding.new_empty(embedding.shape), delta.new_empty(delta.shape)


def _cpt_backward(d_rows: Tensor, trainable: Tensor) -> Tensor:
    d_delta = d_rows.new_empty(d_rows.shape)
    if d_delta.numel():
        count, width = d_delta.shape
        block, launch = _launch(cpt_backward, width, (d_rows.dtype,), supports_pdl(d_rows.device))
        given = (d_rows.contiguous(), trainable.contiguous().view(torch.uint8))
        launch((count, cdiv(width, block), 1), (*given, d_delta), (width,))
    return d_delta


define(
    "cpt_backward_triton(Tensor d_rows, Tensor trainable) -> Tensor",
    _cpt_backward,
    lambda d_rows, trainable: d_rows.new_empty(d_rows.shape),
)


def _backward(d_rows: Tensor, trainable: Tensor) -> Tensor:
    if torch.is_grad_enabled() and d_rows.requires_grad:
        raise RuntimeError("fusedprompt.ops.cpt on Triton has no double backward; use backend='reference'")
    run = torch.ops.fusedprompt.cpt_backward_triton if is_traced(d_rows) else _cpt_backward
    d_delta: Tensor = run(d_rows, trainable)
    return d_delta


cpt = register("_triton", _cpt, _cpt_fake, _backward)

__all__ = ["configurations", "cpt"]
