"""What a model does with a prompt, in words."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

from . import ops
from .causal_loss import why_not_head_loss
from .config import (
    CPTConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    TaskType,
)
from .layout import Layout
from .mixed import Fields, Mixture, lay_out_mixture
from .packing import use_slots
from .picture import PADDING, join_symbols, row_symbols
from .pieces import anchor_slots
from .placing import with_slots
from .prompt_cache import is_kept
from .routes import choose_layout
from .sharing import SHARED, SPLICE, why_not_batch, why_not_model, why_not_worth
from .tasks import TENSORS, Batch

if TYPE_CHECKING:
    from .model import PromptModel

_LETTERS = "PQRSUVWXYZ"  # of prompt rows, adapter by adapter


def explain(model: PromptModel, given: dict[str, Any]) -> str:
    """See `PromptModel.explain`. given: arguments of a forward call, or nothing."""
    if given:
        return _of_batch(model, given)
    lines = []
    for name, config in model.peft_config.items():
        active = ", active" if name == model.active_adapter else ""
        lines.append(
            f"{name}{active}: {config.method and config.method.value}, {config.num_virtual_tokens} virtual tokens, "
            f"{_route_of_model(model, name)}, {_backends(model, name)}"
        )
    return "\n".join(lines)


def _backends(model: PromptModel, name: str) -> str:
    config, encoder = model.peft_config[name], cast(Any, model.prompt_encoder[name])
    used = ["splice"]
    if isinstance(config, CPTConfig) and not config.inference_mode:
        used.insert(0, "cpt")
    elif isinstance(config, PromptEncoderConfig) and not config.inference_mode:
        is_lstm = config.encoder_reparameterization_type is PromptEncoderReparameterizationType.LSTM
        used = ["lstm", "mlp", "splice"] if is_lstm else ["mlp", "splice"]
    makes_loss = config.task_type is TaskType.CAUSAL_LM and model.facts.causal
    if makes_loss and (model.route != SPLICE or isinstance(config, CPTConfig)) and why_not_head_loss(model) is None:
        used.append("head_loss")
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
    names = given.pop("adapter_names", None)
    others = {name: value for name, value in given.items() if name not in (*TENSORS, "logits", "slots", "pool_index")}
    tensors: dict[str, Any] = {name: given.get(name) for name in TENSORS}
    batch = Batch(**tensors, others=others)
    if names is not None and given.get("slots") is None:
        batch.mixture = Mixture.of(model, names, batch.tokens)
        return "\n".join([_route_of_batch(model, batch, route), *_mixture(model, batch, batch.mixture)])
    if names is not None:
        use_slots(model, batch, given["slots"], names)
    elif given.get("slots") is not None:
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
    not_worth = None if route == SHARED else why_not_worth(model, batch, is_kept(model, batch.mixture))
    return "route shared" if not_worth is None else f"route splice: {not_worth}"


def _mixture(model: PromptModel, batch: Batch, mixture: Mixture) -> list[str]:
    """The adapters of a mixed batch, and the first row of each, with a letter of its own."""
    letters = dict(zip(mixture.adapters, itertools.cycle(_LETTERS)))
    fields = Fields(batch.tokens, batch.attention_mask, None, None)
    pool_last = mixture.task is TaskType.SEQ_CLS
    layout, mask = lay_out_mixture(model, mixture, fields, False, pool_last)[:2]
    assert layout.slots is not None
    # Where each adapter's rows of the table end; a template's constant tokens stand behind its prompt.
    owners = [
        (name, row < count)
        for name, count, size in zip(mixture.adapters, mixture.counts, mixture.sizes)
        for row in range(size)
    ]
    lines = []
    for name in dict.fromkeys(mixture.names):
        row, number = mixture.names.index(name), mixture.names.count(name)

        def letter(index: int) -> str:
            owner, is_prompt = owners[index] if index < len(owners) else ("", False)
            return letters[owner] if is_prompt else "A" if owner else PADDING

        real = None if mask is None else mask[row].tolist()
        picture = join_symbols(row_symbols(layout.slots[row].tolist(), real, letter=letter))
        lines.append(f"{name}, {number} row{'s' * (number > 1)}, row {row}: {picture}")
    return lines


def _picture(model: PromptModel, batch: Batch) -> str:
    layout, mask = batch.layout, batch.attention_mask
    if layout is None:
        rows, pool_last = model.prompt_rows_count(), model.active_config.task_type is TaskType.SEQ_CLS
        layout, _ = choose_layout(model.facts, rows, batch.tokens, mask, pool_last, model.active_start)
        mask = None if mask is None else layout.fill(mask, 1)
    rows, length = layout.num_prompt_rows, batch.shape[1]
    slots = [*range(-1, -rows - 1, -1), *range(length)] if layout.slots is None else layout.slots[0].tolist()
    real = None if mask is None else mask[0].tolist()
    if batch.table is not None:
        return join_symbols(_of_table(model, batch.table, slots))
    anchors = () if model.active_template is None else anchor_slots(model.active_template, slots, real)
    count = model.prompt_rows_count()  # a table's further rows are a template's constant tokens
    return join_symbols(row_symbols(slots, real, anchors, lambda row: "P" if row < count else "t"))


def _of_table(model: PromptModel, names: tuple[str, ...], slots: list[int]) -> list[str]:
    """Symbols of a row whose slots refer to several prompts, a letter for each."""
    owners = [
        letter for name, letter in zip(names, itertools.cycle(_LETTERS)) for _ in range(model.table_rows_count(name))
    ]
    return row_symbols(slots, letter=lambda row: owners[row])
