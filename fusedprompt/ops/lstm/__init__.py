"""The LSTM prompt encoder: a stack of (bi)directional LSTM layers over the rows of a prompt table, as one op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...base import check
from .._backend import Op, never_objects
from . import native, reference

OP = Op("lstm")
OP.add("reference", reference.lstm, never_objects)
OP.add("native", native.lstm, native.why_not)


def lstm(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run `torch.nn.LSTM` with zero initial state over a batch of sequences; only the output sequence is returned.

    The head of P-tuning (arXiv 2103.10385; PEFT's `PromptEncoder.lstm_head`).

    Args:
        x: (B, P, D), floating point; batch first.
        weights: `nn.LSTM`'s own parameters in its order: per layer, per direction, weight_ih (4H, D_in),
            weight_hh (4H, H), bias_ih (4H,), bias_hh (4H,), with gates in torch's order i, f, g, o. D_in is D in the
            first layer and H times the number of directions in the others.
        num_layers: layers in the stack.
        bidirectional: run each layer in both directions.
        dropout: probability of zeroing an output of each layer but the last, in [0, 1). The masks are drawn by torch in
            the order `nn.LSTM` draws them, so a seed gives its result.
        training: apply dropout.
        backend: "auto", "reference" or "native".

    Returns:
        (B, P, H * directions) in x's dtype. Under autocast, x and the weights are cast to the autocast dtype first.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    autocast = _autocast_dtype(x)
    hidden = _hidden_if_all_fits(x, weights, num_layers, bidirectional, dropout)
    if not hidden:
        hidden = _check_arguments(x, weights, num_layers, bidirectional, dropout, any_dtype=autocast is not None)
    if autocast is not None:
        x, weights = x.to(autocast), [weight.to(autocast) for weight in weights]
    masks: list[Tensor] = []
    if training and dropout > 0.0:
        # nn.LSTM works on (P, B, directions * H) inside, and draws there.
        shape = (x.shape[1], x.shape[0], hidden * (2 if bidirectional else 1))
        masks = [torch.nn.functional.dropout(x.new_ones(shape), dropout, training=True) for _ in range(num_layers - 1)]
    weights = weights if type(weights) is list else list(weights)
    return cast(Tensor, OP.run(backend, x, weights, masks, bidirectional))


def _autocast_dtype(x: object) -> torch.dtype | None:
    """What autocast asks for where x is, or None; it leaves fp64 alone."""
    if not isinstance(x, Tensor):
        return None
    kind = "cpu" if x.is_cpu else x.device.type  # (is_cpu takes a fifth of the time)
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _check_arguments(
    x: Tensor, weights: Sequence[Tensor], num_layers: int, bidirectional: bool, dropout: float, any_dtype: bool
) -> int:
    """Returns H. any_dtype: the weights need not have x's dtype."""
    check.tensor("x", x, "(B, P, D)", 3)
    check.floating("x", x)
    check.probability("dropout", dropout)
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    expected = 4 * num_layers * (2 if bidirectional else 1)
    if len(weights) != expected:
        raise ValueError(
            f"weights: expected 4 per layer and direction = {expected} (weight_ih, weight_hh, bias_ih, bias_hh), "
            f"got {len(weights)}"
        )
    check.tensor("weights[1]", weights[1], "(4H, H)", 2)
    hidden = int(weights[1].shape[1])
    shapes = _shapes(x.shape[2], hidden, num_layers, bidirectional)
    for index, (weight, shape) in enumerate(zip(weights, shapes)):
        name, rule = f"weights[{index}]", ("(4H, D_in)", "(4H, H)", "(4H,)", "(4H,)")[index % 4]
        check.tensor(name, weight, rule, len(shape))
        check.shape(name, weight, rule, shape)
        check.same_device(name, weight, "x", x)
        if any_dtype:
            check.floating(name, weight)
        else:
            check.same_dtype(name, weight, "x", x)
    return hidden


def _shapes(width: int, hidden: int, num_layers: int, bidirectional: bool) -> list[tuple[int, ...]]:
    """The shapes of `nn.LSTM`'s parameters."""
    directions = 2 if bidirectional else 1
    shapes: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        into = directions * hidden if layer else width
        shapes += [(4 * hidden, into), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)] * directions
    return shapes


_cached_shapes = functools.lru_cache(maxsize=64)(_shapes)


def _hidden_if_all_fits(
    x: Tensor, weights: Sequence[Tensor], num_layers: int, bidirectional: bool, dropout: float
) -> int:
    """H, or 0 unless everything is plainly as it should be: a fifth of the 24 us that it takes to say what is not, for
    two layers in both directions. (torch.compile warns of caches, and has time.)"""
    if torch.compiler.is_compiling():
        return 0
    try:
        _, _, width = x.shape
        _, hidden = weights[1].shape
        dtype, device = x.dtype, x.device
        shapes = _cached_shapes(width, hidden, num_layers, bidirectional)
        if len(weights) != len(shapes):
            return 0
        for weight, shape in zip(weights, shapes):
            if weight.shape != shape or weight.dtype is not dtype or weight.device != device:
                return 0
        fits = dtype.is_floating_point and type(dropout) is float and 0.0 <= dropout < 1.0
    except (AttributeError, IndexError, TypeError, ValueError):
        return 0
    return hidden if fits else 0
