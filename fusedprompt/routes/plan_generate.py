"""What will be done with a call of `generate`: where its prompt stands, and whether that is computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import check
from ..base.cache import cache_length
from ..base.facts import BaseFacts, device_of, transformers_model
from ..base.first_use import first_use
from ..base.positions import count_positions
from ..layouts.batch import Batch, Placed, check_length, place, put_in_front
from ..layouts.from_template import put_into_template
from ..layouts.layout import Layout
from ..layouts.mixed_batch import place_mixture
from ..layouts.mixture import BASE, Mixture, prompts_of, refuse_cache
from ..layouts.padding import Turn, choose_layout, may_be_padded
from ..layouts.prompt import Prompt
from ..ops._backend import AUTO
from .attention import cost_rule, why_not_attend
from .call import BASE as BASE_ROUTE
from .call import CONTINUE, FULL, PEFT, PREFIX, SHARED, SPLICE, Call, Plan, refuse, refuse_fields, with_cache
from .choice import RouteUnavailable, why_not_as_peft, why_not_length, why_not_now, why_not_prompts
from .host import Host
from .packing import slots_of_one
from .prefix import check_padding, check_served, padding_behind, widened
from .states import prompt_first

# Options that cover the virtual tokens, and such with other steps than one token at a time.
_COVERING = ("output_attentions", "output_hidden_states", "prefill_chunk_size")
# Arguments of `generate` that neither its signature nor its configuration names.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer", "use_cache", "prompt_lookup_num_tokens")
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")


def plan_generate(host: Host, prompts: Mapping[str, Prompt], active: Prompt, call: Call, placement: str) -> Plan:
    """See `plan`. The fields are those of the first step, with the prompt in its place."""
    if placement == PEFT:
        why = _why_not_peft(host, active, call)
        if why is not None and call.route == SHARED:
            raise RouteUnavailable(why)
        return Plan(SHARED if why is None else SPLICE, call, call.batch, why, task=active.task, table=(active,))
    refuse("pool_index", call.pool_index, "in generate")
    refuse("logits", None if call.logits == FULL else call.logits, "in generate")
    call = replace(call, batch=replace(call.batch, token_type_ids=None))
    if host.facts.causal and host.facts.windowed and _is_static(host, call):
        # GPT-Neo finds its window by the number of columns, and a static cache has more than there are tokens.
        call = replace(call, others={**call.others, "cache_implementation": "dynamic"})
    if call.slots is not None and call.adapter_names is not None:
        raise ValueError("adapter_names: expected None with slots, got both")
    mixture = None
    if call.slots is None and call.adapter_names is None:
        active, mixture = prompts_of(prompts, active, None, call.task_ids, call.rows)
    mixes = mixture is not None or call.adapter_names is not None
    in_template = active.pattern is not None and call.slots is None and not mixes
    if not in_template:
        refuse_fields(call, "for an adapter without a template of several parts")
    if in_template or call.slots is not None:
        return _given(host, active, call)
    if mixes:
        if any(option(host.base_model, call.others, name) for name in ASSISTED):
            name, hint = ("task_ids", "") if call.adapter_names is None else ("adapter_names", ": use set_adapter")
            raise ValueError(f"{name}: expected None with assisted decoding, which generates one row{hint}")
        if cache_length(call.past_key_values):
            refuse_cache(call.adapter_names, call.task_ids)
    return _in_front(host, prompts, active, call, mixture)


def _check_steps(host: Host, others: Mapping[str, Any]) -> None:
    """Refuse what takes another first step than the one that the prompt goes into.

    Raises:
        ValueError: text is to be read in chunks.
    """
    size = option(host.base_model, others, "prefill_chunk_size")
    if size is not None:
        raise ValueError(
            "prefill_chunk_size: expected None with a prompt, because transformers cuts ids into chunks, and "
            f"the prompt is not among them, got {size}"
        )


def _planned(host: Host, call: Call, active: Prompt, placed: Placed, others: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of a batch with its prompt in its place."""
    _check_steps(host, others)
    given = {"route": SPLICE, "table": (active,), "others": with_cache(others, call.past_key_values), **more}
    return Plan(call=call, task=active.task, layout=placed.layout, fields=placed.batch, carries=placed.carries, **given)


