"""The head of a language model in a training step: its product is run with the loss, and the logits are not kept.

Cross entropy reads each row of logits once, and its gradient has the same size: 107 MB each for 840 rows of V=32000 in
fp32. Here the head waits for the labels and goes through the rows a part at a time in one buffer: logits, loss, their
gradient in the same place, and its product with the head's weight. (The idea is Liger-Kernel's, arXiv:2410.10989.)
Head and loss, forward and backward, took 391 ms so where they took 454 (D=512, 2 cores).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .deferred import Finish, defer, replaced
from .layout import IGNORE_INDEX
from .loss import CACHED_ELEMENTS
from .sharing import transformers_model
from .stamp import stamp

# Elements of the buffer: 64 MB in fp32. Smaller parts read the weight more often: with 840 rows of V=32000 in one
# part, in 2, in 4 and in 8 the whole took 384, 391, 424 and 504 ms.
_PART_ON_CPU = 1 << 24
_PART = 1 << 26  # of other devices, by the same reasoning; not measured
_FEWEST_ROWS = 256  # below that the product waits for its weight, whatever the vocabulary


class _SummedHeadLoss(torch.autograd.Function):
    """The gradient of the hidden states is made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        trains = ctx.needs_input_grad[0]
        counted: Tensor | None = None
        rows, targets = hidden, labels
        if hidden.device.type == "cpu":  # elsewhere the number of rows would have to be waited for
            counted = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            rows, targets = hidden.index_select(0, counted), labels.index_select(0, counted)
        d_rows = torch.empty_like(rows) if trains else None
        total = _run(rows, weight, bias, targets, d_rows)
        if d_rows is not None:
            d_hidden = d_rows if counted is None else torch.zeros_like(hidden).index_copy_(0, counted, d_rows)
            ctx.save_for_backward(d_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # autograd would take the gradient for a constant
            raise RuntimeError("create_graph: expected False, for the head's loss on the shared route has one gradient")
        (d_hidden,) = ctx.saved_tensors
        # In fp32: a product with a scalar in bf16 would round the scalar first.
        return (d_hidden.float() * d_loss).to(d_hidden.dtype), None, None, None


def _run(rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, d_rows: Tensor | None) -> Tensor:
    """The summed loss; writes its gradient into d_rows (R, D)."""
    count, vocabulary = rows.shape[0], weight.shape[0]
    elements = _PART_ON_CPU if rows.device.type == "cpu" else _PART
    parts = -(-count // max(_FEWEST_ROWS, elements // vocabulary))
    size = -(-count // max(parts, 1)) or 1  # parts of equal size
    buffer = rows.new_empty(size, vocabulary)
    losses = [torch.zeros(1, device=rows.device, dtype=_wide(rows.dtype))]
    for start in range(0, count, size):
        part, targets = rows[start : start + size], labels[start : start + size].unsqueeze(1)
        logits = buffer[: part.shape[0]]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        losses.append(_loss_in_place(logits, targets, d_rows is not None))
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[start : start + size])
    return torch.cat(losses).sum().float()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _loss_in_place(logits: Tensor, targets: Tensor, trains: bool) -> Tensor:
    """(R,): each row's loss; logits (R, V) become its gradient if one is wanted."""
    rows = max(1, CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]
    losses = []
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows)):
        counted = target != IGNORE_INDEX
        target = target.clamp(min=0)
        values = part if part.dtype == _wide(part.dtype) else part.float()
        largest, own = values.amax(1, keepdim=True), values.gather(1, target)
        softmax = torch.softmax(values, 1, out=values)  # each element is read before it is written
        # The largest logit's share is at least 1/V, so that its logarithm is exact where the label's own is not.
        log_sum = largest - softmax.amax(1, keepdim=True).log()
        losses.append(torch.where(counted, log_sum - own, 0).squeeze(1))
        if trains:
            softmax.scatter_add_(1, target, torch.full_like(own, -1))
            if logits.device.type != "cpu":  # where rows that do not count were left out
                softmax.masked_fill_(~counted, 0)
            if softmax is not part:
                part.copy_(softmax)
    return torch.cat(losses)


