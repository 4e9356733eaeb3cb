"""`generate` with a prompt: the base model's own `generate` on spliced embeddings. Nothing is patched.

transformers takes `inputs_embeds` for the first step and `input_ids` for all that reads the text (processors, stopping
criteria, the returned sequences), which is what a soft prompt needs.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.positions import count_positions, counted_behind
from .attention import in_place
from .call import BASE, CONTINUE, PREFIX, SPLICE, Plan
from .generate_by_ids import generate_by_ids
from .host import Host
from .plan_generate import copies, most_new_tokens, option, reads_ids
from .prefix import PrefixStates, batch_size, filled, prefix_states
from .shared import prompt_states
from .splice import embedded, others_of, spliced
from .states import PromptStates, fill


def run_generate(host: Host, plan: Plan) -> Any:
    """What the base model's `generate` gives.

    Raises:
        RouteUnavailable: the base model answers with a cache that cannot be shared. `auto` will not try again.
    """
    base, others = host.base_model, dict(plan.others)
    if plan.route in (BASE, CONTINUE):
        counting = _counting(host, plan) if plan.route == CONTINUE else contextlib.nullcontext()
        with counting, in_place(host, others.get("past_key_values")):
            return base.generate(**plan.fields.given(), **others)
    states: PromptStates | PrefixStates | None = None
    if plan.route != SPLICE:
        states = (prefix_states if plan.route == PREFIX else prompt_states)(host, plan.table, plan.mixture)
    if host.facts.encoder_decoder and isinstance(states, PrefixStates):
        return _generate_behind(host, plan, states)
    if host.facts.encoder_decoder:
        with spliced(host, plan) as arguments:
            return base.generate(**arguments, **others_of(plan))
    if reads_ids(host, others):
        with _counting(host, plan):
            return generate_by_ids(host, plan, states, others)
    if others.get("use_cache") is False:
        _use_cache(others, "transformers generates from embeddings only with a cache")
    ids = plan.call.batch.input_ids
    if states is None:
        with spliced(host, plan) as arguments, _counting(host, plan):
            return base.generate(input_ids=ids, **arguments, **others)
    arguments = _behind(host, plan)
    # transformers skips as many of the embeddings as the cache holds: the prompt's.
    size, length = arguments["inputs_embeds"].shape[:2]
    size, length = size * copies(base, others), length + most_new_tokens(base, others)
    own = others.get("past_key_values")
    cache = (
        _filled_cache(base, states, size, length, others, plan.joined is None)
        if own is None
        else filled(host, states.for_rows(size), own)
    )
    others["past_key_values"] = cache
    with _counting(host, plan), in_place(host, cache):
        return base.generate(input_ids=ids, **arguments, **others)


def _generate_behind(host: Host, plan: Plan, states: PrefixStates) -> Any:
    """What an encoder-decoder's `generate` gives, whose decoder begins with a prefix in its cache."""
    base, others, size = host.base_model, dict(plan.others), batch_size(plan)
    cache, begun = states.for_rows(size * copies(base, others)), others.get("decoder_input_ids")
    if option(base, others, "use_cache") is False:
        _use_cache(others, "a decoder's prefix stands in its cache")
    if others.get("decoder_attention_mask") is None:
        # By a mask that is longer than the ids transformers knows that the cache's tokens are not among these.
        columns = cache.get_seq_length() + (1 if begun is None else begun.shape[1])
        mask = torch.ones(size, columns, dtype=torch.int64, device=states.parts.device)
        others["decoder_attention_mask"] = mask
    others["past_key_values"] = filled(host, cache, others.get("past_key_values"))
    return base.generate(**plan.fields.given(), **others)


def _use_cache(others: dict[str, Any], why: str) -> None:
    warnings.warn(f"use_cache=False is ignored: {why}. The result is the same.", stacklevel=5)
    others["use_cache"] = True


def _counting(host: Host, plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Within it a decoder does not count padding in front of a row's text, whether transformers tells it or not."""
    mask, facts = plan.fields.attention_mask, host.facts
    if mask is None or not facts.causal:
        return contextlib.nullcontext()
    if facts.takes_position_ids:
        return _told_positions(host.base_model, facts.first_position)
    if not facts.tells_position_ids:
        return contextlib.nullcontext()
    return counted_behind(host.base_model, (mask == 0).sum(1).repeat_interleave(copies(host.base_model, plan.others)))


@contextlib.contextmanager
def _told_positions(base: Any, first: int) -> Iterator[None]:
    """Within the block, and in its thread, steps without position ids get those that their mask tells: GIT's."""
    thread = threading.get_ident()

    def tell(_: Any, args: tuple[Any, ...], call: dict[str, Any] | None = None) -> Any:
        if call is None:  # another thread met the hook before torch had marked it as one that takes keywords
            return None
        mask, tokens = call.get("attention_mask"), call.get("input_ids")
        tokens = call.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or call.get("position_ids") is not None or threading.get_ident() != thread:
            return args, call
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= tokens.shape[1]:
            call["position_ids"] = count_positions(mask, first)[:, -tokens.shape[1] :]
        return args, call

    hook = base.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _behind(host: Host, plan: Plan) -> dict[str, Any]:
    """Arguments for the text, with room in front for the prompt, which is in the cache."""
    given, layout = plan.fields.given(), plan.layout
    assert layout is not None
    if "input_ids" in given:
        given["inputs_embeds"] = embedded(host, given.pop("input_ids"))
    given["inputs_embeds"] = F.pad(given["inputs_embeds"], (0, 0, layout.num_prompt_rows, 0))
    return given


def _filled_cache(
    base: Any,
    states: PromptStates | PrefixStates,
    size: int,
    length: int,
    kwargs: dict[str, Any],
    attends: bool,
) -> Any:
    """A cache that holds the prompt for `size` rows: one that grows, or a static one of `length` positions."""
    kind = option(base, kwargs, "cache_implementation")
    kwargs.pop("cache_implementation", None)
    if getattr(kwargs.get("generation_config"), "cache_implementation", None) is not None:
        config = kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
        config.cache_implementation = None
    if kind != "static":
        return states.for_rows(size, attends)
    cache = states.for_rows(size)
    from transformers import StaticCache

    static = StaticCache(config=base.config, max_cache_len=length)
    static.prompt_first = True
    fill(static, cache)
    return static
