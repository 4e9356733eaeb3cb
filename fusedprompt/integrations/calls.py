"""PEFT's `forward` with the prompt put in by our routes: PEFT's own layout, shapes and outputs, task by task.

What PEFT does otherwise (warnings, prefix tuning, arguments that it rewrites) is not repeated here: they go there.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..base_model import cache_length, fusable_table
from ..causal_loss import call_for_loss, call_with_labels, context_loss, may_wait
from ..config import TaskType
from ..layout import IGNORE_INDEX, Layout
from ..lm_head import Withheld
from ..ops._backend import AUTO, BackendUnavailable
from ..prompt_cache import is_kept, prompt_states
from ..shared import PromptStates, run_classifier, run_text
from ..sharing import SHARED, SPLICE, choose, cost_rule, why_not_batch
from ..tasks import FORWARD, TENSORS, Batch, continue_from_cache
from .encoders import context_of, is_label, using, why_not_adapter

if TYPE_CHECKING:
    from ..model import PromptModel


@dataclass(frozen=True)
class Task:
    """What PEFT's forward of a class does beside putting the prompt in front of the tokens.

    labels_per_token: labels are extended over the prompt.
    token_types: it extends token_type_ids over the prompt; otherwise it drops them, with a warning.
    dropped: arguments that it takes and passes to nobody.
    shares: the shared route serves it.
    generates: its `generate` can share the prompt.
    """

    labels_per_token: bool = False
    token_types: bool = False
    dropped: tuple[str, ...] = ("task_ids",)
    shares: bool = False
    generates: bool = False


TASKS = {
    "PeftModelForCausalLM": Task(labels_per_token=True, shares=True, generates=True),
    "PeftModelForSequenceClassification": Task(token_types=True, shares=True),
    "PeftModelForTokenClassification": Task(token_types=True),
    "PeftModelForQuestionAnswering": Task(dropped=("task_ids", "token_type_ids", "position_ids")),
    "PeftModelForSeq2SeqLM": Task(),
    "PeftModelForFeatureExtraction": Task(),
}


def bind(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, without those that are None; None if PEFT would refuse them."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if args:
        names = list(inspect.signature(method).parameters)[1:]
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return None
        given.update({name: value for name, value in zip(names, args) if value is not None})
    return given


def why_not_call(model: Any, task: Task, given: dict[str, Any]) -> str | None:
    """Why PEFT's own forward serves this call, or None."""
    config = model.active_peft_config
    objection = why_not_adapter(config)
    if objection is not None:
        return objection
    tokens = [given[name] for name in ("input_ids", "inputs_embeds") if name in given]
    if len(tokens) != 1 or tokens[0].dim() != (2 if "input_ids" in given else 3):
        return "it takes either input_ids (B, T) or inputs_embeds (B, T, D)"
    if model.word_embeddings is None:
        return "PEFT has not found the word embeddings"
    for name in ("attention_mask", "labels", "token_type_ids"):
        value = given.get(name)
        if value is None or name in task.dropped or (name == "labels" and not task.labels_per_token):
            continue
        if value.shape != tokens[0].shape[:2] or value.device != tokens[0].device:
            return f"{name} is not (B, T) on the tokens' device"
    if "position_ids" in given and "position_ids" not in task.dropped:
        return "PEFT ignores position_ids, with a warning"
    if "token_type_ids" in given and not task.token_types and "token_type_ids" not in task.dropped:
        return "PEFT ignores token_type_ids, with a warning"
    if _is_context(config) and "default" not in model.peft_config:
        return "PEFT reads the settings of CPT's loss from the adapter named 'default', which is not there"
    return None


def run(
    model: Any, view: PromptModel, task: Task, backend: str, given: dict[str, Any], spliced_because: set[str]
) -> Any:
    """PEFT's forward.

    given: arguments that `why_not_call` has nothing against.
    spliced_because: gets the reason if sharing would pay for this call and cannot run.
    """
    for name in task.dropped:
        given.pop(name, None)
    config = model.active_peft_config
    if _is_context(config):
        return _context_aware(model, view, config, backend, given, spliced_because)
    if view.route == SHARED and not task.shares:
        raise BackendUnavailable("route 'shared' cannot run: it serves CAUSAL_LM and SEQ_CLS")
    wait = task.labels_per_token and may_wait(view, given.get("labels"))
    states = _share(view, given, spliced_because, wait) if task.shares else None
    if states is not None:
        batch = _text(given, view.prompt_rows_count())
        if task.labels_per_token:
            return run_text(view, batch, states, labels=batch.labels, logits="full", wait=wait)
        return run_classifier(view, batch, states)
    arguments = spliced(view, task, backend, given)
    return call_with_labels(view, arguments, view.route) if task.labels_per_token else model.base_model(**arguments)


def spliced(view: PromptModel, task: Task, backend: str, given: dict[str, Any]) -> dict[str, Any]:
    """The base model's arguments, with the prompt in front of each row, as PEFT puts it."""
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    mask = given.pop("attention_mask", None)
    labels = given.pop("labels", None) if task.labels_per_token else None
    token_types = given.pop("token_type_ids", None)
    rows, embeddings = view.prompt_rows(), view.word_embeddings
    table = fusable_table(embeddings) if ids is not None else None
    if table is not None and ids.dtype not in (torch.int64, torch.int32):
        table = None
    if ids is not None and table is None:
        embeds = embeddings(ids)
    tokens = ids if table is not None else embeds
    layout = Layout.prefix(rows.shape[0])
    with using(backend):
        batch = ops.splice_batch(
            rows.to(tokens.device),
            layout,
            input_ids=ids if table is not None else None,
            table=table,
            inputs_embeds=embeds,
            attention_mask=mask,
            labels=labels,
        )
    given["inputs_embeds"] = batch.inputs_embeds
    if mask is not None:
        given["attention_mask"] = batch.attention_mask
    if labels is not None:
        given["labels"] = batch.labels
    if token_types is not None:
        given["token_type_ids"] = layout.fill(token_types, 0).long()
    return given


