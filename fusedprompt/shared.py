"""The shared route: the prompt goes through the base model once, and every row of text reads its keys and values.

In a causal decoder virtual token p depends on virtual tokens 0 ... p alone, so its hidden states are the same in every
row. A step computes P + B·T tokens in each layer where splicing computes B·(P + T), and autograd sums the rows'
gradients of the keys and values before they go back through the prompt's own pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .base_model import device_of
from .deferred import defer, replaced
from .layout import IGNORE_INDEX, Layout, count_padding, may_be_padded
from .loss import summed_cross_entropy
from .ops._backend import BackendUnavailable
from .routes import check_length, choose_layout
from .sharing import active_noise, keeps_all, transformers_model
from .stamp import stamp

if TYPE_CHECKING:
    from .model import PromptModel
    from .tasks import Batch


@dataclass(frozen=True)
class PromptStates:
    """What the base model made of the prompt at batch 1. Nothing in it is changed after it was made.

    cache: keys and values of every layer, (1, heads, P, head width) each.
    logits: (1, P, V), or (1, 1, V) of the last virtual token alone; (1, C) for sequence classification.
    hidden_states: (1, P, D) of every layer, if they were asked for.
    all_logits: gives (1, P, V), from a second pass if need be.
    """

    cache: Any
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    all_logits: Callable[[], Tensor]

    def for_rows(self, size: int) -> Any:
        """A cache of its own for `size` rows of text. Its tensors are views of these: no row has a copy."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys = layer.keys.expand(size, -1, -1, -1)
            layer.values = layer.values.expand(size, -1, -1, -1)
        cache.prompt_first = True
        return cache


def prompt_first(cache: Any) -> bool:
    """Whether a cache was begun by `PromptStates.for_rows`: prompt, padding, text in this order."""
    return getattr(cache, "prompt_first", False)


def run_prompt(
    model: PromptModel, *, all_logits: bool, hidden_states: bool = False, may_repeat: bool = False
) -> PromptStates:
    """Run the active adapter's prompt through the base model.

    all_logits: of every virtual token, and not of the last one alone, where the base model can leave out logits.
    may_repeat: without all logits, prepare for a second pass that gives them.

    Raises:
        BackendUnavailable: the base model answers with a cache that cannot be shared. `auto` will not try again.
    """
    rows = model.prompt_rows()
    table: Any = getattr(model.word_embeddings, "weight", None)
    # Of a quantised module it is no plain tensor, or none at all.
    plain = isinstance(table, Tensor) and table.is_floating_point()
    dtype = table.dtype if plain else model.base_model.dtype
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    device = device_of(model.word_embeddings)
    if model.sharing.takes_logits_to_keep and not all_logits:
        # Not 1, which slices: the head's product with a slice of (1, P, D) copies its whole weight first in bf16, 23 %
        # of a step at D=3072, V=128256. A tensor of indices gathers.
        options["logits_to_keep"] = torch.arange(rows.shape[0] - 1, rows.shape[0], device=device)
    # A copy where it must outlive the optimizer's next step.
    embeds = rows.to(device, dtype, copy=may_repeat).unsqueeze(0)
    output = model.base_model(inputs_embeds=embeds, use_cache=True, return_dict=True, **options)
    layers = getattr(output.past_key_values, "layers", ())
    if not layers or not all(keeps_all(layer) and layer.keys.shape[::2] == (1, rows.shape[0]) for layer in layers):
        reason = f"the base model answers with a {type(output.past_key_values).__name__} that does not hold the prompt"
        model.sharing = type(model.sharing)(reason)
        raise BackendUnavailable(f"route 'shared' cannot run: {reason}")
    logits: Tensor = output.logits
    repeat = _all_logits(model.base_model, embeds) if may_repeat and "logits_to_keep" in options else lambda: logits
    return PromptStates(output.past_key_values, logits, output.get("hidden_states"), repeat)


