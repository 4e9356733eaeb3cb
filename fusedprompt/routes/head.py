"""Holding back the head of a language model, so that `ops.head_loss` can run it with the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..base.facts import transformers_model
from ..base.outputs import Finish, defer, replaced
from ..base.own_forward import has_own_forward, replaced_forwards
from ..base.stamp import as_now


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

    def summed_loss(self, labels: Tensor, factors: Tensor | None = None) -> Tensor:
        """labels, factors: (B, T). A scalar, see `ops.head_loss`."""
        factors = None if factors is None else factors.flatten()
        head, hidden = self.head, self.hidden.flatten(0, 1)
        return ops.head_loss(hidden, head.weight, labels.flatten(), bias=head.bias, factors=factors)

    def logits(self) -> Callable[[], Tensor]:
        """A function that gives (B, T, V) logits, as the head would have given them now."""
        return as_now(self.head, self.hidden.device.type, lambda: self.head(self.hidden))


def waiting_head(base: Any) -> Any:
    """The head of a transformers model, if nothing but a product with its frozen weight happens in it; else None.

    A quantised, sharded, adapted, compiled or hooked head must be called.
    """
    if transformers_model(base) is not base or has_own_forward(base) or base._compiled_call_impl is not None:
        return None
    head: Any = base.get_output_embeddings()
    if type(head) is not nn.Linear or has_own_forward(head) or head._compiled_call_impl is not None:
        return None
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
    plain = all(type(one) is nn.Parameter and one.numel() and not one.requires_grad for one in parameters)
    return head if plain else None


@contextlib.contextmanager
def withheld(head: Any) -> Iterator[Withheld]:
    """Within the block, and in its context, the head gives a stand-in; what it was given is in the block's value."""
    found = Withheld(head)
    with replaced_forwards({head: found.withhold}):
        yield found


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
        if torch.compiler.is_compiling():
            return defer(output, finish)
        self.read = False

        def found() -> dict[str, Any]:
            self.read = True
            return finish()

        return defer(output, found)

    def may_be_withheld(self, base: nn.Module) -> bool:
        """Whether `call` will hold back the head, as far as one can tell before a model's first call."""
        return self._head(base) is not None

    def _head(self, base: nn.Module) -> Any:
        return None if self._comes_last is False else waiting_head(base)

    def call(self, base: nn.Module, call: Callable[[], Any]) -> tuple[Any, Withheld | None]:
        """The output of `call()`, which runs the base model, and the head if it is still to come.

        A model's first call is watched: there the head runs, to see whether the output's logits are what it gave.
        `call` may run twice.
        """
        head = self._head(base)
        if head is None:
            return call(), None
        if self._comes_last is None:
            found, given = Withheld(head), list[Any]()

            def watch(hidden: Tensor) -> Any:
                given.append(type(head).forward(head, hidden))
                found.withhold(hidden)
                return given[-1]

            with replaced_forwards({head: watch}):
                output = call()
            self._comes_last = len(given) == 1 and output.logits is given[0]
            return (replaced(output, logits=found.stand_in), found) if self._comes_last else (output, None)
        with withheld(head) as found:
            output = call()
        if output.logits is found.stand_in:
            return output, found
        self._comes_last = False
        return call(), None
