"""What the backends of cpt share: the schema, and the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import below_autograd, define, is_traced, not_leaf

Pair = tuple[Tensor, Tensor]


def register(
    suffix: str,
    forward: Callable[..., Pair],
    fake: Callable[..., Pair],
    backward: Callable[[Tensor, Tensor], Tensor],
) -> Callable[..., Pair]:
    """Register one backend's op, `cpt` + suffix; returns the differentiable function.

    forward: (embedding, delta, epsilon, trainable) -> (rows, projected). fake: the same on tensors without data.
    backward: (d_rows, trainable) -> d_delta, of anything that torch can trace.
    """

    class CPT(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Pair], *args: Tensor) -> Pair:
            rows, projected = run(*args)
            ctx.save_for_backward(args[3])
            ctx.mark_non_differentiable(projected)
            return rows, projected

        @staticmethod
        def backward(ctx: Any, d_rows: Tensor, _: Any) -> tuple[Tensor | None, ...]:
            (trainable,) = ctx.saved_tensors
            return None, None, backward(d_rows, trainable), None, None

    apply: Any = CPT.apply
    define(
        f"cpt{suffix}(Tensor embedding, Tensor delta, Tensor epsilon, Tensor trainable) -> (Tensor, Tensor)",
        forward,
        fake,
        lambda *args: apply(functools.partial(below_autograd, f"cpt{suffix}"), *args),
    )
    operator: Callable[..., Pair] = getattr(torch.ops.fusedprompt, f"cpt{suffix}")

    def cpt(embedding: Tensor, delta: Tensor, *args: Tensor) -> Pair:
        if is_traced(embedding) or is_traced(delta):
            return operator(embedding, delta, *args)
        result: Pair = apply(forward, embedding, not_leaf(delta), *args)
        return result

    return cpt
