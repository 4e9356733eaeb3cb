"""The MLP encoder on Triton: one launch a layer forward, one a layer backward.

    forward   h_n = relu(W_n h_{n-1} + b_n) * mask_n                       (no relu and mask in the last layer)
    backward  dW_n = dy_n^T h_{n-1},  db_n = sum dy_n,  dy_{n-1} = (dy_n W_n) * (h_{n-1} > 0) * mask_{n-1}

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
from ._configs import backward_config, configurations, constants, forward_config
from ._kernels import linear_backward, linear_forward


def _precision(compute: torch.dtype) -> str:
    return "ieee" if compute == torch.float32 and multiplies_exactly() else "tf32"


# Made once for all that the kernels are compiled for: see `Launch`. sizes: rows, inputs and outputs. flags: whether
# there is a ReLU, a mask, and programmatic dependent launch.


@functools.cache
def _forward_launch(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], compute: torch.dtype, precision: str, *flags: bool
) -> tuple[tuple[int, int, int], Launch]:
    """The grid, and the launch. dtypes: of input, weight and mask."""
    rows, _, outputs = sizes
    config = forward_config(*sizes, (dtypes[0].itemsize, dtypes[1].itemsize), precision)
    grid = (cdiv(outputs, config["BLOCK_N"]), cdiv(rows, config["BLOCK_P"]), 1)
    return grid, _launch(linear_forward, config, compute, precision, flags)


@functools.cache
def _backward_launch(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], compute: torch.dtype, precision: str, *flags: bool
) -> tuple[tuple[int, int, int], Launch]:
    """The grid, and the launch. dtypes: of output, input, weight and mask."""
    config = backward_config(*sizes, dtypes[2].itemsize, compute, precision)
    grid = (cdiv(sizes[1], config["BLOCK_K"]), 1, 1)
    return grid, _launch(linear_backward, config, compute, precision, flags)


def _launch(
    kernel: Any, config: dict[str, int], compute: torch.dtype, precision: str, flags: tuple[bool, ...]
) -> Launch:
    values = constants(config, compute, precision, flags, INTERPRETED)
    return Launch(kernel, values, config["num_warps"], config["num_stages"], values["PDL"])


def _mlp(
    x: Tensor, weights: Tensors, biases: Tensors, dropout_masks: Tensors, compute: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    """The output, and for backward the activations after each ReLU and mask."""
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
        grid, launch = _forward_launch(sizes, dtypes, dtype, precision, is_hidden, has_mask, pdl)
        launch(grid, (inputs, weight, bias.contiguous(), mask, out), sizes)
    return out, layers[:-1]


def _mlp_fake(
    x: Tensor, weights: Tensors, biases: Tensors, dropout_masks: Tensors, compute: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    outputs = [x.new_empty(x.shape[0], weight.shape[0], dtype=compute or x.dtype) for weight in weights]
    return outputs[-1], outputs[:-1]


def _mlp_backward(
    d_out: Tensor, x: Tensor, weights: Tensors, dropout_masks: Tensors, hidden: Tensors, compute: torch.dtype | None
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
        follows_relu = layer > 0
        has_mask = follows_relu and len(dropout_masks) > 0
        mask = dropout_masks[layer - 1].contiguous() if has_mask else inputs
        sizes, dtypes = (rows, width, outputs), (d_out.dtype, inputs.dtype, weight.dtype, mask.dtype)
        grid, launch = _backward_launch(sizes, dtypes, dtype, precision, follows_relu, has_mask, pdl)
        launch(grid, (d_out, inputs, weight, mask, d_inputs, d_weights[layer], d_biases[layer]), sizes)
        d_out = d_inputs
    return [d_out, *d_weights, *d_biases]


def _mlp_backward_fake(d_out: Tensor, x: Tensor, weights: Tensors, *_: Any) -> list[Tensor]:
    d_tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, *weights)]
    return [*d_tensors, *(weight.new_empty(weight.shape[0]) for weight in weights)]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: torch.dtype | None, depth: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: `depth` weights, `depth` biases, and the dropout masks."""
        weights, biases, masks = list(tensors[:depth]), list(tensors[depth : 2 * depth]), list(tensors[2 * depth :])
        run = functools.partial(below_autograd, "mlp_triton") if is_traced(x) else _mlp
        out, hidden = run(x, weights, biases, masks, compute)
        ctx.compute, ctx.depth, ctx.num_masks = compute, depth, len(masks)
        ctx.save_for_backward(x, *weights, *masks, *hidden)
        ctx.mark_non_differentiable(*hidden)
        ctx.set_materialize_grads(False)
        return out, *hidden

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        of_masks: list[None] = [None] * ctx.num_masks
        if d_out is None:
            return (None, None, None, *[None] * (2 * ctx.depth), *of_masks)
        if torch.is_grad_enabled() and d_out.requires_grad:
            raise RuntimeError("fusedprompt.ops.mlp on Triton has no double backward; use backend='reference'")
        x, *tensors = ctx.saved_tensors
        masks_end = ctx.depth + ctx.num_masks
        weights, masks, hidden = tensors[: ctx.depth], tensors[ctx.depth : masks_end], tensors[masks_end:]
        run = torch.ops.fusedprompt.mlp_backward_triton if is_traced(d_out) else _mlp_backward
        d_x, *d_parameters = run(d_out, x, weights, masks, hidden, ctx.compute)
        return (d_x, None, None, *d_parameters, *of_masks)


def _mlp_autograd(
    x: Tensor, weights: Tensors, biases: Tensors, dropout_masks: Tensors, compute: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    apply: Any = _MLP.apply
    out, *hidden = apply(x, compute, len(weights), *weights, *biases, *dropout_masks)
    return out, hidden


define(
    "mlp_triton(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] dropout_masks, ScalarType? compute) "
    "-> (Tensor, Tensor[] hidden)",
    _mlp,
    _mlp_fake,
    _mlp_autograd,
)
define(
    "mlp_backward_triton(Tensor d_out, Tensor x, Tensor[] weights, Tensor[] dropout_masks, "
    "Tensor[] hidden, ScalarType? compute) -> Tensor[]",
    _mlp_backward,
    _mlp_backward_fake,
)


def mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor], dropout_masks: list[Tensor]) -> Tensor:
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    run = torch.ops.fusedprompt.mlp_triton if is_traced(x) else _mlp_autograd
    return cast(Tensor, run(x, weights, biases, dropout_masks, compute)[0])


__all__ = ["configurations", "mlp"]
