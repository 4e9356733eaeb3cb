"""What will be done with a call, decided in one place without running the base model: `plan`."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..base.cache import cache_length
from ..base.tasks import Task
from ..layouts.batch import Batch
from ..layouts.from_template import put_into_template, without_prefix_slots
from ..layouts.layout import Layout
from ..layouts.mixture import BASE as BASE_ROWS
from ..layouts.mixture import Mixture, prompts_of, refuse_cache
from ..layouts.padding import choose_layout
from ..layouts.prompt import Prompt
from .beside import prompts_of_call
from .call import CONTINUE, OURS, SPLICE, Call, Plan, check_logits, refuse, refuse_fields, with_cache, without_prompt
from .choice import checked_route
from .host import Host
from .packing import slots_of
from .plan_generate import plan_generate
from .planner import Planner
from .prefix import widened
from .states import prompt_first

__all__ = ["Call", "Plan", "plan"]


def plan(host: Host, call: Call, placement: str = OURS) -> Plan:
    """What will be done with a call of `forward` or `generate`; see `Plan`.

    Args:
        placement: of a prompt in front of a text. "ours" moves padding to where it changes nothing; "peft" leaves it,
            and positions and outputs, as PEFT does.

    Raises:
        RouteUnavailable: the call asks for a route by name that cannot serve it.
        ValueError, TypeError: its arguments do not fit each other.
    """
    checked_route(call.route)
    prompts = prompts_of_call(host, call)
    if host.in_use is None and call.shared_prefix is None:
        check_logits(call.logits, None)
        return without_prompt(call)
    active = prompts[host.in_use or BASE_ROWS]
    if not (call.slots is None and call.pool_index is None and call.fields is None):
        _check_places(host, active, call)
    if call.generates:
        return plan_generate(host, prompts, active, call, placement)
    call, given, table = _slots(host, active, call)
    if call.past_key_values is not None:
        if placement == OURS and not host.facts.encoder_decoder and cache_length(call.past_key_values) > 0:
            return _continued(host, active, call)
        if host.facts.encoder_decoder and active.in_cache and cache_length(call.past_key_values) > 0:
            return _decoded(host, active, call)
        call = replace(call, others=with_cache(call.others, call.past_key_values))
    mixture = None
    if given is None:
        active, mixture = prompts_of(prompts, active, call.adapter_names, call.task_ids, call.rows)
        table = (active,)
    if mixture is not None:
        refuse_fields(call, "with rows of several adapters or tasks, whose templates may have others")
        table = mixture.prompts
    task = active.task if mixture is None else mixture.task
    check_logits(call.logits, task)
    call = _of_task(task, call, placement)
    if given is None and mixture is None and active.pattern is not None:
        placed = put_into_template(active, host.facts, call.batch, call.fields)
        call, given = replace(call, batch=placed.batch), placed.layout
    else:
        refuse_fields(call, "for an adapter without a template of several parts")
    if call.pool_index is not None and (given is None or not task.pools):
        raise ValueError(
            f"pool_index: expected None but for SEQ_CLS with slots or a template, got it for task {task.name}"
        )
    batch = call.batch
    if batch.token_type_ids is not None and (
        task.token_types == "never" or (task.token_types == "placed" and (given is None or host.facts.causal))
    ):
        call = replace(call, batch=replace(batch, token_type_ids=None))
    encoded = placement == OURS and host.facts.encoder_decoder and call.others.get("encoder_outputs") is not None
    if encoded and not active.in_cache:
        return _encoded(host, active, call, mixture, given)
    begun = Plan(SPLICE, call, call.batch, placement=placement, task=task, table=table, mixture=mixture)
    return Planner(host, begun, active, given).plan()


def _check_places(host: Host, active: Prompt, call: Call) -> None:
    """Refuse arguments that say where prompt rows go, for prefixes, which have none."""
    named = call.adapter_names if isinstance(call.adapter_names, (list, tuple)) else [active.name]
    prefix = next((one for name in named if (one := host.prompts.get(name)) is not None and one.in_cache), None)
    if prefix is not None:
        case = f"with {prefix.method}, whose keys and values stand in front of all text"
        refuse("slots", call.slots, case)
        refuse("pool_index", call.pool_index, case)
        refuse_fields(call, case)


def _decoded(host: Host, active: Prompt, call: Call) -> Plan:
    """A decoder's tokens after its cache, in which the prefix stands."""
    refuse_cache(call.adapter_names, call.task_ids)
    others = with_cache(widened(host, call.others, active.rows), call.past_key_values)
    return Plan(CONTINUE, call, call.batch, "the cache holds the prompt", task=active.task, others=others)


