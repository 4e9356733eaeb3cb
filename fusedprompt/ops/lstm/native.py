"""The LSTM encoder in C++ (csrc/): one call for the whole stack, forward and backward.

The schemas are here, so that they exist whether or not anything was compiled and whichever library is loaded first;
`fusedprompt._C` and `fusedprompt._cuda` only implement them, for CPU and for CUDA tensors.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import _native
from .._library import LIBRARY, Tensors, is_traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_BATCH = 8  # of the recurrence kernels; larger batches are matrix products, which PyTorch does well

_ARGUMENTS = "Tensor x, Tensor[] weights, Tensor[] dropout_masks, bool bidirectional"
LIBRARY.define(f"lstm_native({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"lstm_native_forward({_ARGUMENTS}) -> (Tensor, Tensor[])")
LIBRARY.define(f"lstm_native_backward(Tensor d_output, {_ARGUMENTS}, Tensor output, Tensor[] saved) -> Tensor[]")


def _fake(x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weights[1].shape[1] * (2 if bidirectional else 1))


def _forward_fake(
    x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool
) -> tuple[Tensor, list[Tensor]]:
    """What is kept: the gates and the cell states of each layer in fp32, and the output of each but the last."""
    directions, size = (2 if bidirectional else 1), weights[1].shape[1]
    batch, steps, _ = x.shape
    saved: list[Tensor] = []
    layers = len(weights) // (4 * directions)
    for layer in range(layers):
        saved.append(x.new_empty(directions, steps, batch, 4 * size, dtype=torch.float32))
        saved.append(x.new_empty(directions, steps, batch, size, dtype=torch.float32))
        if layer + 1 < layers:
            saved.append(x.new_empty(steps, batch, directions * size))
    return _fake(x, weights, dropout_masks, bidirectional), saved


def _backward_fake(d_output: Tensor, x: Tensor, weights: Tensors, *_: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in (x, *weights)]


# Overloads, resolved once: a packet looks for the right one at every call.
_INFERENCE = torch.ops.fusedprompt.lstm_native.default
_FORWARD = torch.ops.fusedprompt.lstm_native_forward.default
_BACKWARD = torch.ops.fusedprompt.lstm_native_backward.default


class _LSTM(torch.autograd.Function):
    """Takes every tensor that may need a gradient once more at the end, where autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensors, masks: Tensors, bidirectional: bool, *_: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output, saved = _FORWARD(x, weights, masks, bidirectional)
        ctx.bidirectional, ctx.num_weights, ctx.num_masks = bidirectional, len(weights), len(masks)
        ctx.save_for_backward(x, output, *weights, *masks, *saved)
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and d_output.requires_grad:
            raise RuntimeError("fusedprompt.ops.lstm has no double backward; use torch.nn.LSTM where you need one")
        x, output, *tensors = ctx.saved_tensors
        masks_end = ctx.num_weights + ctx.num_masks
        weights, masks, saved = tensors[: ctx.num_weights], tensors[ctx.num_weights : masks_end], tensors[masks_end:]
        d_x, *d_weights = _BACKWARD(d_output, x, weights, masks, ctx.bidirectional, output, saved)
        return (d_x, None, None, None, *d_weights)


_apply: Any = _LSTM.apply
# What _LSTM.apply calls after looking for functorch transforms and their leftovers: 5 us with 16 weights.
_apply_untransformed: Any = super(torch.autograd.Function, _LSTM).apply


def _autograd(x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool, apply: Any = _apply) -> Tensor:
    if torch.is_grad_enabled():
        return cast(Tensor, apply(x, weights, dropout_masks, bidirectional, *weights))
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, _INFERENCE(x, weights, dropout_masks, bidirectional))


torch.library.register_fake("fusedprompt::lstm_native", _fake, lib=LIBRARY)
torch.library.register_fake("fusedprompt::lstm_native_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fusedprompt::lstm_native_backward", _backward_fake, lib=LIBRARY)
LIBRARY.impl("lstm_native", _autograd, "Autograd")


def why_not(x: Tensor, *_: Any) -> str | None:
    """None, or one clause that says why the native LSTM cannot run on these arguments."""
    if x.dtype not in DTYPES:
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    if x.shape[0] > MAX_BATCH:
        return f"needs a batch of at most {MAX_BATCH}, got {x.shape[0]}"
    if x.is_cpu:
        return _native.WHY_NOT_CPU
    if x.is_cuda:
        return _native.WHY_NOT_CUDA
    return f"needs a CPU or CUDA tensor, got {x.device.type}"


def lstm(x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool) -> Tensor:
    """dropout_masks: nothing, or per layer but the last a (P, B, directions * H) tensor of 0 and 1 / (1 - p)."""
    if is_traced(x):
        return cast(Tensor, _INFERENCE(x, weights, dropout_masks, bidirectional))
    return _autograd(x, weights, dropout_masks, bidirectional, _apply_untransformed)
