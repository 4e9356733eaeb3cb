"""What a model does with a prompt, in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import ops
from ..base.first_use import remembered
from ..layouts.picture import PADDING, join_symbols, row_symbols
from ..layouts.pieces import anchor_slots
from ..layouts.prompt import Prompt
from ..methods import method_of
from .attention import CHEAP
from .call import BASE, CONTINUE, PREFIX, SHARED, SPLICE, Call, Plan
from .choice import RouteUnavailable, is_kept, why_not_head_loss, why_not_model
from .host import Host
from .plan import plan

_LETTERS = "PQRSUVWXYZ"  # of prompt rows, adapter by adapter


def explain(host: Host, call: Call) -> str:
    """How the prompt of a call reaches the base model, why so, and a picture of its first row."""
    try:
        planned = plan(host, call)
    except RouteUnavailable as error:
        planned = plan(host, replace(call, route=SPLICE))
        return "\n".join([f"route shared, which cannot run: {error.objection}", *_pictures(host, planned)])
    return describe(host, planned)


def describe(host: Host, planned: Plan) -> str:
    """A plan in words."""
    line = f"route {planned.route}" + ("" if planned.why is None else f": {planned.why}")
    if planned.route in (BASE, CONTINUE):
        return line
    # The spliced order of a batch is that of its output on both routes.
    spliced = plan(host, replace(planned.call, route=SPLICE)) if planned.route == SHARED else planned
    found = remembered(host.base_model)
    matters = planned.route == SHARED or (planned.why is not None and planned.why in (found.sharing, found.gap))
    attention = [_attention(planned)] if planned.route in (SHARED, PREFIX) and planned.joined != CHEAP else []
    first_use = first_use_line(host) if matters else []
    return "\n".join([line, *_pictures(host, spliced), *_computed(host, planned), *attention, *first_use])


def _computed(host: Host, planned: Plan) -> list[str]:
    """What sharing saves, where all rows have one prompt without text beside it."""
    if planned.route != SHARED or planned.mixture is not None or [one.shared for one in planned.table] != [None]:
        return []
    rows, (size, length) = planned.table[0].rows, planned.fields.shape
    if is_kept(host, planned.table):
        return [
            f"the prompt is kept between calls: {size * length} of {size * (rows + length)} tokens are computed, and "
            f"{rows} more the first time"
        ]
    return [f"the prompt is computed once, not in every row: {rows + size * length} of {size * (rows + length)} tokens"]


def _attention(planned: Plan) -> str:
    if planned.joined is None:
        return "attention: all rows read one prefix where it is"
    return f"attention: the prefix is joined with each row's own keys: {planned.joined}"


def first_use_line(host: Host) -> list[str]:
    """What the base model's first use has shown, if it has been looked at; see `base.first_use`."""
    found = remembered(host.base_model)
    return [] if found.milliseconds is None else [f"first use: {found}"]


def describe_adapter(host: Host, name: str) -> str:
    """An adapter: its method, route and backends."""
    active, config, prompt = ", active" if name == host.in_use else "", host.peft_config[name], host.prompts[name]
    size = f"{config.num_virtual_tokens} virtual tokens"
    size += "" if prompt.num_tasks is None else f" for each of {prompt.num_tasks} tasks"
    size += "" if prompt.kept is None else f" of which {prompt.rows} are seen"
    runs = backends(host, name, operations(host, name, encodes=not config.inference_mode))
    said = ", ".join(filter(None, (method_of(config).name, size, _route_of_model(host, prompt), runs)))
    return f"{name}{active}: {said}"


def operations(host: Host, name: str, encodes: bool) -> list[str]:
    """The ops that serve an adapter, in the order they run in. encodes: its encoder runs on ops."""
    method, task = method_of(host.peft_config[name]), host.prompts[name].task
    used = [*(method.ops(host.prompt_encoder[name]) if encodes else ())]
    if not host.prompts[name].in_cache:
        used.append("splice")
    makes_loss = task.predicts_next and host.facts.causal and (host.route != SPLICE or method.targets is not None)
    return [*used, "head_loss"] if makes_loss and why_not_head_loss(host) is None else used


