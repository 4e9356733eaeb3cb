"""The MLP prompt encoder: y = W_n(...f(W_0 x + b_0)...) + b_n over the rows of a prompt table, f ReLU or tanh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...base import check
from .._backend import Op, never_objects
from .._requirements import multiplies_exactly, why_not_triton
from . import reference

# The most rows, by what is multiplied; above, cuBLAS does it until a GPU has shown otherwise. Every program reads all
# rows, from L2: at 64 rows of 16 bits and D=4096 that is 67 MB, twice what the weights are.
_MOST_ROWS = 63
# cuBLAS would cast the weights first: 8 bytes moved a weight, where the kernels move 4.
_MOST_CAST_ROWS = 128
# Without tensor cores 32 rows take as long as their weights take to arrive.
_MOST_EXACT_ROWS = 32
# Its kernels reckon places in activations in 32 bits.
_MOST_TRITON_WIDTH = 2**31 // 256
_ACTIVATIONS = ("relu", "tanh")


def _triton(*arguments: Any) -> Tensor:
    from . import triton

    return triton.mlp(*arguments)


def _why_not_triton(x: Tensor, weights: Sequence[Tensor] = (), *others: Any) -> str | None:
    """Also of the rows alone, for `explain`."""
    reason = why_not_triton(x, *weights)
    if reason is not None:
        return reason
    most, products = _most_rows(x, weights)
    if x.shape[0] > most:
        return f"leaves {products} of more than {most} rows to cuBLAS, got {x.shape[0]}"
    for layer, weight in enumerate(weights):
        if max(weight.shape) > _MOST_TRITON_WIDTH:
            return f"takes layers of at most {_MOST_TRITON_WIDTH} units, got weights[{layer}] {tuple(weight.shape)}"
        if 0 in weight.shape:
            return f"needs layers of at least one input and output, got weights[{layer}] {tuple(weight.shape)}"
        # A copy would cost more than the whole product; cuBLAS reads a transposed weight in place.
        if not weight.is_contiguous():
            return f"needs contiguous weights, got weights[{layer}] with strides {weight.stride()}"
    return None


def _most_rows(x: Tensor, weights: Sequence[Tensor]) -> tuple[int, str]:
    """And what has so many at most."""
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if compute == torch.float32 and multiplies_exactly():
        return _MOST_EXACT_ROWS, "exact products in fp32"
    if compute.itemsize < (weights[0] if weights else x).itemsize:
        return _MOST_CAST_ROWS, f"products in {compute} with weights in fp32"
    return _MOST_ROWS, f"products in {'TF32' if compute == torch.float32 else compute}"


OP = Op("mlp")
OP.add("reference", reference.mlp, never_objects)
OP.add("triton", _triton, _why_not_triton)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run prompt rows through a multi-layer perceptron with ReLU or tanh between the layers.

    The head of P-tuning (arXiv 2103.10385; PEFT's `PromptEncoder.mlp_head`, three layers with ReLU), and the projection
    of prefix tuning (arXiv 2101.00190; PEFT's `PrefixEncoder.transform`, two layers with tanh).

    Args:
        x: (P, D) prompt rows, floating point.
        weights: one (out, in) matrix per layer, as `nn.Linear.weight`; at least one.
        biases: one (out,) vector per layer.
        activation: "relu" or "tanh".
        dropout: probability of zeroing a hidden activation, in [0, 1). The masks are drawn by torch
            in the order `F.dropout` would draw them, so a seed gives the same result on every backend.
        training: apply dropout.
        backend: "auto", "reference" or "triton" (CUDA; up to 63 rows, 128 where autocast casts the weights, 32 where
            products are exact in fp32).

    Returns:
        (P, D_out) in x's dtype (under autocast, in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    _check_arguments(x, weights, biases, dropout)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {_ACTIVATIONS}, got {activation!r}")
    masks: list[Tensor] = []
    if training and dropout > 0.0:
        masks = [
            torch.nn.functional.dropout(x.new_ones(x.shape[0], weight.shape[0]), dropout, training=True)
            for weight in weights[:-1]
        ]
    return cast(Tensor, OP.run(backend, x, list(weights), list(biases), masks, activation))


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
