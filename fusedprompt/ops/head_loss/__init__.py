"""Cross entropy of a language model's head, without its logits."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ...base import check
from .._backend import Op, never_objects
from .._requirements import why_not_triton
from . import reference


def _triton(*args: Any) -> Tensor:
    from . import triton

    return triton.IMPLEMENTATION.head_loss(*args)


def _why_not_triton(hidden: Tensor, *args: Any) -> str | None:
    """Also of the hidden states alone, for `explain`. All products' operands have their dtype."""
    return why_not_triton(hidden)


OP = Op("head_loss")
OP.add("reference", reference.IMPLEMENTATION.head_loss, never_objects)
OP.add("triton", _triton, _why_not_triton)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Sum of -log softmax(y)[label] * factor, y = (hidden @ weight.T + bias) * scale; rows labelled -100 count nothing.

    The frozen head goes through the rows a part at a time in one buffer: logits, loss, their gradient in the same
    place, and its product with the weight. The idea is Liger-Kernel's (arXiv:2410.10989). Logits are rounded to their
    dtype, as the head gives them; the loss is computed in fp32 at least. Under autocast the products have autocast's
    dtype, as the head's would.

    Args:
        hidden: (R, D) floating point.
        weight: (V, D), and bias: (V,) or None; frozen.
        labels: (R,) int64 in [0, V), or -100.
        factors: (R,) floating point, or None for 1.
        soft_cap: y becomes soft_cap * tanh(y / soft_cap), as in Gemma 2; positive, or None.
        scale: of the logits, as in Cohere and Granite; not 0.
        backend: "auto", "reference" or "triton" (CUDA).

    Returns:
        A scalar in fp32 (fp64 of fp64). Its gradient with respect to hidden (R, D) has none of its own. It is made in
        the forward pass, but where all rows fit into one part: then that part is kept for the backward pass.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; weight or bias require a gradient.
        RuntimeError: a label out of range on a CPU; on Triton it makes the loss NaN.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    check.tensor("hidden", hidden, "(R, D)", 2)
    check.floating("hidden", hidden)
    check.tensor("weight", weight, "(V, D)", 2)
    check.shape("weight", weight, "(V, D)", (weight.shape[0], hidden.shape[1]))
    check.tensor("labels", labels, "(R,)", 1)
    check.shape("labels", labels, "(R,)", hidden.shape[:1])
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if factors is not None:
        check.tensor("factors", factors, "(R,)", 1)
        check.shape("factors", factors, "(R,)", hidden.shape[:1])
        check.floating("factors", factors)
    if bias is not None:
        check.tensor("bias", bias, "(V,)", 1)
        check.shape("bias", bias, "(V,)", weight.shape[:1])
    for name, value in (("weight", weight), ("bias", bias), ("labels", labels), ("factors", factors)):
        if value is not None:
            check.same_device(name, value, "hidden", hidden)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a frozen tensor, got one that requires a gradient")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap: expected a positive number or None, got {soft_cap!r}")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale: expected a number other than 0, got {scale!r}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check.same_dtype("weight", weight, "hidden", hidden)
    if bias is not None:
        check.same_dtype("bias", bias, "hidden", hidden)
    with torch.autocast(device, enabled=False):
        return cast(Tensor, OP.run(backend, hidden, weight, bias, labels, factors, soft_cap or 0.0, float(scale)))
