"""Losses that are made here and not by the base model's forward, of logits or of the head that would make them."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..base.facts import BaseFacts, transformers_model
from ..base.first_use import is_loss_of_logits
from ..base.remembered import Remembered
from ..layouts.layout import IGNORE_INDEX
from ..methods.method import Targets
from ..ops.cpt.reference import label_weights
from .cross_entropy import summed_cross_entropy
from .head import Withheld

Source = Tensor | Withheld


def calls_loss_function(base: nn.Module, facts: BaseFacts | None = None) -> bool:
    """Whether a transformers model's loss is what its `loss_function` makes of logits and labels.

    facts: of a decoder, which is then asked: on first use, with a few tokens. Code may call the function and scale what
    it gives.
    """
    model = transformers_model(base)
    kind: Any = type(model)
    if model is None or not _calls_loss_function(kind):
        return False
    return facts is None or not facts.causal or is_loss_of_logits(base, facts)


@functools.cache
def _calls_loss_function(kind: Any) -> bool:
    # BART's decoder has the property, and computes another loss, of labels that are not moved.
    return "loss_function" in inspect.unwrap(kind.forward).__code__.co_names


def has_transformers_loss(base: nn.Module, facts: BaseFacts) -> bool:
    """Whether the base model's loss is transformers' cross entropy of next tokens."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = transformers_model(base)
    return model is not None and model.loss_function is ForCausalLMLoss and calls_loss_function(base, facts)


@dataclass(frozen=True)
class NextToken:
    """transformers' loss of language models: the mean, over the labels, of each position's for the one behind it.

    labels: (B, T) int64, of the text; None where the batch is yet to be spliced.
    padding: (B,) at the left of each row, or None. Behind a prompt that is run by itself a row's text begins after it.
    alone: (B,) bool: rows without a prompt, whose first token nothing predicts; or None.
    counted: the number to divide by, Trainer's `num_items_in_batch`; None for that of the labels.
    """

    labels: Tensor | None = None
    padding: Tensor | None = None
    alone: Tensor | None = None
    counted: Any = None

    def of(self, source: Source, from_prompt: Tensor | None = None) -> Tensor:
        """source: logits (B, T, V) of the text, or their head. from_prompt: (B, V) of each prompt's last row."""
        labels = self.labels
        assert labels is not None
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        parts, total = [following], None
        if from_prompt is not None:
            first = labels[:, 0]
            if self.padding is not None:
                begin = self.padding.clamp(max=labels.shape[1] - 1).unsqueeze(1)
                first = labels.gather(1, begin).squeeze(1)
                before_text = torch.arange(labels.shape[1], device=labels.device) == begin - 1
                following = following.masked_fill(before_text, IGNORE_INDEX)
            if self.alone is not None:
                first = first.masked_fill(self.alone, IGNORE_INDEX)
            parts = [following, first]
            total = F.cross_entropy(from_prompt.float(), first, ignore_index=IGNORE_INDEX, reduction="sum")
        if isinstance(source, Withheld):
            text = source.summed_loss(following.to(source.hidden.device)).float()
        else:
            text = summed_cross_entropy(source.view(-1, source.shape[-1]), following.to(source.device).flatten())
        total = text if total is None else total + text
        number = sum((part != IGNORE_INDEX).sum() for part in parts) if self.counted is None else self.counted
        mean: Tensor = total / (number.to(total.device) if isinstance(number, Tensor) else number)
        return mean


@dataclass(frozen=True)
class OwnFunction:
    """What the base model's `loss_function` makes of logits (B, S, V) and labels (B, S)."""

    base: nn.Module
    labels: Tensor
    counted: Any = None

    def of(self, source: Source) -> Tensor:
        logits = source.logits()() if isinstance(source, Withheld) else source
        given = {} if self.counted is None else {"num_items_in_batch": self.counted}
        function = transformers_model(self.base).loss_function
        loss: Tensor = function(logits=logits, labels=self.labels, vocab_size=logits.shape[-1], **given)
        return loss


@dataclass(frozen=True)
class PerToken:
    """Cross entropy of each token's own label (B, T), where the base model's takes its labels by a mask that covers
    more columns than the text."""

    labels: Tensor

    def of(self, source: Source) -> Tensor:
        logits = source.logits()() if isinstance(source, Withheld) else source
        return F.cross_entropy(logits.flatten(0, 1), self.labels.to(logits.device).flatten(), ignore_index=IGNORE_INDEX)


def masks_labels(base: nn.Module) -> bool:
    """Whether a classifier of tokens leaves out labels by its mask, which must then be as long (XLM-RoBERTa-XL)."""
    model = transformers_model(base)
    return model is not None and "active_loss" in inspect.unwrap(type(model).forward).__code__.co_varnames


@dataclass(frozen=True)
class Weighted:
    """A method's own loss, of logits (B, S, V): see `ops.cpt_loss`."""

    targets: Targets

    def of(self, source: Source) -> Tensor:
        labels, types, decay = self.targets.labels, self.targets.types, self.targets.decay
        if isinstance(source, Tensor):
            loss = ops.cpt_loss(source, labels, types, decay=decay)
        else:
            hidden = source.hidden
            following = F.pad(labels[:, 1:].to(hidden.device), (0, 1), value=IGNORE_INDEX)
            factors = None
            if decay != 1.0:
                wide = torch.promote_types(hidden.dtype, torch.float32)
                factors = F.pad(label_weights(types[:, 1:].to(hidden.device), decay, wide), (0, 1))
            loss = source.summed_loss(following, factors) / (following != IGNORE_INDEX).sum().clamp(min=1)
        if self.targets.or_nan:
            loss = torch.where((labels[:, 1:] != IGNORE_INDEX).any().to(loss.device), loss, torch.nan)
        return loss


@dataclass(frozen=True)
class Answers:
    """The loss of answers to questions, of the logits of the tokens alone: the base model's own counts the prompt's.

    positions: (start, end), (B,) each, which count tokens.
    """

    positions: tuple[Any, Any]
    counted: Any = None

    def of(self, base: nn.Module, starts: Tensor, ends: Tensor, positions: tuple[Any, Any] | None = None) -> Tensor:
        """(B, T) logits each. positions: others than the tokens'."""
        from transformers.loss.loss_utils import ForCausalLMLoss, ForQuestionAnsweringLoss

        function: Any = getattr(transformers_model(base), "loss_function", ForCausalLMLoss)
        if function is ForCausalLMLoss:  # the property's answer for a class whose name says nothing
            function = ForQuestionAnsweringLoss
        given = {"num_items_in_batch": self.counted} if self.counted is not None and calls_loss_function(base) else {}
        loss: Tensor = function(starts, ends, *(positions or self.positions), **given)
        return loss


Loss = NextToken | OwnFunction | PerToken | Weighted | Answers
# Base models whose own loss of answers was compared with `Answers`, and whether they were equal.
_same_loss: Remembered[bool] = Remembered()


def answers_loss(
    base: nn.Module, loss: Answers, output: Any, cut: tuple[Tensor, Tensor], moved: tuple[Any, Any]
) -> Tensor:
    """The loss of the tokens' logits `cut`, if the function for that is the base model's: its first output tells.

    output: of prompt and text, with the loss of answers that were `moved` behind the prompt.
    """
    own: Tensor = output["loss"]
    if _same_loss.get(base) is None and not torch.compiler.is_compiling():
        ours = loss.of(base, output["start_logits"], output["end_logits"], moved)
        same = torch.allclose(ours.float(), own.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
        _same_loss.put(base, same)
    return own if _same_loss.get(base) is False else loss.of(base, *cut)
