"""The MLP encoder in plain PyTorch.

Composite: autograd, autocast and Inductor see the matrix products themselves, so compiled code fuses them as usual.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .._library import LIBRARY, is_traced


def _mlp(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], dropout_masks: list[Tensor], activation: str = "relu"
) -> Tensor:
    """dropout_masks: nothing, or per hidden layer a (P, out) tensor of 0 and 1 / (1 - p)."""
    last, activate = len(weights) - 1, torch.tanh if activation == "tanh" else torch.relu
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        x = F.linear(x, weight, bias)
        if layer < last:
            x = activate(x)
            if dropout_masks:
                x = x * dropout_masks[layer].to(x.dtype)
    return x


LIBRARY.define(
    "mlp(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] dropout_masks, str activation='relu') -> Tensor"
)
LIBRARY.impl("mlp", _mlp, "CompositeImplicitAutograd")


def mlp(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], dropout_masks: list[Tensor], activation: str = "relu"
) -> Tensor:
    run = torch.ops.fusedprompt.mlp if is_traced(x) else _mlp
    return cast(Tensor, run(x, weights, biases, dropout_masks, activation))