def may_wait(model: PromptModel, labels: Tensor | None) -> bool:
    """Whether the virtual tokens' logits can be left until somebody reads them.

    Nobody does who trains with the output's own loss, and the head's forward and backward over them took 75 of 1094 ms
    of a step (B=4, P=200, T=210, V=32000). The base model must not change in the meantime, so it must be frozen; and
    one process of several that repeats a pass alone would wait for the others.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if labels is None or distributed or torch.compiler.is_compiling() or not _has_transformers_loss(model):
        return False
    return not any(parameter.requires_grad for parameter in model.base_model.parameters())


def _has_transformers_loss(model: PromptModel) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return transformers_model(model.base_model).loss_function is ForCausalLMLoss


def _all_logits(base: Any, embeds: Tensor) -> Callable[[], Tensor]:
    """A function that runs the prompt once more, as it would run now."""
    device = embeds.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    before = stamp(base)

    def repeat() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=enabled), _without_noise(base):
            now = stamp(base)
            if before is not None and (now is None or not before.matches(now)):
                raise RuntimeError(
                    "logits: expected to be read before the base model's weights change (none wait with logits='text')"
                )
            logits: Tensor = base(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
        return logits

    return repeat


@contextlib.contextmanager
def _without_noise(base: nn.Module) -> Iterator[None]:
    """In evaluation mode, where training mode has become random since."""
    parts = [part for part in base.modules() if part.training] if active_noise(base) else []
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


@dataclass
class _Text:
    """The text's side of a batch: what the base model is called with, and where each row's text begins."""

    arguments: dict[str, Any]
    layout: Layout
    padding: Tensor | None


def _arrange(model: PromptModel, batch: Batch, pool_last: bool) -> _Text:
    """Text behind a prompt in the cache: mask and positions count the prompt, and padding changes nothing."""
    facts, rows = model.facts, model.prompt_rows_count()
    size, length = batch.shape
    check_length(facts, rows, length)
    mask, positions = batch.attention_mask, batch.position_ids
    if mask is not None and tuple(mask.shape) != (size, length):
        raise ValueError(f"attention_mask: expected shape (B, T) = {(size, length)}, got {tuple(mask.shape)}")
    layout, padding = choose_layout(facts, rows, batch.tokens, mask, pool_last)
    ids, embeds = batch.input_ids, batch.inputs_embeds
    if ids is not None and embeds is not None:
        raise ValueError("You have to provide either input_ids or inputs_embeds, and not both")
    if ids is not None and pool_last:
        # With ids the base model would look for padding by its token; the mask has said where it is.
        ids, embeds = None, model.word_embeddings(ids)
    if pool_last and mask is not None and may_be_padded(mask, -1):
        turned = Layout.insert(0, length, torch.zeros_like(count_padding(mask)[1]), -count_padding(mask)[1])
        assert embeds is not None and turned.slots is not None
        embeds = embeds.gather(1, turned.slots.unsqueeze(-1).expand_as(embeds))
        mask = turned.fill(mask, 0)
        assert padding is not None
        layout = Layout.insert(rows, length, padding)  # of tokens that have been turned already
        positions = None if positions is None else turned.fill(positions.expand(size, length), 0)
    arguments: dict[str, Any] = {"inputs_embeds": embeds} if ids is None else {"input_ids": ids}
    if mask is not None:
        arguments["attention_mask"] = F.pad(mask, (rows, 0), value=1)
    if positions is not None:
        arguments["position_ids"] = positions.expand(size, length) + rows
    elif padding is not None and facts.takes_position_ids:
        text = torch.arange(length, device=padding.device) - padding.unsqueeze(1)
        arguments["position_ids"] = text.clamp(min=0) + (rows + facts.first_position)
    if batch.token_type_ids is not None:
        arguments["token_type_ids"] = batch.token_type_ids
    return _Text(arguments, layout, padding)


def run_text(model: PromptModel, batch: Batch, states: PromptStates, *, labels: Tensor | None, logits: str) -> Any:
    """Run a batch of text behind the prompt, for language modelling.

    labels: (B, T), or None for an output without a loss.
    logits: "full" for (B, P + T, V) as PEFT returns them, joined when they are looked at; "text" for (B, T, V).
    """
    text, others = _arrange(model, batch, pool_last=False), dict(batch.others)
    as_dict, use_cache = others.pop("return_dict", None), others.pop("use_cache", None)
    counted = others.pop("num_items_in_batch", None)
    cache = states.for_rows(batch.shape[0])
    output = model.base_model(**text.arguments, **others, past_key_values=cache, use_cache=True, return_dict=True)
    fields: dict[str, Any] = {} if keeps_cache(model, use_cache) else {"past_key_values": None}
    if labels is not None:
        fields["loss"] = _loss(model, text, states, output.logits, labels, counted)
    output = replaced(output, **fields)
    output = _with_prompt(output, text.layout, states, full_logits=logits == "full")
    return output.to_tuple() if as_dict is False else output


def run_classifier(model: PromptModel, batch: Batch, states: PromptStates) -> Any:
    """Run a batch of text behind the prompt, for sequence classification: the last token's logits are the row's."""
    text, others = _arrange(model, batch, pool_last=True), dict(batch.others)
    as_dict, use_cache = others.pop("return_dict", None), others.pop("use_cache", None)
    cache = states.for_rows(batch.shape[0])
    given = {**text.arguments, **others, "labels": batch.labels}
    output = model.base_model(**given, past_key_values=cache, use_cache=True, return_dict=True)
    if not keeps_cache(model, use_cache):
        output = replaced(output, past_key_values=None)
    output = _with_prompt(output, text.layout, states, full_logits=False)
    return output.to_tuple() if as_dict is False else output


def keeps_cache(model: PromptModel, use_cache: bool | None) -> bool:
    """Whether the caller gets a cache, as from the base model: by argument, else by configuration."""
    return bool(getattr(model.base_model.config, "use_cache", True) if use_cache is None else use_cache)


def _loss(
    model: PromptModel, text: _Text, states: PromptStates, text_logits: Tensor, labels: Tensor, counted: Any
) -> Tensor:
    """The base model's loss as it would be over prompt and text, of which virtual tokens but the last count nothing."""
    labels = labels.to(text_logits.device)
    size, length, vocabulary = text_logits.shape
    if not _has_transformers_loss(model):
        # A loss of its own gets what it would get from splice.
        logits = _join(text.layout, states.all_logits(), text_logits)
        given = {} if counted is None else {"num_items_in_batch": counted}
        filled = text.layout.fill(labels, IGNORE_INDEX)
        loss: Tensor = transformers_model(model.base_model).loss_function(
            logits=logits, labels=filled, vocab_size=vocabulary, **given
        )
        return loss
    # The last virtual token predicts each row's first token; a position of the text predicts the one behind it.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    first = labels[:, 0]
    if text.padding is not None:
        begin = text.padding.clamp(max=length - 1).unsqueeze(1)
        first = labels.gather(1, begin).squeeze(1)
        before_text = torch.arange(length, device=labels.device) == begin - 1
        following = following.masked_fill(before_text, IGNORE_INDEX)
    number = counted
    if number is None:
        number = (following != IGNORE_INDEX).sum() + (first != IGNORE_INDEX).sum()
    if isinstance(number, Tensor):
        number = number.to(text_logits.device)
    from_prompt = states.logits[0, -1:].float().expand(size, -1)
    total = F.cross_entropy(from_prompt, first, ignore_index=IGNORE_INDEX, reduction="sum")
    total = total + summed_cross_entropy(text_logits.view(-1, vocabulary), following.flatten())
    mean: Tensor = total / number
    return mean


def _with_prompt(output: Any, layout: Layout, states: PromptStates, full_logits: bool) -> Any:
    """The output with the virtual tokens' positions in front of its hidden states and, if wanted, its logits."""
    text_logits, text_states = output.logits, output.get("hidden_states")
    if not full_logits and states.hidden_states is None:
        return output

    def finish() -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if full_logits:
            fields["logits"] = _join(layout, states.all_logits(), text_logits)
        if states.hidden_states is not None:
            pairs = zip(states.hidden_states, text_states)
            fields["hidden_states"] = tuple(_join(layout, prompt, text) for prompt, text in pairs)
        return fields

    return defer(output, finish)


def _join(layout: Layout, prompt: Tensor, text: Tensor) -> Tensor:
    """(1, P, X) of the prompt and (B, T, X) of the text as (B, P + T, X), in the order that splice gives them."""
    return ops.splice(prompt[0], layout, inputs_embeds=text)
