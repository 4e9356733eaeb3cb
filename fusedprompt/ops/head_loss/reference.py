"""The head's loss in PyTorch, in parts.

Cross entropy reads each row of logits once, and its gradient has the same size: 107 MB each for 840 rows of V=32000 in
fp32. Here one buffer holds both. Head and loss, forward and backward, took 376 ms so where a Linear and transformers'
loss took 453 (D=512, 2 threads of an AMD EPYC, `make bench`), much of it for memory that the system had to supply.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...layouts.layout import IGNORE_INDEX
from .._library import below_autograd, define, is_traced

# Elements of the buffer: 64 MB in fp32. Smaller parts read the weight more often: with 840 rows of V=32000 in one
# part, in 2, in 4 and in 8 the whole took 384, 391, 424 and 504 ms.
_PART_ON_CPU = 1 << 24
_PART = 1 << 26  # of other devices, by the same reasoning; not measured
_FEWEST_ROWS = 256  # below that the product waits for its weight, whatever the vocabulary


def _head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, trains: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient (R, D), or (0, D) if it is not wanted."""
    counted, rows, labels, factors = _counted(hidden, labels, factors)
    d_rows = rows.new_empty(rows.shape) if trains else None
    loss = _run(rows, weight, bias, labels, factors, d_rows)
    return loss, hidden.new_empty(0, hidden.shape[1]) if d_rows is None else _spread(d_rows, counted, hidden.shape)


def _counted(
    hidden: Tensor, labels: Tensor, factors: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """The rows that have labels: their numbers, hidden states, labels and factors. Elsewhere than on a CPU all rows,
    because their number would have to be waited for; then factors are 0 where they do not count, and numbers None."""
    has_label = labels != IGNORE_INDEX
    if hidden.device.type != "cpu":
        return None, hidden, labels.clamp(min=0), has_label if factors is None else factors * has_label
    counted = has_label.nonzero().squeeze(1)
    factors = None if factors is None else factors.index_select(0, counted)
    return counted, hidden.index_select(0, counted), labels.index_select(0, counted), factors


def _spread(d_rows: Tensor, counted: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient of all rows from that of the counted ones."""
    return d_rows if counted is None else d_rows.new_zeros(shape).index_copy_(0, counted, d_rows)


def _head_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, trains: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape if trains else (0, hidden.shape[1]))


def _part_size(count: int, vocabulary: int, is_host: bool) -> int:
    """How many of `count` rows go through the buffer at a time: equal parts."""
    parts = -(-count // max(_FEWEST_ROWS, (_PART_ON_CPU if is_host else _PART) // vocabulary))
    return -(-count // max(parts, 1)) or 1


def _run(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, d_rows: Tensor | None
) -> Tensor:
    """The sum of the rows' losses times their factors; writes its gradient into d_rows (R, D)."""
    count, vocabulary = rows.shape[0], weight.shape[0]
    size = _part_size(count, vocabulary, rows.device.type == "cpu")
    buffer = rows.new_empty(min(size, count), vocabulary)
    loss = torch.zeros((), device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, count, size):
        part = slice(start, start + size)
        logits = _logits(rows[part], weight, bias, buffer)
        loss += _loss_in_place(logits, labels[part], None if factors is None else factors[part], d_rows is not None)
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[part])
    return loss


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """(R, V) in the first rows of a buffer."""
    logits = buffer[: rows.shape[0]]
    if bias is None:
        return torch.mm(rows, weight.t(), out=logits)
    return torch.addmm(bias, rows, weight.t(), out=logits)


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
    """The gradient is made in the forward pass, while each part's logits are there."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, trains = args
        loss, d_hidden = below_autograd("head_loss", *tensors, trains or ctx.needs_input_grad[0])
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(d_hidden)
        return loss, d_hidden

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return _scaled(d_hidden, d_loss), None, None, None, None, None


class _OnePart(torch.autograd.Function):
    """Few rows: their buffer, which has become the gradient of their logits, is kept, and multiplied with the weight in
    the backward pass. So a forward pass without a backward one costs no more than with logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None
    ) -> Tensor:
        counted, rows, labels, factors = _counted(hidden, labels, factors)
        d_logits = _logits(rows, weight, bias, rows.new_empty(rows.shape[0], weight.shape[0]))
        loss = _loss_in_place(d_logits, labels, factors, trains=True)
        ctx.shape = hidden.shape
        ctx.save_for_backward(d_logits, weight, counted)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, weight, counted = ctx.saved_tensors
        return _scaled(_spread(d_logits @ weight, counted, ctx.shape), d_loss), None, None, None, None


def _scaled(d_hidden: Tensor, d_loss: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # autograd would take the gradient for a constant
        raise RuntimeError("create_graph: expected False, for head_loss has no gradient of its gradient")
    # In fp32: a product with a scalar in bf16 would round the scalar first.
    return (d_hidden.to(d_loss.dtype) * d_loss).to(d_hidden.dtype)


define(
    "head_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? factors, bool trains)"
    " -> (Tensor, Tensor)",
    _head_loss,
    _head_loss_fake,
    _HeadLoss.apply,
)


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None) -> Tensor:
    arguments = (hidden, weight, bias, labels, factors)
    trains, rows = hidden.requires_grad and torch.is_grad_enabled(), hidden.shape[0]
    if trains and not is_traced(hidden) and _part_size(rows, weight.shape[0], hidden.device.type == "cpu") == rows:
        return cast(Tensor, _OnePart.apply(*arguments))  # type: ignore[no-untyped-call]
    return cast(Tensor, torch.ops.fusedprompt.head_loss(*arguments, trains)[0])
