"""Text that every row of a call begins with, behind a prefix: run once, and from there on states of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..base.cache import new_cache
from ..base.facts import BaseFacts
from ..base.layer_inputs import layer_inputs
from ..base.positions import numbered
from ..layouts.batch import check_length
from ..layouts.mixture import Mixture
from ..layouts.prompt import Prompt
from .choice import why_not_now
from .host import Host
from .states import PromptStates


def why_not_behind(host: Host, prompt: Prompt, before: bool) -> str | None:
    """An objection to text behind a prefix, run once for all rows; or None. before: it is to stand before it."""
    if before:
        return f"whose {prompt.method} stands in front of all text"
    if host.facts.encoder_decoder or not host.facts.causal:
        return f"because only a decoder reads its {prompt.method} and the text behind it without the rows"
    objection = host.sharing.objection or why_not_now(host)
    return None if objection is None else f"because it cannot be computed once for all rows: {objection}"


def text_states(host: Host, prompts: Sequence[Prompt], mixture: Mixture | None, prefix_cache: Any) -> PromptStates:
    """The states of K tokens of text behind each of A prefixes of N: keys and values of N + K positions.

    prefix_cache: gives a cache of one row that holds an adapter's prefix.
    """
    of_source = {prompt.source: prompt for prompt in prompts}
    states = [_behind(host, prompt, prefix_cache) for prompt in of_source.values()]
    return states[0] if mixture is None else PromptStates.stacked(states, mixture)


def _behind(host: Host, prompt: Prompt, prefix_cache: Any) -> PromptStates:
    assert prompt.shared is not None
    base, facts, ids, behind = host.base_model, host.facts, prompt.shared.ids.unsqueeze(0), prompt.encoded_rows
    cache = prefix_cache(replace(prompt, rows=behind, shared=None)) if behind else new_cache(base)
    check_length(facts, behind, ids.shape[1])
    arguments: dict[str, Any] = {"input_ids": ids}
    if facts.placeholder is not None:
        arguments = {"inputs_embeds": host.word_embeddings(ids), "per_layer_inputs": layer_inputs(base, ids)}
    if facts.places_position_ids:
        arguments["position_ids"] = _positions(facts, behind, ids)
    if host.sharing.takes_logits_to_keep:  # a tensor of indices gathers, where 1 would slice
        arguments["logits_to_keep"] = torch.arange(ids.shape[1] - 1, ids.shape[1], device=ids.device)
    names = [prompt.name]
    with host.heads_for_rows(names), numbered(base, arguments, facts.takes_position_ids):
        output = base(**arguments, past_key_values=cache, use_cache=True, return_dict=True)
    logits = output.logits
    return PromptStates(cache, logits, None, lambda: logits)


def _positions(facts: BaseFacts, behind: int, ids: torch.Tensor) -> torch.Tensor:
    first = behind + facts.first_position
    return torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0)