def _with_mask(host: Host, call: Call) -> Call:
    """With the mask that transformers would infer from ids."""
    batch = call.batch
    if batch.attention_mask is not None:
        check.tensor("attention_mask", batch.attention_mask, "(B, T)", 2)
    if batch.attention_mask is not None or batch.input_ids is None:
        return call
    return replace(call, batch=replace(batch, attention_mask=_infer_mask(host, batch.input_ids, call.others)))


def _to_splice(batch: Batch) -> Batch:
    """Embeddings where they are given, though transformers wants the ids as well."""
    return batch if batch.inputs_embeds is None else replace(batch, input_ids=None)


def _in_front(host: Host, known: Mapping[str, Prompt], active: Prompt, call: Call, mixture: Mixture | None) -> Plan:
    """Behind a prompt in front of all text, or each row behind its own adapter's or task's."""
    base, facts = host.base_model, host.facts
    if facts.encoder_decoder and not active.in_cache and call.others.get("encoder_outputs") is not None:
        raise ValueError(
            "encoder_outputs: expected None, because the prompt goes through the encoder; pass input_ids instead"
        )
    if not facts.encoder_decoder and call.batch.input_ids is None and call.batch.inputs_embeds is None:
        call = replace(call, batch=replace(call.batch, input_ids=_start_of_text(host, call.others)))
    call = _with_mask(host, call)
    batch, others, cache = call.batch, dict(call.others), call.past_key_values
    ids, embeds, mask = batch.input_ids, batch.inputs_embeds, batch.attention_mask
    if not facts.encoder_decoder:
        _count_new_tokens(base, batch.shape[1], others)
    if call.adapter_names is not None:
        mixture = Mixture.of(known, active, call.adapter_names, batch.tokens, call.task_ids)
    elif not facts.encoder_decoder and ids is not None and mask is not None and mask.shape[1] != ids.shape[1]:
        return _continued(host, active, call, others)
    if embeds is not None and ids is not None and embeds.shape[1] != ids.shape[1]:
        raise ValueError(f"inputs_embeds: expected the length of input_ids, {ids.shape[1]}, got {embeds.shape[1]}")
    prompts, rows = ((active,), active.rows) if mixture is None else (mixture.prompts, mixture.longest)
    in_cache = (*prompts, active)[0].in_cache
    if in_cache and not prompts:
        others = dict(with_cache(others, cache))
        return Plan(BASE_ROUTE, call, batch, "no row has a prompt", task=active.task, mixture=mixture, others=others)
    if in_cache:
        _check_behind(host, replace(call, others=others), prompts or (active,), rows)
    if in_cache and facts.encoder_decoder:
        _check_steps(host, others)
        others = dict(with_cache(widened(host, others, rows, mixture), cache))
        batch = padding_behind(batch, others)
        return Plan(PREFIX, call, batch, task=active.task, table=prompts, mixture=mixture, others=others)
    why = None if in_cache else _choice(host, replace(call, others=others), prompts, rows)
    tokens = _to_splice(batch)
    if why is None:
        check_length(facts, rows, tokens.shape[1])
        tokens.checked(facts)
        if mixture is not None:
            mask = mixture.prompt_first_mask(mask, tokens.shape[1])
        elif mask is not None:
            mask = F.pad(mask, (rows, 0), value=1)
        placed = Placed(Layout.prefix(rows), replace(tokens, attention_mask=mask))
    elif mixture is not None:
        placed = place_mixture(mixture, facts, tokens, pool_last=facts.causal)
    elif prompt_first(cache):  # the prompt goes before the padding, as it stands in the cache
        placed = put_in_front(facts, rows, replace(tokens, attention_mask=None), start=active.start)
        placed = replace(placed, batch=replace(placed.batch, attention_mask=mask))
    else:
        placed = put_in_front(facts, rows, tokens, start=active.start)
    found = {"route": PREFIX if in_cache else SPLICE if why else SHARED, "table": prompts, "mixture": mixture}
    if why is None:
        found["joined"] = _why_joined(host, replace(call, others=others), rows)
    return _planned(host, call, active, _counted(facts, placed, call), others, why=why, **found)


