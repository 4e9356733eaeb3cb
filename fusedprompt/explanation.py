"""What a model does with a prompt, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .config import (
    CPTConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    TaskType,
)
from .layout import Layout
from .picture import join_symbols, row_symbols
from .pieces import anchor_slots
from .placing import with_slots
from .prompt_cache import is_kept
from .routes import choose_layout
from .sharing import SHARED, SPLICE, why_not_batch, why_not_model, why_not_worth
from .tasks import TENSORS, Batch

if TYPE_CHECKING:
    from .model import PromptModel


def explain(model: PromptModel, given: dict[str, Any]) -> str:
    """See `PromptModel.explain`. given: arguments of a forward call, or nothing."""
    if given:
        return _of_batch(model, given)
    lines = []
    for name, config in model.peft_config.items():
        active = ", active" if name == model.active_adapter else ""
        lines.append(
            f"{name}{active}: {config.method and config.method.value}, {config.num_virtual_tokens} virtual tokens, "
            f"{_route_of_model(model, name)}, {_backends(config, model.prompt_encoder[name])}"
        )
    return "\n".join(lines)


def _backends(config: PromptLearningConfig, encoder: Any) -> str:
    used = ["splice"]
    if isinstance(config, CPTConfig) and not config.inference_mode:
        used.insert(0, "cpt")
    elif isinstance(config, PromptEncoderConfig) and not config.inference_mode:
        is_lstm = config.encoder_reparameterization_type is PromptEncoderReparameterizationType.LSTM
        used = ["lstm", "mlp", "splice"] if is_lstm else ["mlp", "splice"]
    found = (ops.explain(op, encoder.embedding.weight) for op in used)
    runs = (next(name for name, why in reasons.items() if why == "runs") for reasons in found)
    return ", ".join(f"{op}: {backend}" for op, backend in zip(used, runs))


def _route_of_model(model: PromptModel, adapter_name: str) -> str:
    if model.route == SPLICE:
        return "route splice (asked for)"
    template = model.templates.get(adapter_name)
    objection = why_not_model(model, adapter_name)
    if template is not None and not template.is_plain_prefix:
        objection = f"its template is {template}, and not a prompt in front of all text"
    if objection is None:
        return "route shared" if model.route == SHARED else "route shared where it pays"
    return f"route {'shared, which cannot run' if model.route == SHARED else 'splice'} ({objection})"


def _of_batch(model: PromptModel, given: dict[str, Any]) -> str:
    """The route, and the first row's layout as a picture."""
    if model.active_adapter is None:
        return "no prompt: the model has no adapter"
    route, fields = given.pop("route", None) or model.route, given.pop("fields", None)
    others = {name: value for name, value in given.items() if name not in (*TENSORS, "logits", "slots", "pool_index")}
    tensors: dict[str, Any] = {name: given.get(name) for name in TENSORS}
    batch = Batch(**tensors, others=others)
    if given.get("slots") is not None:
        batch.layout = Layout.from_slots(given["slots"], model.table_rows_count())
    elif model.active_template is not None:
        with_slots(model, model.active_template, batch, fields)
    lines = [_route_of_batch(model, batch, route)]
    if batch.shape[0]:
        lines.append(f"row 0: {_picture(model, batch)}")
    return "\n".join(lines)


def _route_of_batch(model: PromptModel, batch: Batch, route: str) -> str:
    if route == SPLICE:
        return "route splice: it was asked for"
    objection = why_not_batch(model, batch)
    if objection is not None:
        return f"route {'shared, which cannot run' if route == SHARED else 'splice'}: {objection}"
    not_worth = None if route == SHARED else why_not_worth(model, batch, is_kept(model))
    return "route shared" if not_worth is None else f"route splice: {not_worth}"


def _picture(model: PromptModel, batch: Batch) -> str:
    layout, mask = batch.layout, batch.attention_mask
    if layout is None:
        rows, pool_last = model.prompt_rows_count(), model.active_config.task_type is TaskType.SEQ_CLS
        layout, _ = choose_layout(model.facts, rows, batch.tokens, mask, pool_last, model.active_start)
        mask = None if mask is None else layout.fill(mask, 1)
    rows, length = layout.num_prompt_rows, batch.shape[1]
    slots = [*range(-1, -rows - 1, -1), *range(length)] if layout.slots is None else layout.slots[0].tolist()
    real = None if mask is None else mask[0].tolist()
    anchors = () if model.active_template is None else anchor_slots(model.active_template, slots, real)
    count = model.prompt_rows_count()  # a table's further rows are a template's constant tokens
    return join_symbols(row_symbols(slots, real, anchors, lambda row: "P" if row < count else "t"))
