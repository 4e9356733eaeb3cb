"""PEFT's `generate` with a prompt that the base model's cache holds already.

PEFT's own code runs: in the first step it puts the prompt's rows in front of the text's, and ones in front of the mask.
Here that step gets a prompt of no rows, and a cache with the prompt's keys and values. Prompt, padding and text have
the positions that PEFT gives them, so the results are PEFT's, padded or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..base.cache import keeps_all
from ..layouts.mixture import prompts_of
from ..routes.attention import cache_to_read, in_place_later
from ..routes.call import PEFT, SHARED, Call
from ..routes.choice import RouteUnavailable, why_not_length
from ..routes.plan import plan
from ..routes.shared import prompt_states
from .encoders import why_not_adapter
from .host import PeftHost
from .record import Record


@dataclass
class Generation:
    """A running call of `generate`.

    objection: why its prompt is not shared, or None.
    without_prompt: PEFT asks for the prompt of a step whose cache holds it.
    """

    patch: Record
    objection: str | None
    without_prompt: bool = False


_running: ContextVar[Generation | None] = ContextVar("fusedprompt_generation", default=None)


@contextlib.contextmanager
def generating(patch: Record, kwargs: dict[str, Any]) -> Iterator[None]:
    """Around a call of PEFT's generate.

    Raises:
        RouteUnavailable: route "shared" was asked for, and cannot run.
    """
    objection = why_not_generate(patch.host, kwargs)
    if objection is not None:
        _refuse(patch, objection)
    token = _running.set(Generation(patch, objection))
    try:
        with contextlib.nullcontext() if objection is not None else in_place_later(patch.host):
            yield
    finally:
        _running.reset(token)


def without_prompt(patch: Record) -> bool:
    """Whether PEFT asks now for the prompt of a step whose cache holds it."""
    running = _running.get()
    return running is not None and running.patch is patch and running.without_prompt


def why_not_generate(host: PeftHost, kwargs: dict[str, Any]) -> str | None:
    """An objection to sharing the active adapter's prompt in this call of generate, or None."""
    objection = why_not_adapter(host.model.active_peft_config)
    if objection is not None:
        return objection
    try:
        return plan(host, Call.to_generate(None, kwargs, host.route), PEFT).why
    except RouteUnavailable as error:
        return error.objection


def prepare(patch: Record, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """PEFT's `prepare_inputs_for_generation`, with a filled cache in place of the prompt where nothing objects."""
    running, cache = _running.get(), kwargs.get("past_key_values")
    ids: Any = args[0] if args else kwargs.get("input_ids")
    serves = running is not None and running.patch is patch and running.objection is None
    layers = _fresh_layers(patch, cache, ids, kwargs.get("task_ids")) if serves else None
    if layers is None:
        inputs: dict[str, Any] = original(*args, **kwargs)
        return inputs
    assert running is not None
    running.without_prompt = True
    try:
        inputs = original(*args, **kwargs)
    finally:
        running.without_prompt = False
    assert inputs["past_key_values"] is cache and inputs["inputs_embeds"].shape[:2] == ids.shape
    cache.layers = layers
    facts, rows = patch.host.facts, patch.host.prompts[patch.host.in_use].rows
    if facts.first_position and facts.takes_position_ids and inputs.get("position_ids") is None:
        # RoBERTa counts embeddings from where it begins, whatever the cache holds.
        counted = torch.arange(rows, rows + ids.shape[1], device=ids.device) + facts.first_position
        inputs["position_ids"] = counted.unsqueeze(0)
    return inputs


def _fresh_layers(patch: Record, cache: Any, ids: Any, task_ids: Any) -> Any:
    """Layers that hold the prompt, each row's by its task if it has one, for a cache that this step begins; None if the
    cache cannot take them."""
    from transformers import DynamicCache

    if cache is not None and cache.get_seq_length():
        return None  # a later step, or a conversation that goes on: PEFT adds no prompt
    host, objection = patch.host, None
    active = host.prompts[host.in_use]
    if active.num_tasks is None:
        task_ids = None
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or not all(map(keeps_all, cache.layers)):
        objection = f"the cache is {'not used' if cache is None else 'a ' + type(cache).__name__}"
    elif ids is None or not ids.shape[1]:
        objection = "there are no input_ids"
    elif active.num_tasks is not None and not isinstance(task_ids, torch.Tensor):
        objection = "task_ids is not a tensor"
    else:
        objection = why_not_length(host, ids.shape[1])
    if objection is None:
        try:
            active, mixture = prompts_of(host.prompts, active, None, task_ids, ids)
            table = (active,) if mixture is None else mixture.prompts
            rows = max(prompt.rows for prompt in table)
            return cache_to_read(host, prompt_states(host, table, mixture), rows, ids.shape[0]).layers
        except RouteUnavailable as error:  # found out from the base model's answer
            objection = str(error)
    _refuse(patch, objection)
    return None


def _refuse(patch: Record, objection: str) -> None:
    if patch.host.route == SHARED:
        raise RouteUnavailable(objection)
    patch.generated_alone.add(objection)
