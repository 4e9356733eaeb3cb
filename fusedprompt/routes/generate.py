"""`generate` with a prompt: the base model's own `generate` on spliced embeddings. Nothing is patched.

transformers takes `inputs_embeds` for the first step and `input_ids` for all that reads the text (processors, stopping
criteria, the returned sequences), which is what a soft prompt needs.
"""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..base.cache import cache_length
from ..layouts.layout import Layout
from .call import BASE, CONTINUE, SHARED, Plan
from .host import Host
from .plan_generate import most_new_tokens, option
from .shared import prompt_states
from .splice import embedded, spliced_arguments
from .states import PromptStates


def run_generate(host: Host, plan: Plan) -> Any:
    """What the base model's `generate` gives.

    Raises:
        RouteUnavailable: the base model answers with a cache that cannot be shared. `auto` will not try again.
    """
    base, others = host.base_model, dict(plan.others)
    if plan.route in (BASE, CONTINUE):
        return base.generate(**plan.fields.given(), **others)
    states = prompt_states(host, plan.table, plan.mixture) if plan.route == SHARED else None
    if host.facts.encoder_decoder:
        return base.generate(**spliced_arguments(host, plan), **others)
    if any(option(base, others, name) for name in ("assistant_model", "prompt_lookup_num_tokens")):
        return _assisted(host, plan, states, others)
    if others.get("use_cache") is False:
        warnings.warn(
            "use_cache=False is ignored: transformers generates from embeddings only with a cache. The result is the "
            "same.",
            stacklevel=4,
        )
        others["use_cache"] = True
    if states is None:
        arguments = spliced_arguments(host, plan)
    else:
        arguments = _behind(host, plan)
        # transformers skips as many of the embeddings as the cache holds: the prompt's.
        copies = max(int(option(base, others, name) or 1) for name in ("num_beams", "num_return_sequences"))
        size, length = arguments["inputs_embeds"].shape[:2]
        others["past_key_values"] = _filled_cache(
            base, states, size * copies, length + most_new_tokens(base, others), others
        )
    return base.generate(input_ids=plan.call.batch.input_ids, **arguments, **others)


def _behind(host: Host, plan: Plan) -> dict[str, Any]:
    """Arguments for the text, with room in front for the prompt, which is in the cache."""
    given, layout = plan.fields.given(), plan.layout
    assert layout is not None
    if "input_ids" in given:
        given["inputs_embeds"] = embedded(host, given.pop("input_ids"))
    given["inputs_embeds"] = F.pad(given["inputs_embeds"], (0, 0, layout.num_prompt_rows, 0))
    return given


def _filled_cache(base: Any, states: PromptStates, size: int, length: int, kwargs: dict[str, Any]) -> Any:
    """A cache that holds the prompt for `size` rows: one that grows, or a static one of `length` positions."""
    kind = option(base, kwargs, "cache_implementation")
    kwargs.pop("cache_implementation", None)
    if getattr(kwargs.get("generation_config"), "cache_implementation", None) is not None:
        config = kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
        config.cache_implementation = None
    cache = states.for_rows(size)
    if kind != "static":
        return cache
    from transformers import StaticCache

    static = StaticCache(config=base.config, max_cache_len=length)
    static.prompt_first = True
    fill(static, cache)
    return static


def fill(cache: Any, source: Any) -> None:
    """Put all keys and values of one cache into another, empty one."""
    for index, layer in enumerate(source.layers):
        positions = torch.arange(layer.keys.shape[-2], device=layer.keys.device)
        cache.update(layer.keys, layer.values, index, {"cache_position": positions})


def _assisted(host: Host, plan: Plan, states: PromptStates | None, kwargs: dict[str, Any]) -> Any:
    """Speculative decoding counts cached positions by the ids, so here the prompt occupies columns of the ids.

    Those columns repeat the row's first token, are embedded as the prompt in the first step (a forward hook, for this
    call only) or, if its states are known, put into the cache there, and are cut out of the result.
    """
    ids, layout, wide_mask = plan.fields.input_ids, plan.layout, plan.fields.attention_mask
    assert layout is not None
    if ids is None:
        raise ValueError("input_ids: expected ids for assisted decoding, got only inputs_embeds")
    base, thread = host.base_model, threading.get_ident()
    if plan.carries or wide_mask is None:
        wide_mask = layout.fill(torch.ones_like(ids) if wide_mask is None else wide_mask, 1)
    rows = host.table(plan.table) if states is None else None
    columns = torch.arange(wide_mask.shape[1], device=ids.device).expand(ids.shape[0], -1)
    # Slots over the wide ids: every column is itself, but for the prompt's.
    prompt_slots = layout.slots if layout.slots is not None else ~columns
    slots = torch.where(layout.fill(torch.zeros_like(ids), 1) > 0, prompt_slots, columns)
    wide_ids = layout.fill(ids, 0)
    first = wide_ids.gather(1, ((wide_mask != 0) & (slots >= 0)).to(torch.int8).argmax(1, keepdim=True))
    wide_ids = torch.where(slots < 0, first, wide_ids)

    def embed_prompt(_: Any, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache: Any = call.get("past_key_values")
        if threading.get_ident() != thread or call.get("input_ids") is None or cache_length(cache):
            return args, call
        given = call.pop("input_ids")  # the wide ids, and candidates behind them
        if states is not None:
            fill(cache, states.for_rows(given.shape[0]))
            counted = {name: call[name] for name in ("position_ids", "cache_position") if call.get(name) is not None}
            cut = {
                name: value[..., layout.num_prompt_rows :] for name, value in {**counted, "input_ids": given}.items()
            }
            cache.prompt_first = True
            return args, {**call, **cut}
        more = torch.arange(wide_ids.shape[1], given.shape[1], device=given.device).expand(given.shape[0], -1)
        assert rows is not None
        wide = Layout.from_slots(torch.cat((slots, more), dim=1), rows.shape[0])
        return args, {**call, "inputs_embeds": ops.splice(rows, wide, inputs_embeds=host.word_embeddings(given))}

    hook = base.register_forward_pre_hook(embed_prompt, with_kwargs=True)
    try:
        output = base.generate(input_ids=wide_ids, attention_mask=wide_mask, **kwargs)
    finally:
        hook.remove()
    sequences = output if isinstance(output, Tensor) else output.sequences
    narrow = torch.cat((ids.to(sequences.device), sequences[:, wide_ids.shape[1] :]), dim=1)
    if isinstance(output, Tensor):
        return narrow
    output.sequences = narrow
    return output
