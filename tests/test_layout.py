"""Layouts against the oracle's lists of slots."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from fusedprompt import Layout
from fusedprompt.layouts.padding import count_padding, may_be_padded
from fusedprompt.layouts.picture import join_symbols, row_symbols
from tolerance import examples, generator, one_thread  # noqa: F401

DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, oracle.Slots, int]:
    """A layout, the oracle's slots for it, and the number of tokens; of each kind, with at least one row."""
    batch = draw(st.integers(1, 4))
    num_prompt_rows, length = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    kind = draw(st.sampled_from(("prefix", "prefixes", "insert", "slots")))
    if kind == "prefix":
        return Layout.prefix(num_prompt_rows), oracle.prefix_slots(batch, num_prompt_rows, length), length
    if kind == "prefixes":
        num_prompts = draw(st.integers(1, 3))
        which = draw(st.lists(st.integers(0, num_prompts - 1), min_size=batch, max_size=batch))
        own = [[-one * num_prompt_rows - row - 1 for row in range(num_prompt_rows)] for one in which]
        layout = Layout.prefixes(num_prompt_rows, torch.tensor(which), num_prompts)
        return layout, [[*rows, *range(length)] for rows in own], length
    if kind == "insert":
        starts = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        shifts = draw(st.none() | st.lists(st.integers(-length, length), min_size=batch, max_size=batch))
        layout = Layout.insert(
            num_prompt_rows, length, torch.tensor(starts), None if shifts is None else torch.tensor(shifts)
        )
        return layout, oracle.insert_slots(num_prompt_rows, length, starts, shifts or [0] * batch), length
    places = [*range(-num_prompt_rows, length)]
    width = draw(st.integers(0, 9)) if places else 0
    slots = [[draw(st.sampled_from(places)) for _ in range(width)] for _ in range(batch)]
    tensor = torch.tensor(slots, dtype=torch.int64).view(batch, width)
    return Layout.from_slots(tensor, num_prompt_rows), slots, length


@examples(60)
@given(case=layouts())
def test_slots_and_output_length_are_those_of_the_oracle(case: tuple[Layout, oracle.Slots, int]) -> None:
    layout, slots, length = case
    assert layout.output_length(length) == len(slots[0])
    spelled = layout.spelled(length)
    assert (spelled is layout) == (layout.which is None) and spelled.num_prompt_rows == layout.table_rows
    if spelled.slots is not None:
        assert spelled.slots.dtype == torch.int64
        assert spelled.slots.tolist() == slots


@examples(60)
@given(case=layouts(), dtype=st.sampled_from(DTYPES), fill=st.sampled_from((0, 1)))
def test_fill_carries_values_as_the_oracle_does_and_keeps_their_dtype(
    case: tuple[Layout, oracle.Slots, int], dtype: torch.dtype, fill: int
) -> None:
    layout, slots, length = case
    values = torch.randint(0, 2, (len(slots), length), generator=generator(0), device="cpu").to(dtype)
    filled = layout.fill(values, fill)
    assert filled.dtype == dtype
    assert torch.equal(filled, torch.tensor(oracle.carry(values, slots, fill)).view(filled.shape).to(dtype))


@examples(60)
@given(case=layouts())
def test_fill_rows_puts_one_value_at_each_prompt_row_as_the_oracle_does(
    case: tuple[Layout, oracle.Slots, int],
) -> None:
    layout, slots, length = case
    values = torch.randint(0, 99, (len(slots), length), generator=generator(0), device="cpu")
    rows = torch.arange(100, 100 + layout.table_rows)
    filled = layout.fill_rows(values, rows)
    assert filled.dtype == torch.int64
    assert filled.tolist() == oracle.carry(values, slots, rows.tolist())


@examples(60)
@given(case=layouts(), first=st.sampled_from((0, 2)))
def test_position_ids_count_the_prompt_from_first_and_move_the_tokens_behind_it(
    case: tuple[Layout, oracle.Slots, int], first: int
) -> None:
    layout, slots, length = case
    values = torch.randint(0, 9, (len(slots), length), generator=generator(0), device="cpu")
    rows = layout.num_prompt_rows
    expected = oracle.carry(values + rows, slots, [first + row for row in range(rows)] * layout.num_prompts)
    assert layout.position_ids(values, first).tolist() == expected