def summed_head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T + bias)[label]; rows labelled -100 count nothing.

    The logits are rounded to their dtype, as the head gives them, and the loss is computed in fp32 (from fp64
    logits in fp64).
    Under autocast the product has autocast's dtype, as the head's would.

    Args:
        hidden: (R, D) floating point. weight: (V, D) and bias: (V,) or None; they get no gradient.
        labels: (R,) int64 in [0, V), or -100.

    Returns:
        An fp32 scalar. Its backward scales a gradient (R, D) that the forward has made, and has none of its own.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return cast(Tensor, _SummedHeadLoss.apply(hidden, weight, bias, labels))  # type: ignore[no-untyped-call]


@dataclass
class Withheld:
    """What the head would have been given, and a stand-in for what it would have made of it.

    hidden: (B, T, D), and stand_in: (B, T, V) without memory of its own; None before the head was called.
    """

    head: Any
    hidden: Any = None
    stand_in: Any = None

    def withhold(self, hidden: Tensor) -> Tensor:
        """The stand-in, instead of the head's logits of hidden states (B, T, D)."""
        self.hidden = hidden
        self.stand_in = hidden.new_zeros(()).expand(*hidden.shape[:-1], self.head.out_features)
        return cast(Tensor, self.stand_in)

    def summed_loss(self, labels: Tensor) -> Tensor:
        """labels: (B, T). A scalar, see `summed_head_loss`."""
        return summed_head_loss(self.hidden.flatten(0, 1), self.head.weight, self.head.bias, labels.flatten())

    def logits(self) -> Callable[[], Tensor]:
        """A function that gives (B, T, V) logits, as the head would have given them now."""
        device = self.hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        before = stamp(self.head)

        def run() -> Tensor:
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                now = stamp(self.head)
                if before is not None and (now is None or not before.matches(now)):
                    raise RuntimeError("logits: expected to be read before the weights of the base model's head change")
                return cast(Tensor, self.head(self.hidden))

        return run


def waiting_head(base: Any) -> Any:
    """The head of a transformers model, if nothing but a product with its frozen weight happens in it; else None.

    A quantised, sharded, adapted, compiled or hooked head must be called.
    """
    if transformers_model(base) is not base or "forward" in vars(base) or base._compiled_call_impl is not None:
        return None
    head: Any = base.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or head._compiled_call_impl is not None:
        return None
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
    plain = all(type(one) is nn.Parameter and one.numel() and not one.requires_grad for one in parameters)
    return head if plain else None


@contextlib.contextmanager
def withheld(head: Any) -> Iterator[Withheld]:
    """Within the block the head gives a stand-in to this thread, and what it was given is in the block's value."""
    found, caller = Withheld(head), threading.get_ident()

    def keep(hidden: Tensor) -> Tensor:
        if threading.get_ident() != caller:
            return cast(Tensor, type(head).forward(head, hidden))
        return found.withhold(hidden)

    head.forward = keep
    try:
        yield found
    finally:
        del head.forward


class TextHead:
    """What a model's training steps have shown: whether its head can wait, and whether anybody reads the logits.

    read: whether the logits of the last output with a loss were read. Those of the next wait if not: waiting costs
        another product with the head, and another pass of the prompt, where they are read at every step (as by TRL's
        `SFTTrainer`).
    """

    def __init__(self) -> None:
        self.read = False
        # Whether an output's logits are the head's own, or something made of them; None until one was looked at.
        self._comes_last: bool | None = None

    def told_of(self, output: Any, finish: Finish) -> Any:
        """`defer` of an output with a loss, which notices whether more than the loss is read."""
        self.read = False

        def found() -> dict[str, Any]:
            self.read = True
            return finish()

        return defer(output, found)

    def call(self, base: nn.Module, call: Callable[[], Any]) -> tuple[Any, Withheld | None]:
        """The output of `call()`, which runs the base model, and the head if it is still to come.

        A model's first call is watched: there the head runs, to see whether the output's logits are what it gave.
        `call` may run twice.
        """
        head = None if self._comes_last is False else waiting_head(base)
        if head is None:
            return call(), None
        if self._comes_last is None:
            found, given = Withheld(head), list[Any]()

            def watch(module: nn.Module, inputs: tuple[Any, ...], logits: Any) -> None:
                found.withhold(inputs[0])
                given.append(logits)

            handle = head.register_forward_hook(watch)
            try:
                output = call()
            finally:
                handle.remove()
            self._comes_last = len(given) == 1 and output.logits is given[0]
            return (replaced(output, logits=found.stand_in), found) if self._comes_last else (output, None)
        with withheld(head) as found:
            output = call()
        if output.logits is found.stand_in:
            return output, found
        self._comes_last = False
        return call(), None
