"""A plan, carried out: `run`."""

from __future__ import annotations

from typing import Any

import torch

from ..base.facts import transformers_model
from ..base.first_use import remember_unread, why_not_embeddings
from ..base.positions import numbered
from ..base.reading import NotRead
from ..ops._backend import AUTO
from .attention import in_place
from .call import BASE, CONTINUE, PEFT, PREFIX, SHARED, SPLICE, Plan
from .choice import RouteUnavailable
from .generate import run_generate
from .host import Host
from .plan import plan as plan_again
from .prefix import run_prefix
from .shared import run_shared
from .splice import GLOBAL_ATTENTION, run_spliced


def run(host: Host, plan: Plan) -> Any:
    """The output of the call that was planned.

    Where the base model turns out to have a cache that cannot be shared, and `auto` was asked for, the call is planned
    and run once more; so it is where its attention turns out not to read a prefix that rows share without copies.

    Raises:
        RouteUnavailable: the same, where "shared" was asked for.
        ValueError: the base model cannot run on embeddings, or not on this call even without a prompt.
    """
    names = None if plan.mixture is None else plan.mixture.names
    if names is not None and {*names} == {host.in_use}:
        names = None  # rows of several tasks of the active adapter: its heads are in their places
    try:
        with host.heads_for_rows(names):
            if plan.call.generates:
                return run_generate(host, plan)
            if plan.route in (BASE, CONTINUE):
                return _continued(host, plan)
            return _RUNNERS[plan.route](host, plan)
    except NotRead as error:
        if plan.joined is not None:  # the next plan would be the same
            raise
        remember_unread(host.base_model, str(error))
    except RouteUnavailable:
        if plan.route != SHARED or plan.call.route != AUTO:
            raise
    except _CODE_ERRORS as error:
        says_enough = plan.route in (BASE, PREFIX) or _is_ours(error) or isinstance(error, torch.OutOfMemoryError)
        reason = None if says_enough or "CUDA" in str(error) else _why_not_embeddings(host, plan, error)
        if reason is None:
            raise
        kind = type(transformers_model(host.base_model) or host.base_model).__name__
        raise ValueError(
            f"base_model: expected a model that runs on prompt and text as they were given, which {kind} does not: "
            f"{reason}"
        ) from error
    return run(host, plan_again(host, plan.call, plan.placement))


_RUNNERS = {SHARED: run_shared, SPLICE: run_spliced, PREFIX: run_prefix}


def _why_not_embeddings(host: Host, plan: Plan, error: Exception) -> str | None:
    """Why a base model cannot run with a prompt, in words; None where it cannot run without one either."""
    call, others = plan.call, plan.others
    in_template = call.fields is not None or (plan.mixture is not None and plan.mixture.has_patterns)
    if call.generates or plan.placement == PEFT or call.slots is not None or in_template:
        return None if host.facts.encoder_decoder else why_not_embeddings(host.base_model, host.facts)
    shape = call.batch.shape
    for name, value in others.items():
        of_tokens = isinstance(value, torch.Tensor) and value.shape[:2] == shape and not name.startswith("decoder_")
        if of_tokens and name not in ("labels", "per_layer_inputs", GLOBAL_ATTENTION):
            return f"{name} has a value for each token, and none for the prompt"
    # A template's mask and labels are of prompt and text.
    batch = {name: value for name, value in call.batch.given().items() if value.shape[:2] == shape}
    given = {**batch, **others}
    given.pop("input_type_mask", None)
    if not host.facts.takes_position_ids:
        given.pop("position_ids", None)
    try:
        with torch.no_grad():
            host.base_model(**given)
    except Exception as alone:
        # Of ids they are the call's own; embeddings may be what the base model cannot run on.
        if type(alone) is type(error) and call.batch.inputs_embeds is None:
            return None
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# What code that was not written for a call raises, other than for values of its input.
_CODE_ERRORS = (AttributeError, TypeError, AssertionError, NotImplementedError, ValueError, RuntimeError)


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this package, and says what it has to."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("fusedprompt.")


def _continued(host: Host, plan: Plan) -> Any:
    """The base model's output, of tokens behind a cache or without a prompt."""
    arguments = plan.fields.given()
    numbers = numbered(host.base_model, arguments, plan.route == BASE or host.facts.takes_position_ids)
    with numbers, in_place(host, plan.others.get("past_key_values")):
        return host.base_model(**arguments, **plan.others)
