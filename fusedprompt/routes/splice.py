"""Route `splice`: prompt rows go into every row of the batch, and the base model runs on embeddings of both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..base.facts import fusable_table, transformers_model
from ..base.layer_inputs import layer_inputs
from ..base.outputs import replaced
from ..base.positions import numbered
from ..base.virtual_ids import answered, check_known, vocabulary
from ..layouts.batch import Batch
from ..layouts.layout import IGNORE_INDEX, Layout
from ..ops._backend import using
from .call import PEFT, Plan
from .host import Host
from .loss import Answers, NextToken, Source, answers_loss


def embedded(host: Host, ids: Tensor) -> Tensor:
    """Word embeddings (B, T, D) of ids (B, T); on a CPU an IndexError names one that is outside the table."""
    table = fusable_table(host.word_embeddings)
    if table is None:
        return _called(host, ids)
    with using(host.backend):
        return ops.splice(table[:0], Layout.prefix(0), input_ids=ids, table=table)


def _called(host: Host, ids: Tensor) -> Tensor:
    """What the module of the word embeddings makes of ids."""
    embeds = host.word_embeddings(ids)
    if not isinstance(embeds, Tensor):
        got = f"{type(embeds).__name__} of {type(transformers_model(host.base_model) or host.base_model).__name__}"
        raise TypeError(f"base_model: expected input embeddings that give a tensor, got the {got}")
    return embeds


@contextlib.contextmanager
def spliced(host: Host, plan: Plan) -> Iterator[dict[str, Any]]:
    """The arguments of the base model that come from tokens and prompts, for a call in the block.

    Raises:
        ValueError: the base model needs ids, and the call has embeddings alone.
    """
    batch, layout, facts = plan.fields, plan.layout, host.facts
    assert layout is not None
    tables = host.table(plan.table, padded=plan.is_padded).to(batch.tokens.device)
    arguments: dict[str, Any] = {"position_ids": batch.position_ids, "token_type_ids": batch.token_type_ids}
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if facts.needs_ids:
        given, context = _virtual(host, tables, layout, batch, plan.carries)
    else:
        given = _embeds(host, tables, layout, batch, plan.carries)
        mask = given["attention_mask"]
        ours = mask is not None and plan.placement != PEFT
        if ours and (facts.stateful or not (facts.causal or plan.carries)):
            # Like the embedding of a padding token: MobileBERT's looks at the next column, and states take it in.
            given["inputs_embeds"] = given["inputs_embeds"] * (mask != 0).unsqueeze(-1)
        given["per_layer_inputs"] = _layer_inputs(host, plan, layout, batch)
    arguments = {name: value for name, value in {**given, **arguments}.items() if value is not None}
    with context, numbered(host.base_model, arguments, facts.takes_position_ids):
        yield arguments


def _embeds(host: Host, tables: Tensor, layout: Layout, batch: Batch, carries: bool) -> dict[str, Any]:
    """Embeddings of prompts (R, D) and tokens, with mask and labels."""
    ids, embeds = batch.input_ids, batch.inputs_embeds
    table = fusable_table(host.word_embeddings) if ids is not None else None
    if ids is not None and table is None:
        embeds = _called(host, ids)
    with using(host.backend):
        filled = ops.splice_batch(
            tables,
            layout,
            input_ids=None if table is None else ids,
            table=table,
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask if carries else None,
            labels=batch.labels if carries else None,
        )
    return {
        "inputs_embeds": filled.inputs_embeds,
        "attention_mask": filled.attention_mask if carries else batch.attention_mask,
        "labels": filled.labels if carries else batch.labels,
    }


def _layer_inputs(host: Host, plan: Plan, layout: Layout, batch: Batch) -> Tensor | None:
    """(B, S, layers, width): what each layer gets beside embeddings, if there are ids to make it of, or tokens' own."""
    placeholder, ids, own = host.facts.placeholder, batch.input_ids, plan.others.get("per_layer_inputs")
    as_peft = plan.placement == PEFT and not host.facts.needs_layer_inputs  # which gives embeddings alone
    if placeholder is None or as_peft:
        return None
    if own is None:
        return None if ids is None else layer_inputs(host.base_model, layout.fill(ids, placeholder))
    of_prompt = layer_inputs(host.base_model, torch.full((1, 1), placeholder, device=own.device))
    slots = layout.slots
    if slots is None:
        return torch.cat((of_prompt.expand(own.shape[0], layout.num_prompt_rows, -1, -1), own), 1)
    carried = own[torch.arange(own.shape[0], device=own.device).unsqueeze(1), slots.clamp(min=0)]
    return torch.where((slots < 0)[..., None, None], of_prompt, carried)


