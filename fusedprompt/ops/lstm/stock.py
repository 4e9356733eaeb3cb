"""PyTorch's own LSTM, for the reference: oneDNN's kernels on CPU, cuDNN's on a GPU.

On CPU in fp32 it serves forward and backward. In bf16 its forward is as accurate as the loop's and takes a third to two
thirds of the time; its backward has errors of rounding only on an AMD EPYC with AVX-512, for H from 1 to 1500 against
fp64, but on an Intel Xeon (torch 2.13) a weight gradient was 100 % off at P = 100, D = H = 1024. Whether AMX is what
decides is not known; with it, and where it is the slower one, it does not run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HAS_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # without, PyTorch's bf16 LSTM keeps c in bf16
_HAS_AMX: bool = torch.cpu._is_amx_tile_supported()
# Up to this H oneDNN's bf16 backward is mostly the faster one; ours was 1.4 to 3 times as fast at 512, 4.5 to 6
# times at 768 and 1024 (forward and backward).
_SMALL_HIDDEN = 256


def has_forward(x: Tensor) -> bool:
    """Whether the reference's forward is PyTorch's, on CPU."""
    return x.is_cpu and (x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and _HAS_BF16))


def has_backward(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the backward is PyTorch's too, given that the forward is."""
    return x.dtype is torch.float32 or (not _HAS_AMX and weights[1].shape[1] <= _SMALL_HIDDEN)


def by_layer(weights: Sequence[Tensor], directions: int) -> list[list[Sequence[Tensor]]]:
    """Group nn.LSTM's flat parameters as [layer][direction] -> (weight_ih, weight_hh, bias_ih, bias_hh)."""
    groups = [weights[start : start + 4] for start in range(0, len(weights), 4)]
    return [groups[start : start + directions] for start in range(0, len(groups), directions)]


def refuse_double_backward(d_output: Tensor) -> None:
    """Called with the gradient of the LSTM's output; raises where it is to be differentiated again."""
    if torch.is_grad_enabled() and d_output.requires_grad:
        raise RuntimeError("fusedprompt.ops.lstm has no double backward; use torch.nn.LSTM where you need one")


def _call(x: Tensor, weights: Sequence[Tensor], num_layers: int, bidirectional: bool, batch_first: bool) -> Tensor:
    batch = x.shape[0 if batch_first else 1]
    zeros = x.new_zeros(num_layers * (2 if bidirectional else 1), batch, weights[1].shape[1])
    output: Tensor = torch._VF.lstm(  # type: ignore[call-overload]
        x, (zeros, zeros), weights, True, num_layers, 0.0, torch.is_grad_enabled(), bidirectional, batch_first
    )[0]
    return output


def layer(sequence: Tensor, weights: list[Sequence[Tensor]]) -> Tensor:
    """One layer: (P, B, D) to (P, B, directions * H)."""
    directions, (steps, batch, _), size = len(weights), sequence.shape, weights[0][1].shape[1]
    if steps * batch * size == 0:
        return sequence.new_empty(steps, batch, directions * size)
    # oneDNN's training kernel always: the one for inference is at most 5 % faster, and its bits differ.
    with torch.enable_grad():
        return _call(sequence, [weight for way in weights for weight in way], 1, directions == 2, False)


def lstm(x: Tensor, weights: Sequence[Tensor], dropout_masks: Sequence[Tensor], bidirectional: bool) -> Tensor:
    """The whole stack with PyTorch's backward. PyTorch would draw masks of its own, so with masks it goes by layers."""
    directions = 2 if bidirectional else 1
    if not dropout_masks:
        output = _call(x, weights, len(weights) // (4 * directions), bidirectional, True)
    else:
        layers = by_layer(weights, directions)
        output = x.transpose(0, 1)
        for index, of_layer in enumerate(layers):
            output = layer(output, of_layer)
            if index + 1 < len(layers):
                output = output * dropout_masks[index]
        output = output.transpose(0, 1)
    if output.requires_grad:
        output.register_hook(refuse_double_backward)  # type: ignore[no-untyped-call]
    return output
