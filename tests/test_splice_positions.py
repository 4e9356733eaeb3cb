"""Position ids carried by a splice, against the oracle's loop: the prompt counts, the tokens move behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from fusedprompt import Layout, ops

STARTS, SHIFTS = [0, 4, 2], [1, 0, -2]


def layout_of(kind: str) -> tuple[Layout, oracle.Slots]:
    if kind == "prefix":
        return Layout.prefix(7), oracle.prefix_slots(3, 7, 5)
    if kind == "own":  # positions are the same whichever prompt a row has
        return Layout.prefixes(7, torch.tensor([1, 0, 1]), 2), oracle.prefix_slots(3, 7, 5)
    if kind == "empty":
        return Layout.prefix(0), oracle.prefix_slots(3, 0, 5)
    return Layout.insert(7, 5, torch.tensor(STARTS), torch.tensor(SHIFTS)), oracle.insert_slots(7, 5, STARTS, SHIFTS)


def positions_of(positions: Tensor, slots: oracle.Slots, num_prompt_rows: int, first: int) -> list[list[int]]:
    given = positions.tolist()
    return [
        [first - slot - 1 if slot < 0 else given[b][slot] + num_prompt_rows for slot in row]
        for b, row in enumerate(slots)
    ]


@pytest.mark.parametrize("kind", ["prefix", "own", "insert", "empty"])
@pytest.mark.parametrize("source", ["table", "inputs_embeds"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("first", [0, 3])
def test_splice_batch_counts_the_prompt_and_moves_the_tokens_positions_behind_it(
    first: int, dtype: torch.dtype, ids_dtype: torch.dtype, source: str, kind: str
) -> None:
    layout, slots = layout_of(kind)
    rows, ids = layout.num_prompt_rows, torch.tensor([[0, 1, 2, 3, 0]] * 3, dtype=ids_dtype)
    tokens = {"input_ids": ids, "table": torch.randn(4, 9)} if source == "table" else {source: torch.randn(3, 5, 9)}
    positions = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 0, 1, 2], [5, 6, 7, 8, 9]], dtype=dtype)
    labels = torch.ones(3, 5, dtype=torch.int64)
    prompt = torch.randn(layout.table_rows, 9)
    batch = ops.splice_batch(
        prompt, layout, **tokens, labels=labels, position_ids=positions, first_position=first, backend="reference"
    )
    assert batch.position_ids is not None and batch.position_ids.dtype == dtype
    assert batch.position_ids.tolist() == positions_of(positions, slots, rows, first)
    assert batch.labels is not None and batch.labels.tolist() == oracle.carry(labels, slots, -100)
    assert torch.equal(batch.inputs_embeds, ops.splice(prompt, layout, **tokens, backend="reference"))
    assert batch.position_ids.tolist() == layout.position_ids(positions, first).tolist()


def test_splice_batch_refuses_wrong_positions_by_name() -> None:
    prompt, table, ids = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(1, 5, dtype=torch.int64)
    for changes, error, message in (
        ({"position_ids": ids, "first_position": -1}, ValueError, r"first_position: expected an int >= 0, got -1"),
        ({"position_ids": torch.zeros(1, 5)}, TypeError, r"position_ids: expected int64 or int32 ids, got torch.float"),
        ({"position_ids": ids[:, 1:]}, ValueError, r"position_ids: expected shape \(B, T\) = \(1, 5\), got \(1, 4\)"),
    ):
        with pytest.raises(error, match=message):
            ops.splice_batch(prompt, Layout.prefix(2), input_ids=ids, table=table, **changes)
