"""Route `shared`: the prompt goes through the base model once, and every row of text reads its keys and values.

In a causal decoder virtual token p depends on virtual tokens 0 ... p alone, so its hidden states are the same in every
row. A step computes P + B·T tokens in each layer where splicing computes B·(P + T), and autograd sums the rows'
gradients of the keys and values before they go back through the prompt's own pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.cache import keeps_all, new_cache
from ..base.facts import device_of
from ..base.first_use import remembered
from ..base.layer_inputs import layer_inputs
from ..base.outputs import defer, replaced
from ..base.positions import count_positions, numbered
from ..base.stamp import as_now
from ..base.state import active_noise, evaluating
from ..layouts.layout import Layout
from ..layouts.mixture import Mixture
from ..layouts.prompt import Prompt, Source
from .attention import in_place
from .call import FULL, Plan
from .choice import RouteUnavailable, is_kept
from .head import TextHead, Withheld
from .host import Host
from .loss import Answers, NextToken, OwnFunction
from .splice import cut, embedded
from .states import PromptStates


def run_prompt(
    host: Host,
    prompts: Sequence[Prompt],
    mixture: Mixture | None = None,
    *,
    all_logits: bool,
    hidden_states: bool = False,
    wait: bool = False,
    own_heads: bool = False,
) -> PromptStates:
    """Run a prompt through the base model, or all prompts of a mixture as one batch.

    all_logits: of every virtual token, and not of the last one alone, where the base model can leave out logits.
    wait: instead of all logits, be ready to make them: by the head alone or, where it cannot wait, in a second pass.
    own_heads: each prompt goes through its adapter's own heads, whichever is active. So it is for a mixture.

    Raises:
        RouteUnavailable: the base model answers with a cache that cannot be shared. `auto` will not try again.
    """
    rows = host.table(prompts)
    if mixture is not None:
        rows = mixture.stack(rows.split_with_sizes(mixture.counts))
    table: Any = getattr(host.word_embeddings, "weight", None)
    # Of a quantised module it is no plain tensor, or none at all.
    plain = isinstance(table, Tensor) and table.is_floating_point()
    dtype = table.dtype if plain else host.base_model.dtype
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    device = device_of(host.word_embeddings)
    withholds = wait and host.text_head.may_be_withheld(host.base_model)
    if host.sharing.takes_logits_to_keep and not all_logits and not withholds:
        # Not 1, which slices (see below). A tensor of indices gathers.
        options["logits_to_keep"] = torch.arange(rows.shape[-2] - 1, rows.shape[-2], device=device)
    repeats = wait and "logits_to_keep" in options
    # A copy: the rows may be a parameter's own memory, and CTRL scales its embeddings in place.
    embeds = rows.to(device, dtype, copy=True)
    arguments: dict[str, Any] = {"inputs_embeds": embeds.unsqueeze(0) if mixture is None else embeds}
    mask = None if mixture is None else mixture.stack_mask(device)
    if mask is not None:
        arguments["attention_mask"] = mask
        if host.facts.places_position_ids:
            arguments["position_ids"] = count_positions(mask, host.facts.first_position)
    if host.facts.placeholder is not None:
        ids = torch.full(arguments["inputs_embeds"].shape[:2], host.facts.placeholder, device=device)
        arguments["per_layer_inputs"] = layer_inputs(host.base_model, ids)
    of_rows = [prompt.name for prompt in prompts] if own_heads or mixture is not None else None
    if prompts[0].task.token_outputs:  # such outputs have no field for a cache
        options["past_key_values"] = new_cache(host.base_model)

    shape = torch.Size(arguments["inputs_embeds"].shape[:2])
    repeat_all = _all_logits(host, arguments, of_rows) if repeats else None

    def call() -> Any:
        return host.base_model(**arguments, use_cache=True, return_dict=True, **options)

    with host.heads_for_rows(of_rows), numbered(host.base_model, arguments, host.facts.takes_position_ids):
        output, head = host.text_head.call(host.base_model, call) if withholds else (call(), None)
    cache = options.get("past_key_values", getattr(output, "past_key_values", None))
    layers = getattr(cache, "layers", ())
    if not layers or not all(keeps_all(layer) and getattr(layer.keys, "shape", ())[::2] == shape for layer in layers):
        reason = f"the base model answers with a {type(cache).__name__} that does not hold the prompt"
        host.sharing = type(host.sharing)(reason)
        raise RouteUnavailable(reason)
    hidden = output.get("hidden_states")
    if head is not None:
        # Of a matrix: a slice (1, 1, D) makes a batched product, which in bf16 copies the whole weight first: 2.5 s at
        # V=128256, D=3072, where this takes 0.05.
        last = head.head(head.hidden[:, -1]).unsqueeze(1)
        return PromptStates(cache, last, hidden, head.logits(), mixture, head)
    logits: Tensor = output.logits
    return PromptStates(cache, logits, hidden, repeat_all or (lambda: logits), mixture)


def _all_logits(host: Host, given: dict[str, Any], names: Sequence[str] | None) -> Callable[[], Tensor]:
    """A function that runs the prompt once more, as it would run now. Of copies: see `run_prompt`."""
    base, given, rows = host.base_model, dict(given), given["inputs_embeds"].clone()

    def repeat() -> Tensor:
        arguments = {**given, "inputs_embeds": rows.clone()}
        # Training mode may have become random since.
        quiet = evaluating(base) if active_noise(base) else contextlib.nullcontext()
        numbers = numbered(base, arguments, host.facts.takes_position_ids)
        with quiet, host.heads_for_rows(names), numbers:
            logits: Tensor = base(**arguments, use_cache=False, return_dict=True).logits
        return logits

    return as_now(base, rows.device.type, repeat)


def prompt_states(
    host: Host,
    prompts: Sequence[Prompt],
    mixture: Mixture | None = None,
    *,
    all_logits: bool = False,
    hidden_states: bool = False,
    wait: bool = False,
) -> PromptStates:
    """A prompt's states, or a mixture's: kept ones where that is allowed, else from a pass of their own.

    all_logits: of every virtual token, and not of the last one alone.
    wait: a pass of their own may leave logits of all virtual tokens until they are read.
    """
    if hidden_states or not is_kept(host, prompts):
        waits = all_logits and wait
        options: dict[str, Any] = {"all_logits": all_logits and not waits, "hidden_states": hidden_states}
        return run_prompt(host, prompts, mixture, wait=waits, **options)
    encoders = {prompt.source: host.prompt_encoder[prompt.name] for prompt in prompts}
    of_source = {prompt.source: prompt for prompt in prompts}

    def make(source: Source) -> PromptStates:
        return run_prompt(host, (of_source[source],), None, all_logits=all_logits, own_heads=mixture is not None)

    states = host.prompt_cache.get(host.base_model, encoders, all_logits, make)
    return states[0] if mixture is None else PromptStates.stacked(states, mixture)


def run_shared(host: Host, plan: Plan) -> Any:
    """The base model's output on text behind its prompt, with the prompt's positions in front where they belong.

    Raises:
        RouteUnavailable: the base model answers with a cache that cannot be shared. `auto` will not try again.
    """
    others, base, loss, task = dict(plan.others), host.base_model, plan.loss, plan.task
    assert task is not None and plan.layout is not None
    size, config = plan.fields.shape[0], base.config
    hidden = others.get("output_hidden_states", config.output_hidden_states)
    full = plan.logits == FULL
    # Of a loss of its own the prompt's logits are part.
    all_logits = task.predicts_next and (full or isinstance(loss, OwnFunction))
    options: dict[str, Any] = {"all_logits": all_logits, "hidden_states": bool(hidden), "wait": plan.waits}
    states = prompt_states(host, plan.table, plan.mixture, **options)
    arguments, as_dict = plan.fields.given(), others.pop("return_dict", None)
    if "inputs_embeds" in arguments and remembered(base).writes:
        arguments["inputs_embeds"] = arguments["inputs_embeds"].clone()
    if plan.looks_up and "input_ids" in arguments:
        ids = arguments.pop("input_ids")
        arguments["inputs_embeds"] = embedded(host, ids)
        if host.facts.placeholder is not None:
            arguments["per_layer_inputs"] = layer_inputs(base, ids)
    use_cache = others.pop("use_cache", None)
    if task.predicts_next:
        others.pop("num_items_in_batch", None)

    def call() -> Any:
        cache = states.for_rows(size, plan.joined is None)
        with in_place(host, cache):
            return base(**arguments, **others, past_key_values=cache, use_cache=True, return_dict=True)

    with numbered(base, arguments, host.facts.takes_position_ids):
        output, head = host.text_head.call(base, call) if plan.waits else (call(), None)
    fields: dict[str, Any] = {}
    wants_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
    if "past_key_values" in output and not wants_cache:
        fields["past_key_values"] = None
    if isinstance(loss, NextToken):
        fields["loss"] = loss.of(output.logits if head is None else head, states.last_logits(size))
    elif loss is not None and not isinstance(loss, Answers):
        fields["loss"] = loss.of(_full_source(states, plan.layout, output.logits, head))
    output = replaced(output, **fields)
    readers = None if "loss" not in fields else host.text_head
    output = _with_prompt(output, plan.layout, states, task.predicts_next and full, head, readers)
    output = cut(plan, output, None)
    return output.to_tuple() if as_dict is False else output


def _full_source(states: PromptStates, layout: Layout, text_logits: Tensor, head: Withheld | None) -> Tensor | Withheld:
    """Logits (B, P + T, V) of prompt and text; or what makes them, if it can wait for both."""
    if head is None:
        return states.joined(layout, states.all_logits(), text_logits)
    if states.head is None:
        return states.joined(layout, states.all_logits(), head.logits()())
    return Withheld(head.head, states.joined(layout, states.head.hidden, head.hidden))


def _with_prompt(
    output: Any, layout: Layout, states: PromptStates, full: bool, head: Withheld | None, readers: TextHead | None
) -> Any:
    """The output with the virtual tokens' positions in front of its hidden states and, if wanted, its logits.

    full: the logits are. head: what makes the text's, if the output's only stand in for them. readers: is told when
    they are read.
    """
    text_logits, text_states = output.logits, output.get("hidden_states")
    if not full and states.hidden_states is None and readers is None:
        return output
    logits_of_text = (lambda: text_logits) if head is None else head.logits()

    def finish() -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if full:
            fields["logits"] = states.joined(layout, states.all_logits(), logits_of_text())
        elif head is not None:
            fields["logits"] = logits_of_text()
        if states.hidden_states is not None:
            pairs = zip(states.hidden_states, text_states)
            fields["hidden_states"] = tuple(states.joined(layout, prompt, text) for prompt, text in pairs)
        return fields

    return defer(output, finish) if readers is None else readers.told_of(output, finish)