def _slots(host: Host, active: Prompt, call: Call) -> tuple[Call, Layout | None, tuple[Prompt, ...]]:
    """The layout that the caller gives, and the prompts to whose tables it refers. Slots that only say what is done
    without them are none."""
    if call.slots is None:
        return call, None, ()
    refuse_fields(call, "with slots, which are of a batch that is complete")
    call, layout, table = slots_of(host, active, call)
    if call.adapter_names is None and active.pattern is None and not active.start and call.pool_index is None:
        plain = without_prefix_slots(call.batch, layout.given_slots, active.rows)
        if plain is not None:
            return replace(call, batch=plain, slots=None), None, table
    return call, layout, table


def _of_task(task: Task, call: Call, placement: str) -> Call:
    """Labels that are no tokens' are the base model's own argument."""
    labels = call.batch.labels
    per_token = task.predicts_next if placement != OURS else task.labels == "tokens"
    if labels is None or per_token:
        return call
    others = call.others if task.labels is None and placement == OURS else {**call.others, "labels": labels}
    return replace(call, batch=replace(call.batch, labels=None), others=others)


def _continued(host: Host, active: Prompt, call: Call) -> Plan:
    """Tokens after a cache in which the prompt stands: it is not put in again, only counted in the mask."""
    refuse("slots", call.slots, "for tokens that follow a cache, in which the prompt stands already")
    check_logits(call.logits, active.task)
    refuse_cache(call.adapter_names, call.task_ids)
    refuse_fields(call, "for tokens that follow a cache")
    facts, batch, cache, rows = host.facts, call.batch, call.past_key_values, active.rows
    length, total = batch.shape[1], cache_length(cache) + batch.shape[1]
    mask, positions = batch.attention_mask, batch.position_ids
    if positions is not None:
        positions = positions + rows
    if mask is not None and mask.shape[1] == total - rows:
        layout, padding = choose_layout(facts, rows, mask, mask, start=active.start)
        mask = (Layout.prefix(rows) if prompt_first(cache) else layout).fill(mask, 1)
        if padding is not None and positions is None and facts.places_position_ids:
            counted = torch.arange(total - length, total, device=mask.device) - padding.unsqueeze(1)
            positions = counted.clamp(min=0) + facts.first_position
    elif mask is not None and mask.shape[1] != total:
        raise ValueError(
            f"attention_mask: expected {total - rows} columns (cached and new tokens) or {total} (and the prompt), "
            f"got {mask.shape[1]}"
        )
    fields = replace(batch, attention_mask=mask, position_ids=positions, token_type_ids=None, input_type_mask=None)
    others = with_cache(call.others, cache)
    return Plan(CONTINUE, call, fields, "the cache holds the prompt", task=active.task, others=others)


def _encoded(host: Host, active: Prompt, call: Call, mixture: Mixture | None, given: Layout | None) -> Plan:
    """The encoder has run already, with the prompt: its mask must cover the prompt's rows."""
    if mixture is not None:
        names = "adapter_names" if call.adapter_names is not None else "task_ids"
        raise ValueError(f"{names}: expected None with encoder_outputs, in which the prompts stand already")
    mask, length = call.batch.attention_mask, call.others["encoder_outputs"][0].shape[1]
    if mask is not None and mask.shape[1] != length and given is None:
        mask = choose_layout(host.facts, active.rows, mask, mask, start=active.start)[0].fill(mask, 1)
    why = "the encoder's output holds the prompt"
    return Plan(CONTINUE, call, Batch(attention_mask=mask), why, task=active.task, others=call.others)
