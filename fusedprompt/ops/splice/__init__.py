"""Splice: fill a batch of input embeddings row by row from prompt rows and token rows."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

from ...base import check
from ...layouts.layout import IGNORE_INDEX, Layout
from .._backend import Op, never_objects
from .._requirements import why_not_triton
from . import reference
from ._op import POSITIONS, Arguments, filled_dtype


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from . import triton

    given = Arguments(*arguments)
    if given.which is not None:  # the kernel reads slots
        length = given.sources()[0].shape[1]
        given = given._replace(slots=given.layout.spelled(length).slots, which=None, num_prompts=1)
    return triton.splice(*given)


def _why_not_triton(prompt: Tensor, *others: Any) -> str | None:
    """Also of the prompt alone, for `explain`."""
    table, inputs_embeds, fields = others[2:5] or (None, None, ())
    rows = table if inputs_embeds is None else inputs_embeds
    reason = why_not_triton(prompt) if rows is None else why_not_triton(prompt, rows)
    if reason is None and len(fields) > 3:
        return f"carries at most 3 fields, got {len(fields)}"
    return reason


OP = Op("splice")
OP.add("reference", reference.splice, never_objects)
OP.add("triton", _triton, _why_not_triton)


class SplicedBatch(NamedTuple):
    """What a base model is called with: (B, S, D) embeddings, and (B, S) fields as far as they were given."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None = None


def splice(
    prompt: Tensor,
    layout: Layout,
    *,
    input_ids: Tensor | None = None,
    table: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Fill a batch of input embeddings from prompt rows and token rows.

    out[b, s] = prompt[~slot] if slot < 0 else token row `slot`, with slot = slots[b, s] of the layout. It takes the
    place of PEFT's repeat, cast, embedding and cat; the output is written once.

    Args:
        prompt: (R, D) prompt rows.
        layout: where each output row comes from.
        input_ids: (B, T) int64 or int32, with `table`: (V, D) word embeddings.
        inputs_embeds: (B, T, D) token rows, instead of ids and table.
        backend: "auto", "reference" or "triton".

    Returns:
        (B, S, D) in the dtype of the token rows.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, or arguments that do not fit the layout.
        IndexError: an id outside the table, on CPU. On CUDA its row becomes NaN; FUSEDPROMPT_CHECK=1 raises there too.
        BackendUnavailable: the requested backend cannot run on these arguments.
    """
    _check_arguments(prompt, layout, input_ids, table, inputs_embeds)
    given = (prompt, layout.slots, input_ids, table, inputs_embeds)
    return cast(Tensor, OP.run(backend, *given, [], [], layout.which, layout.num_prompts)[0])


def splice_batch(
    prompt: Tensor,
    layout: Layout,
    *,
    input_ids: Tensor | None = None,
    table: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    first_position: int = 0,
    backend: str | None = None,
) -> SplicedBatch:
    """`splice`, with the attention mask, the labels and the position ids carried along in the same call.

    Args:
        attention_mask: (B, T); prompt rows get 1. The dtype stays what it was.
        labels: (B, T); prompt rows get -100.
        position_ids: (B, T) integers; prompt row r gets first_position + r, and a token its own position + R.
        first_position: the position of prompt row 0.

    The rest is as in `splice`.
    """
    if first_position < 0:
        raise ValueError(f"first_position: expected an int >= 0, got {first_position}")
    tokens = _check_arguments(prompt, layout, input_ids, table, inputs_embeds)
    fills = {"attention_mask": 1, "labels": IGNORE_INDEX, "position_ids": POSITIONS + first_position}
    carried: dict[str, Tensor] = {}
    together: dict[str, Tensor] = {}
    for name, field in (("attention_mask", attention_mask), ("labels", labels), ("position_ids", position_ids)):
        if field is None:
            continue
        check.tensor(name, field, "(B, T)", 2)
        check.shape(name, field, "(B, T)", tokens.shape[:2])
        check.same_device(name, field, "the tokens", tokens)
        # Fields of the ids' dtype travel with them, as one tensor; any other is carried by itself. So are positions
        # where each row has its own prefix: slots, which a backend may make of it, would count rows of the whole table.
        if field.dtype == filled_dtype(input_ids) and not (name == "position_ids" and layout.which is not None):
            together[name] = field
        elif name == "position_ids":
            check.token_ids(name, field)
            carried[name] = layout.position_ids(field, first_position).to(field.dtype)
        else:
            carried[name] = layout.fill(field, fills[name])
    fields, values = list(together.values()), [fills[name] for name in together]
    given = (prompt, layout.slots, input_ids, table, inputs_embeds)
    embeds, filled = OP.run(backend, *given, fields, values, layout.which, layout.num_prompts)
    carried.update(zip(together, filled.unbind(0)))
    return SplicedBatch(embeds, carried.get("attention_mask"), carried.get("labels"), carried.get("position_ids"))


def _check_arguments(
    prompt: Tensor, layout: Layout, input_ids: Tensor | None, table: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Returns the tokens: ids or embeddings."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: expected a fusedprompt.Layout, got {type(layout).__name__}")
    check.tensor("prompt", prompt, "(R, D)", 2)
    check.floating("prompt", prompt)
    check.shape("prompt", prompt, "(R, D)", (layout.table_rows, prompt.shape[1]))
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
    if inputs_embeds is not None:
        tokens = check.tensor("inputs_embeds", inputs_embeds, "(B, T, D)", 3)
        check.floating("inputs_embeds", inputs_embeds)
        check.shape("inputs_embeds", inputs_embeds, "(B, T, D)", (*tokens.shape[:2], prompt.shape[1]))
        check.same_device("inputs_embeds", tokens, "prompt", prompt)
    else:
        tokens = check.tensor("input_ids", input_ids, "(B, T)", 2)
        check.token_ids("input_ids", tokens)
        check.same_device("input_ids", tokens, "prompt", prompt)
        table = check.tensor("table", table, "(V, D)", 2)
        check.floating("table", table)
        check.shape("table", table, "(V, D)", (table.shape[0], prompt.shape[1]))
        check.same_device("table", table, "prompt", prompt)
    if layout.slots is not None:
        check.shape("layout.slots", layout.slots, "(B, S)", (tokens.shape[0], layout.slots.shape[1]))
        check.same_device("layout.slots", layout.slots, "prompt", prompt)
    if layout.which is not None:
        check.shape("layout.which", layout.which, "(B,)", tokens.shape[:1])
        check.same_device("layout.which", layout.which, "prompt", prompt)
    return tokens
