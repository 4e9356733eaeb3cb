"""The MLP prompt encoder: y = W_n(...relu(W_0 x + b_0)...) + b_n over the rows of a prompt table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...base import check
from .._backend import Op, never_objects
from .._requirements import why_not_triton
from . import reference

# Above this many rows the products are limited by arithmetic, which cuBLAS does best.
_MOST_TRITON_ROWS = 255
# Its kernels reckon places in activations in 32 bits.
_MOST_TRITON_WIDTH = 2**31 // 256


def _triton(x: Tensor, weights: list[Tensor], biases: list[Tensor], dropout_masks: list[Tensor]) -> Tensor:
    from . import triton

    return triton.mlp(x, weights, biases, dropout_masks)


def _why_not_triton(
    x: Tensor, weights: Sequence[Tensor] = (), biases: Sequence[Tensor] = (), dropout_masks: Sequence[Tensor] = ()
) -> str | None:
    """Also of the rows alone, for `explain`."""
    reason = why_not_triton(x, *weights)
    if reason is not None:
        return reason
    if x.shape[0] > _MOST_TRITON_ROWS:
        return f"takes at most {_MOST_TRITON_ROWS} rows, where cuBLAS is faster, got {x.shape[0]}"
    for layer, weight in enumerate(weights):
        if max(weight.shape) > _MOST_TRITON_WIDTH:
            return f"takes layers of at most {_MOST_TRITON_WIDTH} units, got weights[{layer}] {tuple(weight.shape)}"
        if 0 in weight.shape:
            return f"needs layers of at least one input and output, got weights[{layer}] {tuple(weight.shape)}"
        # A copy would cost more than the whole product; cuBLAS reads a transposed weight in place.
        if not weight.is_contiguous():
            return f"needs contiguous weights, got weights[{layer}] with strides {weight.stride()}"
    return None


OP = Op("mlp")
OP.add("reference", reference.mlp, never_objects)
OP.add("triton", _triton, _why_not_triton)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run prompt rows through a multi-layer perceptron with ReLU between the layers.

    The head of P-tuning (arXiv 2103.10385; PEFT's `PromptEncoder.mlp_head` with three layers).

    Args:
        x: (P, D) prompt rows, floating point.
        weights: one (out, in) matrix per layer, as `nn.Linear.weight`; at least one.
        biases: one (out,) vector per layer.
        dropout: probability of zeroing a hidden activation after each ReLU, in [0, 1). The masks are drawn by torch
            in the order `F.dropout` would draw them, so a seed gives the same result on every backend.
        training: apply dropout.
        backend: "auto", "reference" or "triton" (CUDA; up to 255 rows).

    Returns:
        (P, D_out) in x's dtype (under autocast, in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    _check_arguments(x, weights, biases, dropout)
    masks: list[Tensor] = []
    if training and dropout > 0.0:
        masks = [
            torch.nn.functional.dropout(x.new_ones(x.shape[0], weight.shape[0]), dropout, training=True)
            for weight in weights[:-1]
        ]
    return cast(Tensor, OP.run(backend, x, list(weights), list(biases), masks))


def _check_arguments(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dropout: float) -> None:
    check.tensor("x", x, "(P, D)", 2)
    check.floating("x", x)
    check.probability("dropout", dropout)
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights: expected at least one, and one per bias, got {len(weights)} for {len(biases)} biases"
        )
    width = x.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        name = f"weights[{layer}]"
        check.tensor(name, weight, "(out, in)", 2)
        check.floating(name, weight)
        check.same_device(name, weight, "x", x)
        check.shape(name, weight, "(out, in)", (weight.shape[0], width))
        check.tensor(f"biases[{layer}]", bias, "(out,)", 1)
        check.shape(f"biases[{layer}]", bias, "(out,)", (weight.shape[0],))
        check.same_dtype(f"biases[{layer}]", bias, name, weight)
        check.same_device(f"biases[{layer}]", bias, "x", x)
        if not torch.is_autocast_enabled(x.device.type):
            check.same_dtype(name, weight, "x", x)
        width = weight.shape[0]
