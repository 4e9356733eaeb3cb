"""The loss of logits, and their gradient in the same place, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts.layout import IGNORE_INDEX
from ._op import Implementation, Rows, Scaling


def _counted(hidden: Tensor, labels: Tensor, factors: Tensor | None) -> Rows:
    """The rows that have labels. Elsewhere than on a CPU all rows, because their number would have to be waited for;
    then factors are 0 where they do not count."""
    has_label = labels != IGNORE_INDEX
    if hidden.device.type != "cpu":
        return Rows(hidden, labels.clamp(min=0), has_label if factors is None else factors * has_label, None)
    counted = has_label.nonzero().squeeze(1)
    factors = None if factors is None else factors.index_select(0, counted)
    return Rows(hidden.index_select(0, counted), labels.index_select(0, counted), factors, counted)


def _loss_in_place(logits: Tensor, labels: Tensor, factors: Tensor | None, trains: bool, scaling: Scaling) -> Tensor:
    """A soft cap takes another buffer, for its derivative."""
    labels = labels.unsqueeze(1)
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope: Tensor | float = scaling.scale
    if scaling.scale != 1:
        values *= scaling.scale
    if scaling.soft_cap > 0:
        values.div_(scaling.soft_cap).tanh_()
        slope = values.square().neg_().add_(1).mul_(scaling.scale) if trains else slope
        values *= scaling.soft_cap
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
        if isinstance(slope, Tensor) or slope != 1:
            softmax *= slope
        if softmax is not logits:
            logits.copy_(softmax)
    return losses.sum()


IMPLEMENTATION = Implementation("", _counted, _loss_in_place)
IMPLEMENTATION.register()