def _why_joined(host: Host, call: Call, rows: int) -> str | None:
    """Why each row gets a copy of the prefix, joined with its own keys; None where attention reads the one."""
    base, others, (size, length) = host.base_model, call.others, call.batch.shape
    size *= copies(base, others)
    cost = cost_rule(rows, size)
    if cost is not None:
        return cost
    if call.past_key_values is not None or reads_ids(host, others):
        return "the prefix is put into a cache of another making"
    if _is_static(host, call):
        return "a static cache holds it"
    if option(base, others, "output_attentions"):
        return "attention's weights are asked for"
    return why_not_attend(host, rows + length + most_new_tokens(base, others))


def copies(base: Any, others: Mapping[str, Any]) -> int:
    """Rows that transformers makes of each."""
    return max(int(option(base, others, name) or 1) for name in ("num_beams", "num_return_sequences"))


def _counted(facts: BaseFacts, placed: Placed, call: Call) -> Placed:
    """Without position ids that are not the caller's: transformers counts them from the mask, at every step. But it
    begins at 0, where RoBERTa and its like begin behind their padding index; it goes on from those that it is given."""
    batch = placed.batch
    if call.batch.position_ids is not None:
        return placed
    positions = None
    if facts.first_position and facts.takes_position_ids:
        size, length = batch.shape
        mask, layout = batch.attention_mask, placed.layout
        if mask is None:
            mask = torch.ones(size, layout.output_length(length), dtype=torch.int64, device=batch.tokens.device)
        elif placed.carries:
            mask = layout.fill(mask, 1)
        positions = count_positions(mask, facts.first_position)
    return replace(placed, batch=replace(batch, position_ids=positions))


def _continued(host: Host, active: Prompt, call: Call, others: Mapping[str, Any]) -> Plan:
    """Only new tokens, after a cache that the mask covers: the prompt is in the cache."""
    cache, mask, ids, rows = call.past_key_values, call.batch.attention_mask, call.batch.input_ids, active.rows
    assert mask is not None and ids is not None
    if mask.shape[1] != cache_length(cache) - rows + ids.shape[1]:
        raise ValueError(
            f"attention_mask: expected shape (B, T) = {tuple(ids.shape)}, or the columns of the cached text too, "
            f"got {tuple(mask.shape)}"
        )
    layout = choose_layout(host.facts, rows, mask, mask, start=active.start)[0]
    if prompt_first(cache):
        layout = Layout.prefix(rows)
    fields = Batch(input_ids=ids, attention_mask=layout.fill(mask, 1))
    others = with_cache(others, cache)
    return Plan(CONTINUE, call, fields, "the cache holds the prompt", task=active.task, others=others)


def _given(host: Host, active: Prompt, call: Call) -> Plan:
    """Behind rows whose layout is the template's, or given. Padding at the right is moved to the left, as decoders
    need it."""
    facts, others, pattern = host.facts, dict(call.others), active.pattern
    table: tuple[Prompt, ...] = (active,)
    if call.slots is None:
        assert pattern is not None
        if cache_length(call.past_key_values):
            raise ValueError(
                f"past_key_values: expected an empty cache with the template {str(pattern)!r}: what follows a cache is "
                "not put into the template again"
            )
        if not call.batch.given() and call.fields is None:
            raise ValueError(
                f"input_ids: expected input_ids, inputs_embeds or fields for the template {str(pattern)!r}"
            )
        if call.fields is None:
            call = _with_mask(host, call)
        placed = put_into_template(active, facts, call.batch, call.fields)
    else:
        if call.batch.input_ids is None and call.batch.inputs_embeds is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds with slots, got neither")
        if cache_length(call.past_key_values):
            raise ValueError("slots: expected None for tokens that follow a cache, in which the prompt stands already")
        layout, table = slots_of_one(host, active, call)
        placed = Placed(layout, call.batch)
    why = "the slots say where each prompt row goes"
    if call.route == SHARED:
        raise RouteUnavailable(why)
    batch = placed.batch
    # The ids of a template's fields are joined.
    call = replace(call, batch=replace(call.batch, input_ids=batch.input_ids))
    if batch.attention_mask is None:
        batch = replace(batch, attention_mask=torch.ones_like(placed.layout.given_slots))
    decoder = not facts.encoder_decoder
    placed = place(facts, placed.layout, _to_splice(batch), Turn.LAST_TO_END if decoder else None)
    if decoder:
        _count_new_tokens(host.base_model, batch.shape[1], others)
        placed = _counted(facts, placed, call)
    why = "it was asked for" if call.route == SPLICE else why
    return _planned(host, call, active, placed, others, why=why, table=table)


