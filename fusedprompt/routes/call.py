"""What is asked of a model with prompts, and what is decided about it: two values that nobody changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..base.tasks import Task
from ..layouts.batch import FIELDS, Batch
from ..layouts.layout import Layout
from ..layouts.mixture import Mixture
from ..layouts.prompt import Prompt
from ..layouts.shared_text import BEHIND
from ..ops._backend import AUTO
from .loss import Loss

# Routes. The first two put no prompt in: for a base model alone, and for one whose cache holds the prompt. The last is
# of prompts that are keys and values themselves.
BASE, CONTINUE, SPLICE, SHARED, PREFIX = "base", "continue", "splice", "shared", "prefix"
FULL, TEXT = "full", "text"  # logits of prompt and text, or of text alone
# Placements of a prompt in front of a text: ours moves padding out of the way, PEFT's leaves it where it is.
OURS, PEFT = "ours", "peft"


@dataclass(frozen=True)
class Call:
    """The arguments of a call of `forward` or `generate`.

    batch: those that have a value for each token.
    others: those that the base model gets as they are.
    route, logits, slots, pool_index, fields, adapter_names, task_ids, shared_prefix, shared_prefix_place: see
        `PromptModel`.
    generates: whether it is one of `generate`.
    """

    batch: Batch
    others: Mapping[str, Any] = field(default_factory=dict)
    past_key_values: Any = None
    route: str = AUTO
    logits: str = FULL
    slots: Tensor | None = None
    pool_index: Tensor | None = None
    fields: Mapping[str, Any] | None = None
    adapter_names: Sequence[str] | None = None
    task_ids: Any = None
    shared_prefix: Any = None
    shared_prefix_place: str = BEHIND
    generates: bool = False

    @property
    def rows(self) -> Tensor:
        """Of what the batch has a row each; without any tokens, as `generate` may begin, it is one row."""
        if self.batch.input_ids is not None or self.batch.inputs_embeds is not None:
            return self.batch.tokens
        given: Any = next(iter((self.fields or {}).values()), torch.empty(1, device="cpu"))
        ids = given[0] if isinstance(given, tuple) else given
        return ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")

    @classmethod
    def of(cls, given: Mapping[str, Any], route: str, generates: bool = False) -> Call:
        """From keyword arguments; those that are None are none. route: where the call does not name one."""
        named = {name: value for name, value in given.items() if name in _OWN and value is not None}
        batch = Batch(**{name: value for name, value in given.items() if name in FIELDS})
        others = {name: value for name, value in given.items() if name not in _OWN and name not in FIELDS}
        return cls(batch, others, generates=generates, **{"route": route, **named})

    @classmethod
    def to_generate(cls, inputs: Tensor | None, given: Mapping[str, Any], route: str) -> Call:
        """From the arguments of `generate`, of which the first is `inputs`, that is `input_ids`."""
        if inputs is not None:
            if given.get("input_ids") is not None:
                raise ValueError("inputs, input_ids: expected one of the two, got both")
            given = {**given, "input_ids": inputs}
        return cls.of(given, route, generates=True)


_OWN = tuple(one.name for one in fields(Call) if one.name not in ("batch", "others", "generates"))


@dataclass(frozen=True)
class Plan:
    """What will be done with a call, and why.

    route: "base", "continue", "splice", "shared" or "prefix".
    call: what was asked.
    why: why the prompt is not shared; None where it is, or could not be meant to.
    pays: whether sharing would pay, if it could.
    task: of the adapters.
    table: the prompts to whose tables the layout's slots refer, one after another.
    mixture: the prompt of each row, where they differ.
    layout: where each column of the output comes from. None where there is no prompt to put in.
    fields: what the base model gets with the tokens: of the output or, shared, of the text behind the prompt.
    carries: mask and labels are yet to be carried from the tokens to the output, by `ops.splice_batch`.
    looks_up: ids become embeddings before the base model sees them.
    others: what else it gets.
    loss: what is made here of its logits; None where it makes the loss.
    waits: whether logits are left until they are read.
    reads: whether it is of interest if somebody reads them.
    logits: "full" or "text". cuts: fields of its output that are cut down to the tokens.
    joined: why each row's attention gets a copy of the prefix that is in the cache, joined with its own keys; None
        where it reads the one that all rows share.
    turned: its rows' padding was moved to their end, and full logits are put back: prompt first, then tokens.
    placement: as it was planned with.
    """

    route: str
    call: Call
    fields: Batch  # without a default: torch.compile cannot trace one
    why: str | None = None
    pays: bool = True
    placement: str = OURS
    task: Task | None = None
    table: tuple[Prompt, ...] = ()
    mixture: Mixture | None = None
    layout: Layout | None = None
    carries: bool = False
    looks_up: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss | None = None
    waits: bool = False
    reads: bool = False
    logits: str = FULL
    cuts: tuple[str, ...] = ()
    turned: bool = False
    joined: str | None = "no prefix is in the cache"

    @property
    def is_padded(self) -> bool:
        """Whether the layout refers to a row of zeros behind the prompts' tables."""
        assert self.layout is not None
        return self.layout.num_prompt_rows > sum(prompt.table_rows for prompt in self.table)


def refuse(name: str, value: Any, case: str) -> None:
    """For a call that has no use for an argument."""
    if value is not None:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name}: expected None {case}, got {got}")


def refuse_fields(call: Call, case: str) -> None:
    """For a call that has no use for a template's fields."""
    refuse("fields", None if call.fields is None else sorted(call.fields), case)


def check_logits(logits: str, task: Task | None) -> None:
    """Refuse what is none of the two, or not of a task."""
    if logits not in (FULL, TEXT):
        raise ValueError(f"logits: expected 'full' or 'text', got {logits!r}")
    if logits == TEXT and task is not None and not task.predicts_next:
        raise ValueError(f"logits: expected 'full' for task {task.name}, got {logits!r}")


def without_prompt(call: Call) -> Plan:
    """For the base model alone."""
    refuse("slots", call.slots, "for a model without a prompt")
    for name in ("adapter_names", "task_ids"):
        refuse(name, getattr(call, name), "where adapters are disabled or there is none")
    refuse_fields(call, "for a model without a prompt")
    others = with_cache(call.others, call.past_key_values)
    return Plan(BASE, call, call.batch, "the model has no prompt, or it is disabled", others=others)


def with_cache(others: Mapping[str, Any], past_key_values: Any) -> Mapping[str, Any]:
    """A base model's arguments, and a cache if there is one."""
    return others if past_key_values is None else {**others, "past_key_values": past_key_values}
