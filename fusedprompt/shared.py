"""The shared route: the prompt goes through the base model once, and every row of text reads its keys and values.

In a causal decoder virtual token p depends on virtual tokens 0 ... p alone, so its hidden states are the same in every
row. A step computes P + B·T tokens in each layer where splicing computes B·(P + T), and autograd sums the rows'
gradients of the keys and values before they go back through the prompt's own pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .base_model import device_of
from .causal_loss import has_transformers_loss, mean_loss, summed_loss
from .deferred import defer, replaced
from .layout import IGNORE_INDEX, Layout, count_padding, may_be_padded
from .lm_head import TextHead, Withheld
from .mixed import Mixture, arrange
from .ops._backend import BackendUnavailable
from .routes import check_length, checked_tokens, choose_layout
from .sharing import active_noise, keeps_all, transformers_model
from .stamp import as_now

if TYPE_CHECKING:
    from .model import PromptModel
    from .tasks import Batch


@dataclass(frozen=True)
class PromptStates:
    """What the base model made of the prompt at batch 1, or of A prompts. Nothing in it is changed after it was made.

    cache: keys and values of every layer, (1, heads, P, head width) each.
    logits: (1, P, V), or (1, 1, V) of the last virtual token alone; (1, C) for sequence classification.
    hidden_states: (1, P, D) of every layer, if they were asked for.
    all_logits: gives (1, P, V), from the head or a second pass if need be.
    head: what will make the logits, and the (1, P, D) that it makes them of, if they wait for it.
    mixture: None for one prompt. Of several, shapes begin with A, and shorter prompts are padded in front.
    """

    cache: Any
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    all_logits: Callable[[], Tensor]
    mixture: Mixture | None = None
    head: Withheld | None = None

    def for_rows(self, size: int) -> Any:
        """A cache of its own for `size` rows of text. Of one prompt its tensors are views: no row has a copy."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = self._of_rows(layer.keys, size), self._of_rows(layer.values, size)
        cache.prompt_first = True
        return cache

    def last_logits(self, size: int) -> Tensor:
        """(size, V): logits of each row's last virtual token."""
        return self._of_rows(self.logits[:, -1], size)

    def table(self, values: Tensor) -> Tensor:
        """(R, X): values (A, P, X) of the prompts as a table for the slots of a layout."""
        return values[0] if self.mixture is None else self.mixture.unstack(values)

    def _of_rows(self, values: Tensor, size: int) -> Tensor:
        if self.mixture is None:
            return values.expand(size, *values.shape[1:])
        return self.mixture.take(values, size // len(self.mixture.names))

    @classmethod
    def stacked(cls, states: Sequence[PromptStates], mixture: Mixture) -> PromptStates:
        """The states of each of a mixture's prompts, (1, ...), as one."""
        cache = copy.copy(states[0].cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for index, layer in enumerate(cache.layers):
            own = [one.cache.layers[index] for one in states]
            # Positions first: a stack pads its members' first dimension.
            layer.keys, layer.values = (
                mixture.stack([tensor[0].transpose(0, 1) for tensor in tensors]).transpose(1, 2)
                for tensors in ([each.keys for each in own], [each.values for each in own])
            )
        if states[0].logits.dim() == 2:
            logits = torch.cat([one.logits for one in states])
        else:
            logits = torch.cat([one.logits[:, -1:] for one in states])

        def all_logits() -> Tensor:
            return mixture.stack([one.all_logits()[0] for one in states])

        return cls(cache, logits, None, all_logits, mixture)


def prompt_first(cache: Any) -> bool:
    """Whether a cache was begun by `PromptStates.for_rows`: prompt, padding, text in this order."""
    return getattr(cache, "prompt_first", False)


def run_prompt(
    model: PromptModel,
    *,
    all_logits: bool,
    hidden_states: bool = False,
    wait: bool = False,
    adapter_name: str | None = None,
    mixture: Mixture | None = None,
) -> PromptStates:
    """Run a prompt through the base model: the active adapter's by default, or all prompts of a mixture as one batch.

    all_logits: of every virtual token, and not of the last one alone, where the base model can leave out logits.
    wait: instead of all logits, be ready to make them: by the head alone or, where it cannot wait, in a second pass.

    Raises:
        BackendUnavailable: the base model answers with a cache that cannot be shared. `auto` will not try again.
    """
    rows = model.prompt_rows(adapter_name) if mixture is None else mixture.stack(mixture.encode(model))
    table: Any = getattr(model.word_embeddings, "weight", None)
    # Of a quantised module it is no plain tensor, or none at all.
    plain = isinstance(table, Tensor) and table.is_floating_point()
    dtype = table.dtype if plain else model.base_model.dtype
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    device = device_of(model.word_embeddings)
    withholds = wait and model.text_head.may_be_withheld(model.base_model)
    if model.sharing.takes_logits_to_keep and not all_logits and not withholds:
        # Not 1, which slices (see below). A tensor of indices gathers.
        options["logits_to_keep"] = torch.arange(rows.shape[-2] - 1, rows.shape[-2], device=device)
    repeats = wait and "logits_to_keep" in options
    # A copy where it must outlive the optimizer's next step.
    embeds = rows.to(device, dtype, copy=repeats)
    arguments: dict[str, Any] = {"inputs_embeds": embeds.unsqueeze(0) if mixture is None else embeds}
    mask = None if mixture is None else mixture.stack_mask(device)
    if mask is not None:
        arguments["attention_mask"] = mask
        if model.facts.takes_position_ids:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + model.facts.first_position
    names = (adapter_name,) if adapter_name is not None else None if mixture is None else mixture.adapters

    def call() -> Any:
        return model.base_model(**arguments, use_cache=True, return_dict=True, **options)

    with model.heads_for_rows(names):
        output, head = model.text_head.call(model.base_model, call) if withholds else (call(), None)
    layers = getattr(output.past_key_values, "layers", ())
    shape = torch.Size(arguments["inputs_embeds"].shape[:2])
    if not layers or not all(keeps_all(layer) and layer.keys.shape[::2] == shape for layer in layers):
        reason = f"the base model answers with a {type(output.past_key_values).__name__} that does not hold the prompt"
        model.sharing = type(model.sharing)(reason)
        raise BackendUnavailable(f"route 'shared' cannot run: {reason}")
    hidden = output.get("hidden_states")
    if head is not None:
        # Of a matrix: a slice (1, 1, D) makes a batched product, which in bf16 copies the whole weight first: 2.5 s at
        # V=128256, D=3072, where this takes 0.05.
        last = head.head(head.hidden[:, -1]).unsqueeze(1)
        return PromptStates(output.past_key_values, last, hidden, head.logits(), mixture, head)
    logits: Tensor = output.logits
    repeat = _all_logits(model, arguments, names) if repeats else lambda: logits
    return PromptStates(output.past_key_values, logits, hidden, repeat, mixture)


def _all_logits(model: PromptModel, arguments: dict[str, Any], names: Sequence[str] | None) -> Callable[[], Tensor]:
    """A function that runs the prompt once more, as it would run now."""
    base: Any = model.base_model

    def repeat() -> Tensor:
        with _without_noise(base), model.heads_for_rows(names):
            logits: Tensor = base(**arguments, use_cache=False, return_dict=True).logits
        return logits

    return as_now(base, arguments["inputs_embeds"].device.type, repeat)


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
    """The text's side of a batch: what the base model is called with, and where each row's text begins.

    has_prompt: (B,) bool, or None where every row has one.
    """

    arguments: dict[str, Any]
    layout: Layout
    padding: Tensor | None
    has_prompt: Tensor | None


def _arrange(model: PromptModel, batch: Batch, pool_last: bool) -> _Text:
    """Text behind a prompt in the cache: mask and positions count the prompt, and padding changes nothing."""
    facts, rows, mixture = model.facts, batch.prompt_length(model), batch.mixture
    size, length = batch.shape
    check_length(facts, rows, length)
    mask, positions = batch.attention_mask, batch.position_ids
    ids, embeds = batch.input_ids, batch.inputs_embeds
    checked_tokens(ids, embeds, mask)
    if ids is not None and pool_last:
        # With ids the base model would look for padding by its token; the mask has said where it is.
        ids, embeds = None, model.word_embeddings(ids)
    if pool_last and mask is not None and may_be_padded(mask, -1):
        turned = Layout.insert(0, length, torch.zeros_like(count_padding(mask)[1]), -count_padding(mask)[1])
        assert embeds is not None and turned.slots is not None
        embeds = embeds.gather(1, turned.slots.unsqueeze(-1).expand_as(embeds))
        mask = turned.fill(mask, 0)
        positions = None if positions is None else turned.fill(positions.expand(size, length), 0)
    behind: int | Tensor = rows
    if mixture is None:
        layout, padding = choose_layout(facts, rows, batch.tokens, mask)
        wide_mask = None if mask is None else F.pad(mask, (rows, 0), value=1)
    else:
        arranged = arrange(mixture, facts, batch.tokens, mask)
        layout, padding, behind = arranged.layout, arranged.padding, mixture.count.unsqueeze(1)
        wide_mask = mixture.prompt_first_mask(mask, length)
    arguments: dict[str, Any] = {"inputs_embeds": embeds} if ids is None else {"input_ids": ids}
    if wide_mask is not None:
        arguments["attention_mask"] = wide_mask
    if positions is not None:
        arguments["position_ids"] = positions.expand(size, length) + behind
    elif facts.takes_position_ids and (padding is not None or not isinstance(behind, int)):
        text = torch.arange(length, device=batch.tokens.device)
        text = text.unsqueeze(0) if padding is None else text - padding.unsqueeze(1)
        arguments["position_ids"] = text.clamp(min=0) + (behind + facts.first_position)
    if batch.token_type_ids is not None:
        arguments["token_type_ids"] = batch.token_type_ids
    has_prompt = None if mixture is None or mixture.even else mixture.count > 0
    return _Text(arguments, layout, padding, has_prompt)


def run_text(
    model: PromptModel,
    batch: Batch,
    states: PromptStates,
    *,
    labels: Tensor | None,
    logits: str,
    wait: bool = False,
    loss_of: Callable[[Tensor | Withheld], Tensor] | None = None,
) -> Any:
    """Run a batch of text behind the prompt, for language modelling.

    labels: (B, T), or None for an output without a loss.
    logits: "full" for (B, P + T, V) as PEFT returns them, joined when they are looked at; "text" for (B, T, V).
    wait: logits may be left until they are read.
    loss_of: instead of labels, makes the loss of full logits, or of the head that would make them.
    """
    text, others = _arrange(model, batch, pool_last=False), dict(batch.others)
    as_dict, use_cache = others.pop("return_dict", None), others.pop("use_cache", None)
    counted = others.pop("num_items_in_batch", None)

    def call() -> Any:
        cache = states.for_rows(batch.shape[0])
        return model.base_model(**text.arguments, **others, past_key_values=cache, use_cache=True, return_dict=True)

    output, head = model.text_head.call(model.base_model, call) if wait else (call(), None)
    fields: dict[str, Any] = {} if keeps_cache(model, use_cache) else {"past_key_values": None}
    if labels is not None:
        fields["loss"] = _loss(model, text, states, output.logits, labels, counted, head)
    if loss_of is not None:
        fields["loss"] = loss_of(_full_source(states, text.layout, output.logits, head))
    output = replaced(output, **fields)
    readers = None if "loss" not in fields else model.text_head
    output = _with_prompt(output, text.layout, states, full_logits=logits == "full", head=head, readers=readers)
    return output.to_tuple() if as_dict is False else output


def _full_source(states: PromptStates, layout: Layout, text_logits: Tensor, head: Withheld | None) -> Tensor | Withheld:
    """Logits (B, P + T, V) of prompt and text; or what makes them, if it can wait for both."""
    if head is None:
        return _join(states, layout, states.all_logits(), text_logits)
    if states.head is None:
        return _join(states, layout, states.all_logits(), head.logits()())
    return Withheld(head.head, _join(states, layout, states.head.hidden, head.hidden))


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
    model: PromptModel,
    text: _Text,
    states: PromptStates,
    text_logits: Tensor,
    labels: Tensor,
    counted: Any,
    head: Withheld | None,
) -> Tensor:
    """The base model's loss as it would be over prompt and text, of which virtual tokens but the last count nothing.

    head: what makes the text's logits, if `text_logits` (B, T, V) only stand in for them.
    """
    labels = labels.to(text_logits.device)
    size, length, vocabulary = text_logits.shape
    if not has_transformers_loss(model):
        # A loss of its own gets what it would get from splice.
        logits = _join(states, text.layout, states.all_logits(), text_logits)
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
    if text.has_prompt is not None:
        first = first.masked_fill(~text.has_prompt, IGNORE_INDEX)
    from_prompt = states.last_logits(size).float()
    total = F.cross_entropy(from_prompt, first, ignore_index=IGNORE_INDEX, reduction="sum")
    total = total + summed_loss(text_logits if head is None else head, following)
    return mean_loss(total, counted, following, first)


def _with_prompt(
    output: Any,
    layout: Layout,
    states: PromptStates,
    *,
    full_logits: bool,
    head: Withheld | None = None,
    readers: TextHead | None = None,
) -> Any:
    """The output with the virtual tokens' positions in front of its hidden states and, if wanted, its logits.

    head: what makes the text's logits, if the output's only stand in for them. readers: is told when they are read.
    """
    text_logits, text_states = output.logits, output.get("hidden_states")
    if not full_logits and states.hidden_states is None and readers is None:
        return output
    logits_of_text = (lambda: text_logits) if head is None else head.logits()

    def finish() -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if full_logits:
            fields["logits"] = _join(states, layout, states.all_logits(), logits_of_text())
        elif head is not None:
            fields["logits"] = logits_of_text()
        if states.hidden_states is not None:
            pairs = zip(states.hidden_states, text_states)
            fields["hidden_states"] = tuple(_join(states, layout, prompt, text) for prompt, text in pairs)
        return fields

    return defer(output, finish) if readers is None else readers.told_of(output, finish)


def _join(states: PromptStates, layout: Layout, prompt: Tensor, text: Tensor) -> Tensor:
    """(A, P, X) of the prompts and (B, T, X) of the text as (B, P + T, X), in the order that splice gives them."""
    return ops.splice(states.table(prompt), layout, inputs_embeds=text)