def _share(
    view: PromptModel, given: dict[str, Any], spliced_because: set[str], wait: bool = False
) -> PromptStates | None:
    """The prompt's states, if the call takes the shared route. wait: as in `prompt_states`."""
    if view.route == SPLICE:
        return None
    names = ("input_ids", "inputs_embeds", "attention_mask", "labels")
    others = {name: value for name, value in given.items() if name not in names}
    tensors: dict[str, Any] = {name: given.get(name) for name in names}
    batch = Batch(**tensors, others=others)
    # The cheap question first: objections look at every module of the base model.
    if view.route == AUTO and _not_worth(view, batch, True) is not None:
        return None
    objection = why_not_batch(view, batch)
    if objection is not None and not torch.compiler.is_compiling():
        spliced_because.add(objection)
    kept = objection is None and is_kept(view)
    if not choose(view.route, objection, _not_worth(view, batch, kept)):
        return None
    hidden = others.get("output_hidden_states", view.base_model.config.output_hidden_states)
    try:
        return prompt_states(view, all_logits=True, hidden_states=bool(hidden), wait=wait)
    except BackendUnavailable:  # found out from the base model's answer
        if view.route == SHARED:
            raise
        return None


def _not_worth(view: PromptModel, batch: Batch, kept: bool) -> str | None:
    return cost_rule(view.prompt_rows_count(), *batch.shape, kept, batch.tokens.device.type)


def _text(given: dict[str, Any], rows: int) -> Batch:
    """The text behind a shared prompt, arranged as PEFT arranges it: prompt, padding, text, positions left to the base
    model. Given as an argument of the base model's, the mask moves nothing."""
    mask = given.pop("attention_mask", None)
    tensors: dict[str, Any] = {name: given.pop(name, None) for name in ("input_ids", "inputs_embeds", "labels")}
    if mask is not None:
        given["attention_mask"] = F.pad(mask, (rows, 0), value=1)
    return Batch(**tensors, others=given)


def _context_aware(
    model: Any, view: PromptModel, config: Any, backend: str, given: dict[str, Any], spliced_because: set[str]
) -> Any:
    """CPT. As in PEFT the context's highest code is added to `input_type_mask` in place, and a batch in which nothing
    is left to learn gives NaN."""
    labels, token_types = given.pop("labels", None), given.pop("input_type_mask", None)
    if labels is not None:
        given["return_dict"] = True
    loss_of = None if labels is None else functools.partial(_context_loss, model, config, labels, token_types)
    wait = may_wait(view, labels)
    states = _share(view, given, spliced_because, wait)
    if states is not None:
        batch = _text(given, view.prompt_rows_count())
        return run_text(view, batch, states, labels=None, logits="full", wait=wait, loss_of=loss_of)
    arguments = spliced(view, Task(), backend, given)
    if loss_of is None:
        return model.base_model(**arguments)
    return call_for_loss(view, lambda: model.base_model(**arguments), loss_of, wait)


def _context_loss(
    model: Any, config: Any, labels: Tensor, token_types: Tensor | None, source: Tensor | Withheld
) -> Tensor:
    """CPT's loss of (B, P + T, V) logits, or of the head that would make them."""
    context, codes = context_of(config, labels.device), config.cpt_tokens_type_mask
    layout, offset = Layout.prefix(len(codes)), max(codes)
    if token_types is None:
        given_types = torch.full_like(labels, 4 + offset)
        targets = labels if is_label(4 + offset) else torch.full_like(labels, IGNORE_INDEX)
    else:
        token_types = token_types.to(labels.device)
        token_types += (token_types > 0) * offset
        given_types = token_types.long()
        targets = torch.where((given_types > 0) & (given_types % 4 == 0), labels, IGNORE_INDEX)
    types, targets = layout.fill_rows(given_types, context.types), layout.fill_rows(targets, context.targets)
    settings = model.peft_config["default"]
    decay = settings.opt_loss_decay_factor if settings.opt_weighted_loss_type == "decay" else 1.0
    loss = context_loss(source, targets, types, decay)
    if not any(map(is_label, codes[1:])):  # else every row has a label
        loss = torch.where((targets[:, 1:] != IGNORE_INDEX).any(), loss, torch.nan)
    return loss


def run_fixed(view: PromptModel, task: Task, given: dict[str, Any]) -> Any:
    """This package's own forward (`PromptModel.forward`): with PEFT's defects corrected."""
    given.pop("task_ids", None)
    tensors: dict[str, Any] = {name: given.pop(name, None) for name in TENSORS}
    cache = given.get("past_key_values")
    batch = Batch(**tensors, others=given, route=view.route)
    if cache is not None and not view.facts.encoder_decoder and cache_length(cache) > 0:
        del given["past_key_values"]
        return continue_from_cache(view, batch, cache)
    return FORWARD[TaskType(view.active_config.task_type)](view, batch)


def _is_context(config: Any) -> bool:
    return str(getattr(config.peft_type, "value", config.peft_type)) == "CPT"
