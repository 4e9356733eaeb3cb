"""What the backends of head_loss share: the parts, the products and the gradients.

Cross entropy reads each row of logits once, and its gradient has the same size: 107 MB each for 840 rows of V=32000 in
fp32. Here one buffer holds both. Head and loss, forward and backward, took 376 ms so where a Linear and transformers'
loss took 453 (D=512, 2 threads of an AMD EPYC, `make bench`), much of it for memory that the system had to supply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._library import below_autograd, define, is_traced

# Elements of the buffer: 64 MB in fp32. Smaller parts read the weight more often: with 840 rows of V=32000 in one
# part, in 2, in 4 and in 8 the whole took 384, 391, 424 and 504 ms.
_PART_ON_CPU = 1 << 24
_PART = 1 << 26  # of other devices, by the same reasoning; not measured
_FEWEST_ROWS = 256  # below that the product waits for its weight, whatever the vocabulary


class Rows(NamedTuple):
    """The rows that go through the head.

    hidden: (R, D). labels: (R,). factors: (R,), or None for 1. numbers: (R,) of these rows among all, or None if they
    are all.
    """

    hidden: Tensor
    labels: Tensor
    factors: Tensor | None
    numbers: Tensor | None


class Scaling(NamedTuple):
    """What the loss takes for logits y: y * scale, and of that soft_cap * tanh(y / soft_cap), unless soft_cap is 0."""

    soft_cap: float
    scale: float


def part_size(count: int, vocabulary: int, is_host: bool) -> int:
    """How many of `count` rows go through the buffer at a time: equal parts."""
    parts = -(-count // max(_FEWEST_ROWS, (_PART_ON_CPU if is_host else _PART) // vocabulary))
    return -(-count // max(parts, 1)) or 1


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """(R, V) in the first rows of a buffer."""
    logits = buffer[: rows.shape[0]]
    if bias is None:
        return torch.mm(rows, weight.t(), out=logits)
    return torch.addmm(bias, rows, weight.t(), out=logits)


def _spread(d_rows: Tensor, numbers: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient of all rows from that of the ones which went through the head."""
    return d_rows if numbers is None else d_rows.new_zeros(shape).index_copy_(0, numbers, d_rows)


def _scaled(d_hidden: Tensor, d_loss: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # autograd would take the gradient for a constant
        raise RuntimeError("create_graph: expected False, for head_loss has no gradient of its gradient")
    # In fp32: a product with a scalar in bf16 would round the scalar first.
    return (d_hidden.to(d_loss.dtype) * d_loss).to(d_hidden.dtype)


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    trains, dtype = args[-1], torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape if trains else (0, hidden.shape[1]))


@dataclass(frozen=True)
class Implementation:
    """One backend's op, `head_loss` + suffix.

    counted: (hidden, labels, factors) -> the rows that must go through the head.
    loss_in_place: (logits (R, V), labels, factors, whether the logits shall become their gradient, scaling) -> the sum
        of the losses.
    """

    suffix: str
    counted: Callable[[Tensor, Tensor, Tensor | None], Rows]
    loss_in_place: Callable[[Tensor, Tensor, Tensor | None, bool, Scaling], Tensor]

    def register(self) -> None:
        """Make the op known to torch."""
        schema = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? factors"
        define(
            f"head_loss{self.suffix}({schema}, float soft_cap, float scale, bool trains) -> (Tensor, Tensor)",
            self.run,
            _fake,
            lambda *args: _apply(_HeadLoss, self, *args),
        )

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor | None,
        soft_cap: float,
        scale: float,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and its gradient (R, D), or (0, D) if it is not wanted."""
        rows, labels, factors, numbers = self.counted(hidden, labels, factors)
        count, vocabulary = rows.shape[0], weight.shape[0]
        d_rows = rows.new_empty(rows.shape if trains else (0, rows.shape[1]))
        size = part_size(count, vocabulary, rows.device.type == "cpu")
        buffer = rows.new_empty(min(size, count), vocabulary)
        loss = torch.zeros((), device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float32))
        for start in range(0, count, size):
            part = slice(start, start + size)
            logits, weights = _logits(rows[part], weight, bias, buffer), None if factors is None else factors[part]
            loss += self.loss_in_place(logits, labels[part], weights, trains, Scaling(soft_cap, scale))
            if trains:
                torch.mm(logits, weight, out=d_rows[part])
        return loss, _spread(d_rows, numbers, hidden.shape) if trains else d_rows

    def head_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor | None,
        soft_cap: float = 0.0,
        scale: float = 1.0,
    ) -> Tensor:
        """The summed loss, with its gradient: what a backend is called with."""
        arguments = (hidden, weight, bias, labels, factors, soft_cap, scale)
        trains, rows = hidden.requires_grad and torch.is_grad_enabled(), hidden.shape[0]
        if trains and not is_traced(hidden) and part_size(rows, weight.shape[0], hidden.device.type == "cpu") == rows:
            return cast(Tensor, _apply(_OnePart, self, *arguments))
        return cast(Tensor, getattr(torch.ops.fusedprompt, f"head_loss{self.suffix}")(*arguments, trains)[0])


class _HeadLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, while each part's logits are there."""

    @staticmethod
    def forward(ctx: Any, implementation: Implementation, *args: Any) -> tuple[Tensor, Tensor]:
        *given, trains = args
        name = f"head_loss{implementation.suffix}"
        loss, d_hidden = below_autograd(name, *given, trains or ctx.needs_input_grad[1])
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(d_hidden)
        return loss, d_hidden

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return None, _scaled(d_hidden, d_loss), None, None, None, None, None, None, None


class _OnePart(torch.autograd.Function):
    """Few rows: their buffer, which has become the gradient of their logits, is kept, and multiplied with the weight in
    the backward pass. So a forward pass without a backward one costs no more than with logits."""

    @staticmethod
    def forward(ctx: Any, implementation: Implementation, *args: Any) -> Tensor:
        hidden, weight, bias, labels, factors, soft_cap, scale = args
        rows, labels, factors, numbers = implementation.counted(hidden, labels, factors)
        d_logits = _logits(rows, weight, bias, rows.new_empty(rows.shape[0], weight.shape[0]))
        loss = implementation.loss_in_place(d_logits, labels, factors, True, Scaling(soft_cap, scale))
        ctx.shape = hidden.shape
        ctx.save_for_backward(d_logits, weight, numbers)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, weight, numbers = ctx.saved_tensors
        d_hidden = _scaled(_spread(d_logits @ weight, numbers, ctx.shape), d_loss)
        return None, d_hidden, None, None, None, None, None, None


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)
