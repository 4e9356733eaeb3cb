"""The MLP encoder on Triton: one launch a layer forward, one a layer backward, and two for a layer of more than 16384
outputs.

    forward   h_n = f(W_n h_{n-1} + b_n) * mask_n                          (no f and mask in the last layer)
    backward  dW_n = dy_n^T h_{n-1},  db_n = sum dy_n,  dy_{n-1} = (dy_n W_n) * mask_{n-1} * f'
    f'        of ReLU 1 where h_{n-1} > 0, of tanh 1 - (h_{n-1} / mask_{n-1})^2

Under autocast the parameters are cast in registers, and their gradients are written in the parameters' own dtype: no
16-bit copy of a weight or of a gradient exists. Sums are in fp32. Backward computes every gradient, also those that
autograd drops. Products of fp32 operands are exact or TF32, as cuBLAS has them under
`torch.set_float32_matmul_precision`: "highest" means IEEE fp32, "high" and "medium" mean TF32.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from .._library import Tensors, below_autograd, define, is_traced
from .._requirements import multiplies_exactly
from .._triton import INTERPRETED, Launch, cdiv, supports_pdl
from ._configs import SUM_TILE, backward_config, backward_constants, configurations, constants, forward_config, split
from ._kernels import linear_backward, linear_forward, sum_of_parts


def _precision(compute: torch.dtype) -> str:
    return "ieee" if compute == torch.float32 and multiplies_exactly() else "tf32"


# Made once for all that the kernels are compiled for: see `Launch`. sizes: rows, inputs and outputs. activation: of the
# layer, or "". flags: whether there is a mask, and programmatic dependent launch.


@functools.cache
def _forward_launch(
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    precision: str,
    activation: str,
    *flags: bool,
) -> tuple[tuple[int, int, int], Launch]:
    """The grid, and the launch. dtypes: of input, weight and mask."""
    rows, _, outputs = sizes
    tile = forward_config(*sizes, (dtypes[0].itemsize, dtypes[1].itemsize), precision)
    grid = (cdiv(outputs, tile["BLOCK_N"]), cdiv(rows, tile["BLOCK_P"]), 1)
    values = constants(tile, compute, precision, activation, flags, INTERPRETED)
    return grid, Launch(linear_forward, values, tile["num_warps"], tile["num_stages"], values["PDL"])


@functools.cache
def _backward_launch(
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    precision: str,
    activation: str,
    *flags: bool,
) -> tuple[tuple[int, int, int], Launch]:
    """The grid, and the launch. dtypes: of output, input, weight and mask. activation: of the layer before."""
    _, inputs, outputs = sizes
    tile = backward_config(*sizes, dtypes[2].itemsize, compute, precision)
    grid = (cdiv(inputs, tile["BLOCK_K"]), split(inputs, outputs, tile), 1)
    values = backward_constants(tile, compute, precision, activation, flags, INTERPRETED, grid[1] > 1)
    return grid, Launch(linear_backward, values, tile["num_warps"], tile["num_stages"], values["PDL"])


@functools.cache
def _sum_launch(
    size: int, parts: int, dtypes: tuple[torch.dtype, ...], activation: str, *flags: bool
) -> tuple[tuple[int, int, int], Launch]:
    """The grid, and the launch. dtypes: of input and mask."""
    names = ("ACTIVATION", "HAS_MASK", "PARTS", "BLOCK", "PDL")
    values = dict(zip(names, (activation, flags[0], parts, SUM_TILE["BLOCK"], flags[1])))
    launch = Launch(sum_of_parts, values, SUM_TILE["num_warps"], SUM_TILE["num_stages"], flags[1])
    return (cdiv(size, SUM_TILE["BLOCK"]), 1, 1), launch


def _mlp(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    dropout_masks: Tensors,
    compute: torch.dtype | None,
    activation: str = "relu",
) -> tuple[Tensor, list[Tensor]]:
    """The output, and for backward the activations after their masks."""
    dtype, rows, pdl = compute or x.dtype, x.shape[0], supports_pdl(x.device)
    precision = _precision(dtype)
    out, layers = x.contiguous(), []
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        outputs, width = weight.shape
        inputs, out = out, x.new_empty(rows, outputs, dtype=dtype)
        layers.append(out)
        if rows == 0:
            continue
        is_hidden = layer + 1 < len(weights)
        has_mask = is_hidden and len(dropout_masks) > 0
        mask = dropout_masks[layer].contiguous() if has_mask else inputs
        sizes, dtypes = (rows, width, outputs), (inputs.dtype, weight.dtype, mask.dtype)
        own = activation if is_hidden else ""
        grid, launch = _forward_launch(sizes, dtypes, dtype, precision, own, has_mask, pdl)
        launch(grid, (inputs, weight, bias.contiguous(), mask, out), sizes)
    return out, layers[:-1]


def _mlp_fake(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    dropout_masks: Tensors,
    compute: torch.dtype | None,
    activation: str = "relu",
) -> tuple[Tensor, list[Tensor]]:
    outputs = [x.new_empty(x.shape[0], weight.shape[0], dtype=compute or x.dtype) for weight in weights]
    return outputs[-1], outputs[:-1]


def _mlp_backward(
    d_out: Tensor,
    x: Tensor,
    weights: Tensors,
    dropout_masks: Tensors,
    hidden: Tensors,
    compute: torch.dtype | None,
    activation: str = "relu",
) -> list[Tensor]:
    """Gradients of x, of every weight, and of every bias."""
    dtype, rows, pdl = compute or x.dtype, x.shape[0], supports_pdl(x.device)
    precision = _precision(dtype)
    activations = [x.contiguous(), *hidden]
    d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    d_biases = [weight.new_empty(weight.shape[0]) for weight in weights]
    d_out = d_out.contiguous()
    for layer in range(len(weights) - 1, -1, -1):
        weight, inputs = weights[layer], activations[layer]
        outputs, width = weight.shape
        d_inputs = torch.empty_like(inputs)
        if rows == 0:
            d_weights[layer].zero_()
            d_biases[layer].zero_()
            d_out = d_inputs
            continue
        before, has_mask = (activation, len(dropout_masks) > 0) if layer else ("", False)
        mask = dropout_masks[layer - 1].contiguous() if has_mask else inputs
        sizes, dtypes = (rows, width, outputs), (d_out.dtype, inputs.dtype, weight.dtype, mask.dtype)
        grid, launch = _backward_launch(sizes, dtypes, dtype, precision, before, has_mask, pdl)
        parts = grid[1]
        summed = d_inputs if parts == 1 else inputs.new_empty(parts, rows, width, dtype=torch.float32)
        launch(grid, (d_out, inputs, weight, mask, summed, d_weights[layer], d_biases[layer]), sizes)
        if parts > 1:
            size = rows * width
            grid, launch = _sum_launch(size, parts, (inputs.dtype, mask.dtype), before, has_mask, pdl)
            launch(grid, (summed, inputs, mask, d_inputs), (size,))
        d_out = d_inputs
    return [d_out, *d_weights, *d_biases]


def _mlp_backward_fake(d_out: Tensor, x: Tensor, weights: Tensors, *_: Any) -> list[Tensor]:
    d_tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, *weights)]
    return [*d_tensors, *(weight.new_empty(weight.shape[0]) for weight in weights)]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: torch.dtype | None, activation: str, depth: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """tensors: `depth` weights, `depth` biases, and the dropout masks."""
        weights, biases, masks = list(tensors[:depth]), list(tensors[depth : 2 * depth]), list(tensors[2 * depth :])
        run = functools.partial(below_autograd, "mlp_triton") if is_traced(x) else _mlp
        out, hidden = run(x, weights, biases, masks, compute, activation)
        ctx.compute, ctx.activation, ctx.depth, ctx.num_masks = compute, activation, depth, len(masks)
        ctx.save_for_backward(x, *weights, *masks, *hidden)
        ctx.mark_non_differentiable(*hidden)
        ctx.set_materialize_grads(False)
        return out, *hidden

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        of_masks: list[None] = [None] * ctx.num_masks
        if d_out is None:
            return (None, None, None, None, *[None] * (2 * ctx.depth), *of_masks)
        if torch.is_grad_enabled() and d_out.requires_grad:
            raise RuntimeError("fusedprompt.ops.mlp on Triton has no double backward; use backend='reference'")
        x, *tensors = ctx.saved_tensors
        masks_end = ctx.depth + ctx.num_masks
        weights, masks, hidden = tensors[: ctx.depth], tensors[ctx.depth : masks_end], tensors[masks_end:]
        run = torch.ops.fusedprompt.mlp_backward_triton if is_traced(d_out) else _mlp_backward
        d_x, *d_parameters = run(d_out, x, weights, masks, hidden, ctx.compute, ctx.activation)
        return (d_x, None, None, None, *d_parameters, *of_masks)


def _mlp_autograd(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    dropout_masks: Tensors,
    compute: torch.dtype | None,
    activation: str = "relu",
) -> tuple[Tensor, list[Tensor]]:
    apply: Any = _MLP.apply
    out, *hidden = apply(x, compute, activation, len(weights), *weights, *biases, *dropout_masks)
    return out, hidden


define(
    "mlp_triton(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] dropout_masks, ScalarType? compute, "
    "str activation='relu') -> (Tensor, Tensor[] hidden)",
    _mlp,
    _mlp_fake,
    _mlp_autograd,
)
define(
    "mlp_backward_triton(Tensor d_out, Tensor x, Tensor[] weights, Tensor[] dropout_masks, "
    "Tensor[] hidden, ScalarType? compute, str activation='relu') -> Tensor[]",
    _mlp_backward,
    _mlp_backward_fake,
)


def mlp(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], dropout_masks: list[Tensor], activation: str = "relu"
) -> Tensor:
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    run = torch.ops.fusedprompt.mlp_triton if is_traced(x) else _mlp_autograd
    return cast(Tensor, run(x, weights, biases, dropout_masks, compute, activation)[0])


__all__ = ["configurations", "mlp"]
