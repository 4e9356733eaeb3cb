"""Splice's mask and labels against the oracle, and the arguments that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oracle
from fusedprompt import Layout, ops
from test_ops_splice import arrange, arrangements, fused, ids_for, make, needs, sources
from tolerance import each_backend, generator, one_thread, poisoned_memory  # noqa: F401


@each_backend("splice")
@pytest.mark.parametrize("arrangement", ["prefix", "insert"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("token", [11, -1, -100, 2**31 - 1])
def test_splice_of_an_id_outside_the_table_raises_index_error_naming_the_range(
    token: int, ids_dtype: torch.dtype, arrangement: str, backend: str
) -> None:
    shape = (3, 7, 5, 9, 11)
    layout, _ = arrange(arrangement, shape)
    inputs, input_ids = make(shape, "table", torch.float32, torch.float32), ids_for(shape).to(ids_dtype)
    needs(backend, inputs, layout, input_ids)
    input_ids[1, 3] = token
    with pytest.raises(IndexError, match=rf"input_ids: expected ids in \[0, 11\), got {token}"):
        fused(layout, input_ids, backend)(inputs)
    with pytest.raises(IndexError, match=rf"input_ids: expected ids in \[0, 11\), got {token}"):
        fused(layout, input_ids, backend)({name: value.requires_grad_() for name, value in inputs.items()})


MASK_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]


@each_backend("splice")
@sources
@arrangements
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_splice_batch_carries_mask_and_labels_as_the_oracle_does_and_keeps_their_dtypes(
    mask_dtype: torch.dtype, ids_dtype: torch.dtype, arrangement: str, source: str, backend: str
) -> None:
    shape = (3, 7, 5, 9, 11)
    layout, slots = arrange(arrangement, shape)
    inputs, input_ids = make(shape, source, torch.float32, torch.float32), ids_for(shape).to(ids_dtype)
    needs(backend, inputs, layout, input_ids)
    attention_mask = torch.randint(0, 2, (3, 5), generator=generator(1), device="cpu").to(mask_dtype)
    labels = torch.randint(-100, 11, (3, 5), generator=generator(2), device="cpu")
    tokens = {"input_ids": input_ids, "table": inputs["table"]} if source == "table" else {source: inputs[source]}
    for mask, label in ((attention_mask, labels), (attention_mask, None), (None, labels), (None, None)):
        with poisoned_memory():
            batch = ops.splice_batch(
                inputs["prompt"], layout, **tokens, attention_mask=mask, labels=label, backend=backend
            )
        assert torch.equal(batch.inputs_embeds, fused(layout, input_ids, backend)(inputs))
        for given_field, filled, value in ((mask, batch.attention_mask, 1), (label, batch.labels, -100)):
            if given_field is None:
                assert filled is None
            else:
                expected = torch.tensor(oracle.carry(given_field, slots, value)).to(given_field.dtype)
                assert filled is not None and filled.dtype == given_field.dtype
                assert torch.equal(filled, expected)


def test_splice_batch_under_inference_mode_does_not_spoil_a_later_training_step() -> None:
    shape = (3, 6, 5, 9, 11)
    inputs = make(shape, "table", torch.float32, torch.float32)
    ids = ids_for(shape)
    fields = {"attention_mask": torch.ones(3, 5, dtype=torch.int64), "labels": ids.clone()}
    with torch.inference_mode():
        ops.splice_batch(inputs["prompt"], Layout.prefix(6), input_ids=ids, table=inputs["table"], **fields)
    prompt = inputs["prompt"].requires_grad_()
    batch = ops.splice_batch(prompt, Layout.prefix(6), input_ids=ids, table=inputs["table"], **fields)
    batch.inputs_embeds.sum().backward()
    assert torch.equal(prompt.grad, torch.full((6, 9), 3.0))
    assert torch.equal(batch.labels[:, 6:], ids) and torch.equal(batch.labels[:, :6], torch.full((3, 6), -100))


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompt": torch.zeros(2, 3),
        "layout": Layout.prefix(2),
        "input_ids": torch.zeros(4, 5, dtype=torch.int64),
        "table": torch.zeros(7, 3),
        "attention_mask": torch.ones(4, 5),
        **changes,
    }
    return ops.splice_batch(arguments.pop("prompt"), arguments.pop("layout"), **arguments)


META = torch.device("meta")
EMBEDS: dict[str, Any] = {"input_ids": None, "table": None, "inputs_embeds": torch.zeros(4, 5, 3)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": [[0.0]]}, TypeError, r"prompt: expected a tensor of shape \(R, D\), got list"),
        ({"prompt": torch.zeros(1, 2, 3)}, ValueError, r"prompt: expected shape \(R, D\), got \(1, 2, 3\)"),
        ({"prompt": torch.zeros(3, 3)}, ValueError, r"prompt: .*\(R, D\) = \(2, 3\), got \(3, 3\)"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"prompt: .*floating.*torch.int64"),
        ({"prompt": torch.zeros(2, 3, device=META)}, ValueError, r"input_ids: .*device of prompt, meta, got cpu"),
        ({"layout": 2}, TypeError, r"layout: "),
        ({"input_ids": None}, ValueError, r"input_ids, inputs_embeds: expected exactly one of the two"),
        ({"inputs_embeds": torch.zeros(4, 5, 3)}, ValueError, r"input_ids, inputs_embeds: expected exactly one"),
        ({"input_ids": [[0] * 5] * 4}, TypeError, r"input_ids: expected a tensor of shape \(B, T\), got list"),
        (
            {"input_ids": torch.zeros(5, dtype=torch.int64), "attention_mask": None},
            ValueError,
            r"input_ids: expected shape \(B, T\), got \(5,\)",
        ),
        ({"input_ids": torch.zeros(4, 5)}, TypeError, r"input_ids: expected int64 or int32 ids, got torch.float32"),
        (
            {"input_ids": torch.zeros(4, 5, dtype=torch.int64, device=META), "attention_mask": None},
            ValueError,
            r"input_ids: .*device of prompt, cpu, got meta",
        ),
        ({"table": None}, TypeError, r"table: expected a tensor of shape \(V, D\), got NoneType"),
        ({"table": torch.zeros(7)}, ValueError, r"table: expected shape \(V, D\), got \(7,\)"),
        ({"table": torch.zeros(7, 4)}, ValueError, r"table: .*\(V, D\) = \(7, 3\), got \(7, 4\)"),
        ({"table": torch.zeros(7, 3, dtype=torch.int8)}, TypeError, r"table: .*floating.*torch.int8"),
        ({"table": torch.zeros(7, 3, device=META)}, ValueError, r"table: .*device of prompt, cpu, got meta"),
        ({**EMBEDS, "inputs_embeds": [[[0.0]]]}, TypeError, r"inputs_embeds: .*\(B, T, D\), got list"),
        ({**EMBEDS, "inputs_embeds": torch.zeros(5, 3)}, ValueError, r"inputs_embeds: .*\(B, T, D\), got \(5, 3\)"),
        (
            {**EMBEDS, "inputs_embeds": torch.zeros(4, 5, 2)},
            ValueError,
            r"inputs_embeds: .*\(4, 5, 3\), got \(4, 5, 2\)",
        ),
        ({**EMBEDS, "inputs_embeds": torch.ones(4, 5, 3).long()}, TypeError, r"inputs_embeds: .*floating.*int64"),
        (
            {**EMBEDS, "inputs_embeds": torch.zeros(4, 5, 3, device=META), "attention_mask": None},
            ValueError,
            r"inputs_embeds: .*device of prompt, cpu, got meta",
        ),
        (
            {"layout": Layout.from_slots(torch.zeros(3, 6, dtype=torch.int64), 2)},
            ValueError,
            r"layout.slots: .*\(B, S\) = \(4, 6\), got \(3, 6\)",
        ),
        (
            {"layout": Layout.from_slots(torch.zeros(4, 6, dtype=torch.int64, device=META), 2), "attention_mask": None},
            ValueError,
            r"layout.slots: .*device of prompt, cpu, got meta",
        ),
        ({"attention_mask": [[1] * 5] * 4}, TypeError, r"attention_mask: .*\(B, T\), got list"),
        ({"attention_mask": torch.ones(5)}, ValueError, r"attention_mask: expected shape \(B, T\), got \(5,\)"),
        ({"attention_mask": torch.ones(4, 6)}, ValueError, r"attention_mask: .*\(4, 5\), got \(4, 6\)"),
        ({"attention_mask": torch.ones(4, 5, device=META)}, ValueError, r"attention_mask: .*device.*cpu, got meta"),
        ({"labels": torch.ones(4, 6).long()}, ValueError, r"labels: expected shape \(B, T\) = \(4, 5\), got \(4, 6\)"),
        ({"backend": "native"}, ValueError, r"backend: expected one of .*'reference'.*for op 'splice', got 'native'"),
    ],
)
def test_splice_refuses_a_wrong_argument_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_splice_accepts_the_arguments_that_the_refusals_start_from() -> None:
    assert call().inputs_embeds.shape == (4, 7, 3)
    assert call(**EMBEDS).inputs_embeds.shape == (4, 7, 3)