@examples(60)
@given(case=layouts())
def test_token_positions_invert_the_slots(case: tuple[Layout, oracle.Slots, int]) -> None:
    layout, slots, length = case
    positions = layout.token_positions(len(slots), length, torch.device("cpu"))
    assert positions.shape == (len(slots), length) and positions.dtype == torch.int64
    for row, found in zip(slots, positions.tolist()):
        for token, position in enumerate(found):
            assert (row[position] == token) if token in row else position == 0


@examples(30)
@given(case=layouts(), data=st.data())
def test_token_positions_prefer_columns_that_are_not_padding(
    case: tuple[Layout, oracle.Slots, int], data: st.DataObject
) -> None:
    layout, slots, length = case
    if layout.slots is None:
        return
    mask = [[data.draw(st.integers(0, 1)) for _ in row] for row in slots]
    positions = layout.token_positions(
        len(slots), length, torch.device("cpu"), torch.tensor(mask).view_as(layout.slots)
    )
    for row, kept, found in zip(slots, mask, positions.tolist()):
        for token, position in enumerate(found):
            if token in row:
                real = any(kept[column] for column, slot in enumerate(row) if slot == token)
                assert row[position] == token and (kept[position] or not real)


@examples(30)
@given(case=layouts(), extra=st.integers(0, 2))
def test_overwrite_rows_puts_values_at_prompt_rows_and_zeros_at_those_behind_them(
    case: tuple[Layout, oracle.Slots, int], extra: int
) -> None:
    layout, slots, _ = case
    if layout.slots is None or layout.num_prompt_rows < extra:
        return
    count = layout.num_prompt_rows - extra
    values = torch.randint(0, 99, layout.slots.shape, generator=generator(0), device="cpu")
    found = layout.overwrite_rows(values, torch.arange(100, 100 + count)).tolist()
    for row, given_values, filled in zip(slots, values.tolist(), found):
        expected = [value if slot >= 0 else 99 - slot if ~slot < count else 0 for slot, value in zip(row, given_values)]
        assert filled == expected


def test_a_layout_shows_its_first_row() -> None:
    slots = torch.tensor([[-1, 0, 1, -2], [0, 0, -1, -2]])
    assert repr(Layout.from_slots(slots, 2)) == "Layout(num_prompt_rows=2, slots=(2, 4)): P t t P"
    assert repr(Layout.prefix(3)) == "Layout.prefix(3): P P P t ..."
    own = Layout.prefixes(3, torch.tensor([1, 0]), 2)
    assert repr(own) == "Layout.prefixes(3, which, 2): P P P t ..."
    assert repr(Layout.prefix(200)) == "Layout.prefix(200): 200P t ..."
    long = torch.tensor([[*range(-1, -21, -1), *range(30), -21, 5]])
    assert repr(Layout.from_slots(long, 21)) == "Layout(num_prompt_rows=21, slots=(1, 52)): 20P 30t 1P 1t"
    meta = Layout.from_slots(slots.to("meta"), 2)  # without values there is no picture
    assert repr(meta) == "Layout(num_prompt_rows=2, slots=(2, 4))"
    assert repr(Layout.from_slots(slots[:0], 2)) == "Layout(num_prompt_rows=2, slots=(0, 4))"


@pytest.mark.parametrize(("width", "expected"), [(4, "· Q A t"), (24, "· Q A t" + " t" * 20), (25, "1· 1Q 1A 22t")])
def test_a_picture_has_letters_for_tables_anchors_and_padding(width: int, expected: str) -> None:
    slots = [-1, -6, 0, *range(1, width - 2)]
    mask = [0] + [1] * (width - 1)
    symbols = row_symbols(slots, mask, anchors=[0], letter=lambda row: "P" if row < 3 else "Q")
    assert join_symbols(symbols) == expected


def test_prefix_of_peft_is_prompt_then_tokens() -> None:
    layout = Layout.prefix(2)
    assert layout.slots is None and layout.num_prompt_rows == 2
    assert layout.fill(torch.tensor([[5, 6, 7]]), -100).tolist() == [[-100, -100, 5, 6, 7]]


def test_insert_behind_left_padding_keeps_prompt_and_text_together() -> None:
    tokens = torch.tensor([[0, 0, 11, 12], [21, 22, 23, 24]])
    layout = Layout.insert(2, 4, torch.tensor([2, 0]))
    assert layout.fill(tokens, -1).tolist() == [[0, 0, -1, -1, 11, 12], [-1, -1, 21, 22, 23, 24]]


