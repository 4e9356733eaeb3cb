"""The loss of logits on Triton, and their gradient in the same place: one launch a part, one program a row.

The products before and after it are cuBLAS's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._triton import Launch, supports_pdl
from ._configs import config, configurations, constants
from ._kernels import loss_in_place
from ._op import Implementation, Rows, Scaling


@functools.cache
def _launch(
    vocabulary: int, dtype: torch.dtype, has_factors: bool, trains: bool, scaling: Scaling, pdl: bool
) -> Launch:
    """Made once for all that the kernel is compiled for: see `Launch`."""
    tile = config(vocabulary, dtype.itemsize)
    return Launch(loss_in_place, constants(tile, has_factors, trains, scaling, pdl), tile["num_warps"], pdl=pdl)


def _loss_in_place(logits: Tensor, labels: Tensor, factors: Tensor | None, trains: bool, scaling: Scaling) -> Tensor:
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        launch = _launch(vocabulary, logits.dtype, factors is not None, trains, scaling, supports_pdl(logits.device))
        given = losses if factors is None else factors
        launch((rows, 1, 1), (logits, labels, given, losses), (vocabulary,))
    return losses.sum()


def _all_rows(hidden: Tensor, labels: Tensor, factors: Tensor | None) -> Rows:
    """The kernel passes over those without a label by itself."""
    factors = None if factors is None else factors.to(torch.float32).contiguous()
    return Rows(hidden, labels.contiguous(), factors, None)


IMPLEMENTATION = Implementation("_triton", _all_rows, _loss_in_place)
IMPLEMENTATION.register()

__all__ = ["IMPLEMENTATION", "configurations"]