def _choice(host: Host, call: Call, prompts: tuple[Prompt, ...], rows: int) -> str | None:
    """Why this call prefills the prompt in each row, or None, if it prefills the text alone; or a RouteUnavailable."""
    if call.route == SPLICE:
        return "it was asked for"
    if cache_length(call.past_key_values):
        return "the cache is not empty"
    objection = why_not_prompts(host, prompts) or _why_not_arguments(host, call)
    if objection is None:
        new = most_new_tokens(host.base_model, call.others)
        objection = why_not_length(host, rows + call.batch.shape[1] + new) or why_not_now(host)
        objection = objection or _why_not_found(host, call, {prompt.rows for prompt in prompts})
    if objection is not None and call.route == SHARED:
        raise RouteUnavailable(objection)
    return objection


def _check_behind(host: Host, call: Call, prompts: tuple[Prompt, ...], rows: int) -> None:
    """Refuse a call whose prompts are prefixes, if they cannot be put into its cache.

    Raises:
        RouteUnavailable, ValueError: with the reason.
    """
    check_served(host, prompts, call.route)
    if cache_length(call.past_key_values):
        return  # the prefix is in it
    base, others, own = host.base_model, call.others, call.past_key_values is not None
    objection = None if own else why_not_own_cache(host, others)
    if objection is None and call.batch.position_ids is not None:
        objection = "transformers counts position_ids behind a prefix by itself"
    if host.facts.encoder_decoder:
        if objection is None and not own and option(base, others, "cache_implementation") == "static":
            objection = "an encoder-decoder's prefix stands in a cache that grows"
        if objection is None and any(option(base, others, name) for name in ASSISTED):
            objection = (
                "in assisted decoding transformers cuts a decoder's mask to its ids, behind which the prefix is not"
            )
    elif objection is None and own and reads_ids(host, others):
        objection = "ids of the prompt go through a cache of transformers' own making"
    length = 0 if host.facts.encoder_decoder else call.batch.shape[1] + most_new_tokens(base, others)
    if objection is None and (_is_static(host, call) or call.shared_prefix is not None):
        objection = why_not_length(host, rows + length)
    if objection is not None:
        raise RouteUnavailable(objection, PREFIX)
    uneven = call.adapter_names is not None and (
        len({prompt.rows for prompt in prompts}) > 1 or BASE in call.adapter_names
    )
    check_padding(host, call.batch.attention_mask, rows, length, uneven or _is_static(host, call))


def _is_static(host: Host, call: Call) -> bool:
    return bool(option(host.base_model, call.others, "cache_implementation") == "static")


def _why_not_found(host: Host, call: Call, counts: set[int]) -> str | None:
    """An objection from what the base model did on its first use, or None."""
    found = first_use(host.base_model, host.facts, shares=True)
    if found.sharing is not None or found.gap is None:
        return found.sharing
    names = call.adapter_names
    uneven = names is not None and (len(counts) > 1 or BASE in names)
    # Where columns count, those of a static cache that are yet to be filled do too.
    return found.gap if uneven or _is_static(host, call) or may_be_padded(call.batch.attention_mask, 0) else None


def _why_not_arguments(host: Host, call: Call) -> str | None:
    base, others = host.base_model, call.others
    if not all(call.batch.shape):
        return "there are no tokens"
    if call.batch.position_ids is not None:
        return "transformers counts position_ids of a cached prompt by itself"
    if call.past_key_values is not None:
        return "the caller's own cache is to be filled"
    objection = why_not_own_cache(host, others)
    if objection is not None:
        return objection
    known = {*vars(base.generation_config), *inspect.signature(base.generate).parameters, *_OF_GENERATE}
    of_forward = next((name for name, value in others.items() if value is not None and name not in known), None)
    if of_forward is not None:
        return f"{of_forward} is an argument of the base model that would have to cover the virtual tokens"
    covering = next((name for name in _COVERING if option(base, others, name)), None)
    return None if covering is None else f"{covering} covers the virtual tokens"


