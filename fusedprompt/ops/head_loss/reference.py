"""The head's loss in PyTorch, in parts.

Cross entropy reads each row of logits once, and its gradient has the same size: 107 MB each for 840 rows of V=32000 in
fp32. Here one buffer holds both. Head and loss, forward and backward, took 391 ms so where they took 454 with all
logits at once (D=512, 2 cores): most of the difference is memory that the system does not have to supply.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...layout import IGNORE_INDEX
from .._library import below_autograd, define

# Elements of the buffer: 64 MB in fp32. Smaller parts read the weight more often: with 840 rows of V=32000 in one
# part, in 2, in 4 and in 8 the whole took 384, 391, 424 and 504 ms.
_PART_ON_CPU = 1 << 24
_PART = 1 << 26  # of other devices, by the same reasoning; not measured
_FEWEST_ROWS = 256  # below that the product waits for its weight, whatever the vocabulary


def _head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, trains: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient (R, D), or (0, D) if it is not wanted."""
    counted, rows = labels != IGNORE_INDEX, hidden
    is_host = hidden.device.type == "cpu"
    if is_host:  # elsewhere the number of rows would have to be waited for
        counted = counted.nonzero().squeeze(1)
        rows, labels = hidden.index_select(0, counted), labels.index_select(0, counted)
        factors = None if factors is None else factors.index_select(0, counted)
    else:
        labels = labels.clamp(min=0)
        factors = counted if factors is None else factors * counted
    d_rows = rows.new_empty(rows.shape) if trains else None
    loss = _run(rows, weight, bias, labels, factors, d_rows)
    if d_rows is None:
        return loss, hidden.new_empty(0, hidden.shape[1])
    return loss, hidden.new_zeros(hidden.shape).index_copy_(0, counted, d_rows) if is_host else d_rows


def _head_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, trains: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape if trains else (0, hidden.shape[1]))


def _run(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factors: Tensor | None,
    d_rows: Tensor | None,
) -> Tensor:
    """The sum of the rows' losses times their factors; writes its gradient into d_rows (R, D)."""
    count, vocabulary = rows.shape[0], weight.shape[0]
    elements = _PART_ON_CPU if rows.device.type == "cpu" else _PART
    parts = -(-count // max(_FEWEST_ROWS, elements // vocabulary))
    size = -(-count // max(parts, 1)) or 1  # parts of equal size
    buffer = rows.new_empty(size, vocabulary)
    loss = torch.zeros((), device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, count, size):
        part = rows[start : start + size]
        logits = buffer[: part.shape[0]]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        factor = None if factors is None else factors[start : start + size]
        loss += _loss_in_place(logits, labels[start : start + size], factor, d_rows is not None)
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[start : start + size])
    return loss


def _loss_in_place(logits: Tensor, labels: Tensor, factors: Tensor | None, trains: bool) -> Tensor:
    """The sum of the losses, times their factors (R,), of logits (R, V), which become its gradient if it is wanted."""
    labels = labels.unsqueeze(1)
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, own = values.amax(1), values.gather(1, labels)
    softmax = torch.softmax(values, 1, out=values)  # each element is read before it is written
    # The largest logit's share is at least 1/V, so that its logarithm is exact where the label's own is not.
    losses = largest - softmax.amax(1).log_() - own.squeeze(1)
    if factors is not None:
        losses *= factors
    if trains:
        softmax.scatter_add_(1, labels, torch.full_like(own, -1))
        if factors is not None:
            softmax *= factors.unsqueeze(1)
        if softmax is not logits:
            logits.copy_(softmax)
    return losses.sum()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor | None,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        trains = trains or ctx.needs_input_grad[0]
        loss, d_hidden = below_autograd("head_loss", hidden, weight, bias, labels, factors, trains)
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(d_hidden)
        return loss, d_hidden

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # autograd would take the gradient for a constant
            raise RuntimeError("create_graph: expected False, for the head's loss on the shared route has one gradient")
        (d_hidden,) = ctx.saved_tensors
        # In fp32: a product with a scalar in bf16 would round the scalar first.
        return (d_hidden.to(d_loss.dtype) * d_loss).to(d_hidden.dtype), None, None, None, None, None


define(
    "head_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? factors, bool trains)"
    " -> (Tensor, Tensor)",
    _head_loss,
    _head_loss_fake,
    _HeadLoss.apply,
)


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None) -> Tensor:
    trains = hidden.requires_grad and torch.is_grad_enabled()
    return cast(Tensor, torch.ops.fusedprompt.head_loss(hidden, weight, bias, labels, factors, trains)[0])
