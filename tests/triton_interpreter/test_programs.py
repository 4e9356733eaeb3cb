"""What watches the kernels in Triton's interpreter (tests/triton_programs.py), tried on kernels that are wrong."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fusedprompt.ops import _triton
from triton_programs import StoresWrong

if not _triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)


@triton.jit
def fill(out_ptr, N, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, at.to(tl.float32), mask=at < N)


@triton.jit
def take_turns(turns_ptr, out_ptr):
    turn = tl.atomic_add(turns_ptr, 1)
    tl.store(out_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), turn)


def test_programs_run_in_shuffled_orders_and_each_runs_once() -> None:
    orders = []
    for _ in range(2):
        turns, out = torch.zeros(1, dtype=torch.int32), torch.full((8, 3), -1, dtype=torch.int32)
        take_turns[(8, 3)](turns, out)
        orders.append(out.flatten().tolist())
    in_order = list(range(24))
    assert [sorted(order) for order in orders] == [in_order, in_order]
    assert orders[0] != orders[1] != in_order != orders[0]


def test_a_kernel_that_stores_each_element_once_passes() -> None:
    out = torch.empty(33)
    fill[(3,)](out, 33, STEP=16, BLOCK=16)
    assert torch.equal(out, torch.arange(33.0))


@pytest.mark.parametrize(
    ("programs", "step", "limit", "columns", "message"),
    [
        (4, 10, 33, 33, "fill stored element 10 2 times in out_ptr, 15 of 33 not once"),
        (2, 16, 33, 33, "fill stored element 32 0 times in out_ptr, 1 of 33 not once"),
        (3, 16, 34, 33, "fill stored 1 elements outside its arguments"),
    ],
    ids=["overlap", "gap", "outside"],
)
def test_elements_that_are_not_stored_once_are_found(
    programs: int, step: int, limit: int, columns: int, message: str
) -> None:
    """The values are right all the same."""
    memory = torch.arange(64.0)
    with pytest.raises(StoresWrong, match=message):
        fill[(programs,)](memory[:columns], limit, STEP=step, BLOCK=16)
    assert torch.equal(memory, torch.arange(64.0))


def test_elements_between_the_rows_of_an_output_are_found() -> None:
    with pytest.raises(StoresWrong, match="fill stored what lies between its rows in out_ptr"):
        fill[(2,)](torch.empty(4, 8)[:, :7], 31, STEP=16, BLOCK=16)