def backends(host: Host, name: str, used: Sequence[str]) -> str:
    """The backend of each of an adapter's ops."""
    weight, found = host.prompt_encoder[name].embedding.weight, []
    for op in used:
        reasons = ops.explain(op, weight)
        asked = host.backend if host.backend in reasons else None
        found.append(f"{op}: {asked or next(backend for backend, why in reasons.items() if why == 'runs')}")
    return ", ".join(found)


def _route_of_model(host: Host, prompt: Prompt) -> str:
    if prompt.in_cache:
        return "route prefix: its keys and values stand in the cache"
    if host.route == SPLICE:
        return "route splice (asked for)"
    objection = why_not_model(host, prompt.name)
    if prompt.pattern is not None:
        objection = f"its template is {prompt.pattern}, and not a prompt in front of all text"
    if objection is None:
        return "route shared" if host.route == SHARED else "route shared where it pays"
    return f"route {'shared, which cannot run' if host.route == SHARED else 'splice'} ({objection})"


def _pictures(host: Host, planned: Plan) -> list[str]:
    """The first row of a spliced batch; of a mixed one, that of each prompt, with a letter of its own."""
    layout, batch, mixture = planned.layout, planned.fields, planned.mixture
    if layout is None or not batch.shape[0]:
        return []
    mask = batch.attention_mask
    if planned.carries and mask is not None:
        mask = layout.fill(mask, 1)
    prompts = planned.table
    letters = dict(zip(range(len(prompts)), itertools.cycle(_LETTERS)))
    if len(prompts) == 1 and mixture is None and planned.call.adapter_names is None:
        whose = "" if prompts[0].task_id is None else f"{prompts[0]}, "
        return [f"{whose}row 0: {_single(prompts[0], planned, mask)}"]
    # Where each prompt's rows of the table end; a template's constant tokens stand behind its prompt.
    owners = [(which, one.encodes(row)) for which, one in enumerate(prompts) for row in range(one.table_rows)]

    def letter(index: int) -> str:
        owner, is_prompt = owners[index] if index < len(owners) else (None, False)
        return PADDING if owner is None else letters[owner] if is_prompt else "A"

    if mixture is None:
        return [f"row 0: {join_symbols(row_symbols(layout.given_slots[0].tolist(), letter=letter))}"]
    lines = []
    named = {one.source: (str(one), letters[which]) for which, one in enumerate(prompts)}
    for source in dict.fromkeys(mixture.sources):
        row, number = mixture.sources.index(source), mixture.sources.count(source)
        real = None if mask is None else mask[row].tolist()
        name, own = named.get(source, (source[0], PADDING))
        if planned.route == PREFIX:  # each row's own, at the end of the columns of the longest
            slots = [*range(-layout.num_prompt_rows, 0), *range(batch.shape[1])]
            symbols = [own if symbol == "P" else symbol for symbol in row_symbols(slots, real)]
        else:
            slots = layout.spelled(batch.shape[1]).given_slots[row].tolist()
            symbols = row_symbols(slots, real, letter=letter)
        lines.append(f"{name}, {number} row{'s' * (number > 1)}, row {row}: {join_symbols(symbols)}")
    return lines


def _single(prompt: Prompt, planned: Plan, mask: Any) -> str:
    layout, length = planned.layout, planned.fields.shape[1]
    assert layout is not None
    rows = layout.num_prompt_rows
    slots = [*range(-1, -rows - 1, -1), *range(length)] if layout.slots is None else layout.slots[0].tolist()
    real = None if mask is None else mask[0].tolist()
    anchors = () if prompt.pattern is None else anchor_slots(prompt.pattern, slots, real)
    # A table's further rows are a template's constant tokens.
    return join_symbols(row_symbols(slots, real, anchors, lambda row: "P" if prompt.encodes(row) else "t"))