def _virtual(
    host: Host, tables: Tensor, layout: Layout, batch: Batch, carries: bool
) -> tuple[dict[str, Any], contextlib.AbstractContextManager[None]]:
    """Ids of prompts and tokens, with mask and labels; and a block in which the word embeddings know them all."""
    ids, embedding = batch.input_ids, host.word_embeddings
    if ids is None:
        kind = type(transformers_model(host.base_model)).__name__
        raise ValueError(f"inputs_embeds: expected input_ids, because {kind} takes no embeddings in their place")
    check_known(ids, embedding)
    wide = layout.fill_rows(ids, vocabulary(embedding) + torch.arange(tables.shape[0], device=ids.device))
    mask, labels = batch.attention_mask, batch.labels
    if carries:
        mask = None if mask is None else layout.fill(mask, 1)
        labels = None if labels is None else layout.fill(labels, IGNORE_INDEX)
    if mask is not None:  # such models tell padding, and ends of texts, by their ids
        wide = wide.masked_fill(mask == 0, getattr(host.base_model.config, "pad_token_id", None) or 0)
    given = {"input_ids": wide, "attention_mask": mask, "labels": labels}
    return given, answered(host.base_model, embedding, tables)


# Longformer's and LED's. Virtual tokens are none of those that see all and are seen by all.
GLOBAL_ATTENTION = "global_attention_mask"


def others_of(plan: Plan) -> dict[str, Any]:
    """The base model's further arguments, of prompt and tokens."""
    others, layout = dict(plan.others), plan.layout
    others.pop("per_layer_inputs", None)  # see `spliced`
    if isinstance(others.get(GLOBAL_ATTENTION), Tensor) and others[GLOBAL_ATTENTION].shape == plan.call.batch.shape:
        assert layout is not None
        others[GLOBAL_ATTENTION] = layout.fill(others[GLOBAL_ATTENTION], 0)
    return others


def run_spliced(host: Host, plan: Plan) -> Any:
    """The base model's output on prompt and tokens."""
    others, base, loss = others_of(plan), host.base_model, plan.loss
    with spliced(host, plan) as arguments:
        if loss is None and not plan.cuts and not plan.turned:
            output = base(**arguments, **others)
            return host.text_head.told_of(output, dict) if plan.reads else output
        as_dict = others.pop("return_dict", None)
        mask = None if plan.carries else arguments.get("attention_mask")
        if isinstance(loss, NextToken):
            loss = replace(loss, labels=arguments.pop("labels"))
            others.pop("num_items_in_batch", None)

        def call() -> Any:
            return base(**arguments, **others, return_dict=True)

        if loss is None or isinstance(loss, Answers):
            output = cut(plan, call(), mask, loss, base)
        else:
            output = cut(plan, with_loss(host, call, loss.of, plan.waits), mask)
    return output.to_tuple() if as_dict is False else output


def with_loss(host: Host, call: Callable[[], Any], loss_of: Callable[[Source], Tensor], wait: bool) -> Any:
    """The output of `call()`, which runs the base model without labels, with the loss of its logits.

    wait: the logits may be left until they are read; `loss_of` then gets the head that would make them.
    """
    output, head = host.text_head.call(host.base_model, call) if wait else (call(), None)
    if head is None:
        return host.text_head.told_of(replaced(output, loss=loss_of(output.logits)), dict)
    logits = head.logits()
    return host.text_head.told_of(replaced(output, loss=loss_of(head)), lambda: {"logits": logits()})


def cut(plan: Plan, output: Any, mask: Tensor | None, loss: Answers | None = None, base: Any = None) -> Any:
    """The output with its per-position fields `plan.cuts` cut down to the tokens, in the tokens' order.

    mask: (B, S), of a layout whose padding may be tokens that stand elsewhere too.
    loss: of answers, whose own logits are those of the tokens.
    """
    layout = plan.layout
    assert layout is not None
    if plan.turned:
        output["logits"] = _in_order(output["logits"], layout, plan.fields)
    if not plan.cuts:
        return output
    found: dict[str, Any] = {name: _at_tokens(output[name], layout, plan.fields, mask) for name in plan.cuts}
    if loss is not None and output.get("loss") is not None:
        moved = (plan.others["start_positions"], plan.others["end_positions"])
        pair = (found["start_logits"], found["end_logits"])
        found["loss"] = answers_loss(base, loss, output, pair, moved)
    for name, value in found.items():
        output[name] = value
    return output


def _in_order(values: Tensor, layout: Layout, batch: Batch) -> Tensor:
    """(B, P + T, X): the rows of (B, S, X) values, the prompt's, which stand first, and the tokens' in their order."""
    return torch.cat((values[:, : layout.num_prompt_rows], _at_tokens(values, layout, batch, None)), 1)


def _at_tokens(values: Tensor, layout: Layout, batch: Batch, mask: Tensor | None) -> Tensor:
    """(B, T, X): the rows of (B, S, X) values that belong to the tokens. mask: (B, S)."""
    size, length = batch.shape
    if layout.slots is None:
        return values[:, layout.num_prompt_rows :]
    positions = layout.token_positions(size, length, values.device, mask)
    return values[torch.arange(size, device=values.device).unsqueeze(1), positions]