def why_not_own_cache(host: Host, others: Mapping[str, Any]) -> str | None:
    """An objection to beginning `generate` with a cache that is made here, or None."""
    base = host.base_model
    kind, own = option(base, others, "cache_implementation"), base.generation_config.cache_implementation
    if kind not in (None, "dynamic", "static") or (own is not None and others.get("generation_config") is None):
        return f"transformers makes the cache of kind '{kind}' by itself"
    if reads_ids(host, others) and (kind == "static" or option(base, others, "use_cache") is False):
        return "ids of the prompt go through the base model's own cache, if any"
    return None


def _why_not_peft(host: Host, active: Prompt, call: Call) -> str | None:
    """An objection to PEFT's own `generate` behind a prompt that is computed once, or None."""
    if call.route == SPLICE:
        return "route 'splice' was asked for"
    base = host.base_model
    objection = why_not_prompts(host, (active,)) or why_not_as_peft(host.facts) or why_not_now(host)
    objection = objection or first_use(host.base_model, host.facts, shares=True).sharing
    if objection is None and call.route == AUTO:
        device, dtype = device_of(host.word_embeddings).type, base.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype not in (torch.float32, torch.float64):
            objection = f"in {dtype} rounding may choose other tokens (route='shared' does not mind)"
    if objection is None:
        sources = (call.others.get("generation_config"), base.generation_config, base.config)
        for name in (*_COVERING, *ASSISTED):
            if call.others.get(name) or any(getattr(source, name, None) for source in sources):
                return f"{name} concerns the virtual tokens"
    return objection


def reads_ids(host: Host, others: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` needs columns of ids for the prompt; see `generate_by_ids`."""
    base = host.base_model
    if host.facts.needs_ids or host.facts.placeholder is not None:
        return True
    if any(option(base, others, name) for name in ASSISTED):
        return True
    # transformers' own question: without this argument it refuses embeddings.
    model = transformers_model(base) or base
    return "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters


def option(base: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation option: from the call, else from its generation_config, else from the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    config = kwargs.get("generation_config")
    value = getattr(config, name, None) if config is not None else None
    return value if value is not None else getattr(base.generation_config, name, None)


def most_new_tokens(base: Any, kwargs: Mapping[str, Any]) -> int:
    """The most tokens that are generated; transformers' default is 20."""
    return int(option(base, kwargs, "max_new_tokens") or 20)


def _start_of_text(host: Host, kwargs: Mapping[str, Any]) -> Tensor:
    """As transformers: without any input, one row that starts with the BOS token."""
    bos = option(host.base_model, kwargs, "bos_token_id")
    if bos is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds, because the model has no bos_token_id")
    return torch.full((1, 1), int(bos), dtype=torch.int64, device=device_of(host.word_embeddings))


def _infer_mask(host: Host, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """As transformers: padding is told from text by the pad token, if that is not also an end-of-text token."""
    pad = option(host.base_model, kwargs, "pad_token_id")
    eos = option(host.base_model, kwargs, "eos_token_id")
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    mask: Tensor = (ids != pad).to(ids.dtype)
    return mask


def _count_new_tokens(base: Any, length: int, kwargs: dict[str, Any]) -> None:
    """Turn limits on the whole sequence into limits on new tokens.

    With embeddings and ids of different lengths transformers subtracts the embeddings' length from max_length, and so
    would count the prompt as text.
    """
    config = kwargs.get("generation_config")
    for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = kwargs.pop(whole, None)
        source = config if config is not None else base.generation_config
        if limit is None and kwargs.get(new) is None and getattr(source, new, None) is None:
            limit = getattr(source, whole, None)
            if limit and config is not None:
                config = kwargs["generation_config"] = copy.copy(config)
                setattr(config, whole, None)
            if limit and limit == getattr(type(source)(), whole):
                kwargs[new] = limit  # transformers' own default (20, before version 5) counts new tokens
        if not limit or kwargs.get(new) is not None:
            continue
        if whole == "max_length" and limit <= length:
            raise ValueError(f"max_length: expected more than the {length} tokens of the input, got {limit}")
        kwargs[new] = max(int(limit) - length, 0)