def test_insert_with_shift_moves_padding_from_the_right_to_the_left() -> None:
    tokens = torch.tensor([[11, 12, 0, 0], [21, 22, 23, 24]])
    layout = Layout.insert(1, 4, torch.tensor([2, 0]), torch.tensor([-2, 0]))
    assert layout.fill(tokens, -1).tolist() == [[0, 0, -1, 11, 12], [-1, 21, 22, 23, 24]]


def test_a_layout_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout.prefix(2).num_prompt_rows = 3  # type: ignore[misc]


@pytest.mark.parametrize("rows", [-1, True, 2.0, "2", None])
def test_prefix_refuses_anything_but_a_count(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"num_prompt_rows: expected an int >= 0, got "):
        Layout.prefix(rows)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"slots: expected int64 of shape \(B, S\).*\(3,\)"),
        (torch.zeros(1, 3, dtype=torch.int32), ValueError, r"slots: expected int64 .*torch.int32"),
        (torch.zeros(1, 3), ValueError, r"slots: expected int64 .*torch.float32"),
        ([[0, 1]], TypeError, r"slots: "),
    ],
)
def test_from_slots_refuses_a_wrong_tensor(slots: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layout.from_slots(slots, 2)


@pytest.mark.parametrize(
    ("which", "number", "error", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.int64), 2, ValueError, r"which: expected int64 of shape \(B,\).*\(3, 1\)"),
        (torch.zeros(3, dtype=torch.int32), 2, ValueError, r"which: expected int64 .*torch.int32"),
        ([0, 1], 2, TypeError, r"which: expected an int64 tensor of shape \(B,\), got list"),
        (torch.zeros(3, dtype=torch.int64), 0, ValueError, r"num_prompts: expected an int >= 1, got 0"),
        (torch.zeros(3, dtype=torch.int64), True, ValueError, r"num_prompts: expected an int >= 1, got True"),
    ],
)
def test_prefixes_refuse_a_wrong_argument(which: Any, number: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layout.prefixes(2, which, number)


@pytest.mark.parametrize(
    "build",
    [
        lambda rows: Layout.prefixes(rows, torch.zeros(1, dtype=torch.int64), 2),
        lambda rows: Layout.from_slots(torch.zeros(1, 1, dtype=torch.int64), rows),
        lambda rows: Layout.insert(rows, 3, torch.zeros(1, dtype=torch.int64)),
    ],
    ids=["prefixes", "from_slots", "insert"],
)
def test_every_layout_refuses_a_negative_number_of_prompt_rows(build: Any) -> None:
    with pytest.raises(ValueError, match=r"num_prompt_rows: expected an int >= 0, got -2"):
        build(-2)


def padding_of(row: list[int]) -> tuple[int, int]:
    """Zeros before the first and behind the last number that is not 0; none in a row of zeros."""
    real = [index for index, value in enumerate(row) if value]
    return (real[0], len(row) - 1 - real[-1]) if real else (0, 0)


@examples(60)
@given(
    mask=st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1)),
    dtype=st.sampled_from(DTYPES),
)
def test_count_padding_counts_zeros_at_both_ends_of_each_row(mask: list[list[int]], dtype: torch.dtype) -> None:
    left, right = count_padding(torch.tensor(mask).to(dtype))
    assert left.dtype == right.dtype == torch.int64
    assert list(zip(left.tolist(), right.tolist())) == [padding_of(row) for row in mask]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mask", "left", "right"),
    [
        ([[1, 1, 1], [1, 1, 1]], False, False),
        ([[1, 0, 1]], False, False),
        ([[1, 1], [0, 1]], True, False),
        ([[1, 1, 0], [1, 1, 1]], False, True),
        ([[0, 0]], True, True),
        ([[0, 1], [1, 0]], True, True),
    ],
)
def test_may_be_padded_looks_at_the_ends_on_a_cpu(
    mask: list[list[int]], left: bool, right: bool, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(mask).to(dtype)
    assert may_be_padded(tensor, 0) is left
    assert may_be_padded(tensor, -1) is right


def test_may_be_padded_without_a_mask_or_without_values_is_no() -> None:
    assert may_be_padded(None, 0) is False
    assert may_be_padded(torch.zeros(2, 0), 0) is False
    assert may_be_padded(torch.zeros(0, 3), -1) is False


def test_may_be_padded_where_looking_would_wait_for_a_device_is_yes() -> None:
    assert may_be_padded(torch.ones(2, 3, device="meta"), 0) is True


def test_may_be_padded_while_compiling_is_yes_without_a_graph_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda mask: mask + may_be_padded(mask, 0), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2, 3)).tolist() == [[2.0] * 3] * 2
