"""Slots, mask and labels of a padded batch in a template, against rows that are put together one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedprompt import Template
from fusedprompt.base.facts import BaseFacts
from fusedprompt.base.tasks import task_of
from fusedprompt.layouts.batch import Batch
from fusedprompt.layouts.from_template import put_into_template
from fusedprompt.layouts.prompt import Prompt

from ._interleave import FORWARD, OURS, Case, Contender, check, measure

TEMPLATE = Template.parse("[prompt 8] [text] [prompt 8] [anchor 17 18] [prompt 4]")
PROMPT = Prompt("default", "P_TUNING", task_of("CAUSAL_LM"), 20, template=TEMPLATE)
FACTS = BaseFacts(False, True, True, False, 0, None)
Laid = tuple[Tensor, Tensor, Tensor]


def ours(ids: Tensor, mask: Tensor) -> Laid:
    placed = put_into_template(PROMPT, FACTS, Batch(input_ids=ids, attention_mask=mask, labels=ids), None)
    mask, slots = placed.batch.attention_mask, placed.layout.slots
    assert slots is not None and mask is not None
    return slots * mask, mask, placed.batch.labels


def row_by_row(ids: Tensor, mask: Tensor) -> Laid:
    rows = []
    for row, real in zip(ids, mask):
        length = int(real.sum())
        constants = [torch.arange(-1, -9, -1), torch.arange(-9, -17, -1), torch.arange(-21, -23, -1)]
        slots = torch.cat((constants[0], torch.arange(length), *constants[1:], torch.arange(-17, -21, -1)))
        labels = torch.full_like(slots, -100)
        labels[8 : 8 + length] = row[:length]
        padding = (0, ids.shape[1] - length)
        rows.append(
            (
                torch.nn.functional.pad(slots, padding),
                torch.nn.functional.pad(torch.ones_like(slots), padding),
                torch.nn.functional.pad(labels, padding, value=-100),
            )
        )
    slots, masks, targets = (torch.stack(parts) for parts in zip(*rows))
    return slots, masks, targets


def contender(name: str, run: Any, *given: Tensor) -> Contender:
    return Contender(
        name,
        forward=lambda: run(*given),
        backward=lambda _: None,
        outputs=lambda laid: dict(zip(("slots", "mask", "labels"), laid)),
        parameters={},
    )


@pytest.mark.parametrize(("batch", "length"), [(8, 64), (64, 512)])
def test_layout(benchmark: Any, batch: int, length: int) -> None:
    # As in a process that has run a model: until something larger has been freed, glibc gives memory back to the system
    # after each call and asks for it again, which took twice as long as all the rest in a sandboxed container.
    torch.ones(1 << 22)
    ids = torch.randint(0, 32000, (batch, length), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    mask = (torch.arange(length) < torch.linspace(length // 2, length, batch).long().unsqueeze(1)).long()
    peer = contender("row by row", row_by_row, ids, mask)
    case = Case(
        group="layout",
        name=f"B={batch} T={length}",
        dtype="int64",
        contenders=[contender(OURS, ours, ids, mask), peer],
        truth=peer,
        tolerance=(0.0, 0.0),
        rounds=(8, 240),
    )
    measure(benchmark, check(case), FORWARD)
