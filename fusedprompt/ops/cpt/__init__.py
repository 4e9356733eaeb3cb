"""Context-aware prompt tuning (arXiv 2410.17222): the projected prompt, and the loss weighted by label."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ...base import check
from .._backend import Op, never_objects
from .._requirements import why_not_triton
from . import reference


def _triton(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    from . import triton

    return triton.cpt(*arguments)


def _why_not_triton(embedding: Tensor, *others: Any) -> str | None:
    """Also of the embedding alone, for `explain`. The change has its dtype."""
    return why_not_triton(embedding)


OP = Op("cpt")
OP.add("reference", reference.cpt, never_objects)
OP.add("triton", _triton, _why_not_triton)


def cpt(
    embedding: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add to each context embedding its learned change, projected onto a ball.

        projected[i] = delta[i] * min(1, epsilon[i] / |delta[i]|)        rows = embedding + projected

    The projection is treated as part of the optimizer: the gradient of `delta` is that of `rows` where `trainable`, and
    0 elsewhere (PEFT's `CPTEmbedding.get_projection` and its backward hook).

    Args:
        embedding: (P, D) embeddings of the context; gets no gradient.
        delta: (P, D) learned change, in embedding's dtype.
        epsilon: (P,) fp32 largest L2 norms.
        trainable: (P,) bool.
        backend: "auto", "reference" or "triton" (CUDA).

    Returns:
        rows and projected, (P, D) each; no gradient flows through `projected`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    check.tensor("embedding", embedding, "(P, D)", 2)
    check.floating("embedding", embedding)
    for name, value, rule, shape in (
        ("delta", delta, "(P, D)", embedding.shape),
        ("epsilon", epsilon, "(P,)", embedding.shape[:1]),
        ("trainable", trainable, "(P,)", embedding.shape[:1]),
    ):
        check.tensor(name, value, rule, len(shape))
        check.shape(name, value, rule, shape)
        check.same_device(name, value, "embedding", embedding)
    check.same_dtype("delta", delta, "embedding", embedding)
    if trainable.dtype != torch.bool:
        raise TypeError(f"trainable: expected torch.bool, got {trainable.dtype}")
    return cast("tuple[Tensor, Tensor]", OP.run(backend, embedding, delta, epsilon, trainable))


def cpt_loss(logits: Tensor, labels: Tensor, token_types: Tensor, *, decay: float = 1.0) -> Tensor:
    """Next-token cross entropy in which the labels of older examples weigh less.

    Label positions carry type codes k with k % 4 == 0 and k > 0. In each row the highest code weighs 1, the next lower
    `decay`, the next decay**2, and so on; the weighted sum is divided by the number of labels (PEFT's
    `CPTEmbedding.calculate_loss`). Computed in fp32 at least, whatever the logits' dtype; 0 where no label is left.

    Args:
        logits: (B, S, V), floating point.
        labels: (B, S) int64; -100 counts nothing. Position s is predicted by the logits at s - 1.
        token_types: (B, S) integer type codes.
        decay: weight ratio between neighbouring examples; 1 weighs all labels alike.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits).
    """
    check.tensor("logits", logits, "(B, S, V)", 3)
    check.floating("logits", logits)
    for name, value in (("labels", labels), ("token_types", token_types)):
        check.tensor(name, value, "(B, S)", 2)
        check.shape(name, value, "(B, S)", logits.shape[:2])
        check.integral(name, value)
    return reference.weighted_loss(logits, labels, token_types, decay)
