"""The splice on Triton against the oracle's loops, kernels executed by Triton's interpreter.

A splice copies, so its output must have the bits of the oracle's, rounded once to the token rows' dtype; only where the
interpreter truncates fp32 to bf16 may it be one unit in the last place away. Gradients are sums: of small integers they
must be exact in every dtype.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from fusedprompt import Layout, ops
from fusedprompt.ops import _triton
from fusedprompt.ops.splice import triton as kernels
from tolerance import examples, generator, normal, poisoned_memory

# (B, R, T, D, V)
Shape = tuple[int, int, int, int, int]
SMALL: Shape = (3, 7, 5, 33, 11)
LOW = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(LOW, LOW))
sources = pytest.mark.parametrize("source", ["table", "inputs_embeds"])
arrangements = pytest.mark.parametrize("arrangement", ["prefix", "insert", "any"])


def arrange(arrangement: str, shape: Shape) -> tuple[Layout, oracle.Slots]:
    """A layout of the package, and the oracle's account of it."""
    batch, num_prompt_rows, length, *_ = shape
    if arrangement == "prefix":
        return Layout.prefix(num_prompt_rows), oracle.prefix_slots(batch, num_prompt_rows, length)
    if arrangement == "any":
        size = (batch, num_prompt_rows + length + 3)
        slots = torch.randint(-num_prompt_rows, length, size, generator=generator(5), device="cpu")
        return Layout.from_slots(slots, num_prompt_rows), slots.tolist()
    starts = torch.randint(0, length + 1, (batch,), generator=generator(6), device="cpu")
    shifts = torch.randint(-length, length + 1, (batch,), generator=generator(7), device="cpu")
    slots = oracle.insert_slots(num_prompt_rows, length, starts.tolist(), shifts.tolist())
    return Layout.insert(num_prompt_rows, length, starts, shifts), slots


def draw_ids(shape: Shape, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, shape[4], (shape[0], shape[2]), generator=generator(8), device="cpu").to(dtype)


def draw(
    shape: Shape, source: str, dtype: torch.dtype, prompt_dtype: torch.dtype, memory: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """Prompt rows, and token rows as a table or ready-made."""
    batch, num_prompt_rows, length, width, vocabulary = shape
    numbers = generator(0)
    prompt = normal((num_prompt_rows, width), prompt_dtype, numbers, memory).requires_grad_()
    size = (vocabulary, width) if source == "table" else (batch, length, width)
    return prompt, normal(size, dtype, numbers, memory).requires_grad_()


def integers(*shape: int) -> Tensor:
    """Small enough that their sums here are exact in every dtype."""
    return torch.randint(-2, 3, shape, generator=generator(9), device="cpu").double()


def tokens_of(source: str, rows: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": input_ids, "table": rows} if source == "table" else {"inputs_embeds": rows}


def splice(prompt: Tensor, layout: Layout, source: str, rows: Tensor, input_ids: Tensor) -> Tensor:
    with poisoned_memory():
        return ops.splice(prompt, layout, **tokens_of(source, rows, input_ids), backend="triton")


def assert_bits(actual: Tensor, expected: Tensor, truncates: bool = False) -> None:
    """Equal; or, where the interpreter truncates, at most the next bf16."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if truncates:
        apart = actual.view(torch.int16).int() - expected.view(torch.int16).int()
        assert not actual.isnan().any() and not (apart.abs() > 1).any()
    else:
        assert torch.equal(actual, expected)


def check(
    shape: Shape,
    layout: Layout,
    slots: oracle.Slots,
    source: str,
    dtype: torch.dtype = torch.float32,
    prompt_dtype: torch.dtype = torch.float32,
    memory: str = "contiguous",
    input_ids: Tensor | None = None,
) -> None:
    """Output and gradients have the bits of the oracle's."""
    ids = draw_ids(shape) if input_ids is None else input_ids
    prompt, rows = draw(shape, source, dtype, prompt_dtype, memory)
    out = splice(prompt, layout, source, rows, ids)
    tokens = oracle.table_rows(rows.detach(), ids) if source == "table" else rows.detach()
    truncates = dtype == torch.bfloat16 and prompt_dtype != torch.bfloat16
    assert_bits(out.detach(), oracle.splice(prompt.detach(), slots, tokens).to(dtype), truncates)
    d_out = integers(*out.shape)
    with poisoned_memory():
        d_prompt, d_rows = torch.autograd.grad(out, (prompt, rows), d_out.to(dtype))
    true_prompt, true_rows = oracle.splice_gradients(d_out, slots, shape[1], shape[2])
    if source == "table":
        true_rows = oracle.table_gradient(true_rows, ids, shape[4])
    assert_bits(d_prompt, true_prompt.to(prompt_dtype))
    assert_bits(d_rows, true_rows.to(dtype))


@arrangements
@sources
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (3, 7, 33, 97, 50), (7, 33, 1, 33, 7), (2, 3, 7, 1030, 5), (33, 1, 2, 16, 7)],
    ids=lambda s: "B{}-R{}-T{}-D{}-V{}".format(*s),
)
def test_splice_and_its_gradients_have_the_bits_of_the_oracle(shape: Shape, source: str, arrangement: str) -> None:
    check(shape, *arrange(arrangement, shape), source)


@pytest.mark.parametrize(("arrangement", "source"), [("prefix", "table"), ("any", "inputs_embeds")])
@pytest.mark.parametrize(("dtype", "prompt_dtype"), PAIRS, ids=str)
def test_splice_of_any_two_dtypes_has_the_bits_of_the_oracle(
    dtype: torch.dtype, prompt_dtype: torch.dtype, source: str, arrangement: str
) -> None:
    check(SMALL, *arrange(arrangement, SMALL), source, dtype, prompt_dtype)


@examples(20)
@given(data=st.data())
def test_splice_by_any_slots_has_the_bits_of_the_oracle(data: st.DataObject) -> None:
    batch, num_prompt_rows, length = (data.draw(st.integers(low, 4)) for low in (1, 0, 0))
    places = [*range(-num_prompt_rows, length)]
    out_length = data.draw(st.integers(0, 9)) if places else 0
    slots = [[data.draw(st.sampled_from(places)) for _ in range(out_length)] for _ in range(batch)]
    shape = (batch, num_prompt_rows, length, data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5)))
    layout = Layout.from_slots(torch.tensor(slots, dtype=torch.int64).view(batch, out_length), num_prompt_rows)
    dtype, prompt_dtype = data.draw(st.sampled_from(PAIRS))
    check(shape, layout, slots, data.draw(st.sampled_from(("table", "inputs_embeds"))), dtype, prompt_dtype)


@sources
@pytest.mark.parametrize("shape", [(2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 0, 0, 5, 6)])
def test_splice_of_an_empty_prompt_or_text_has_the_bits_of_the_oracle(shape: Shape, source: str) -> None:
    check(shape, *arrange("prefix", shape), source)


@sources
@pytest.mark.parametrize("slots", [None, torch.zeros(0, 4, dtype=torch.int64)])
def test_splice_of_an_empty_batch_is_empty_with_gradients_of_zero(slots: Tensor | None, source: str) -> None:
    shape = (0, 3, 4, 5, 6)
    prompt, rows = draw(shape, source, torch.bfloat16, torch.float32)
    out = splice(prompt, Layout(3, slots), source, rows, draw_ids(shape))
    assert out.shape == (0, 7 if slots is None else 4, 5)
    with poisoned_memory():
        gradients = torch.autograd.grad(out, (prompt, rows), torch.zeros_like(out))
    for gradient, value in zip(gradients, (prompt, rows)):
        assert torch.equal(gradient, torch.zeros_like(value))


@sources
@arrangements
@pytest.mark.parametrize("memory", ["transposed", "strided"])
def test_splice_of_noncontiguous_tensors_has_the_bits_of_the_oracle(memory: str, arrangement: str, source: str) -> None:
    layout, slots = arrange(arrangement, SMALL)
    if layout.slots is not None:
        layout = Layout.from_slots(layout.slots.t().contiguous().t(), 7)
    check(SMALL, layout, slots, source, memory=memory, input_ids=draw_ids(SMALL).t().contiguous().t())


@sources
@arrangements
def test_splice_of_noncontiguous_output_gradients_has_the_gradients_of_contiguous_ones(
    arrangement: str, source: str
) -> None:
    prompt, rows = draw(SMALL, source, torch.float32, torch.float32)
    out = splice(prompt, arrange(arrangement, SMALL)[0], source, rows, draw_ids(SMALL))
    wide = torch.full((*out.shape[:2], 40), float("nan"))
    wide[..., :33] = integers(*out.shape)
    transposed = integers(*out.shape).float().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for d_out in (torch.ones(()).expand(out.shape), wide[..., :33], transposed):
        assert not d_out.is_contiguous()
        actual = torch.autograd.grad(out, (prompt, rows), d_out, retain_graph=True)
        expected = torch.autograd.grad(out, (prompt, rows), d_out.contiguous(), retain_graph=True)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("arrangement", ["prefix", "any"])
def test_splice_takes_int32_ids(arrangement: str) -> None:
    check(SMALL, *arrange(arrangement, SMALL), "table", input_ids=draw_ids(SMALL, torch.int32))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("arrangement", ["prefix", "any"])
def test_prompt_gradient_over_a_large_batch_is_an_fp32_sum(arrangement: str, dtype: torch.dtype) -> None:
    shape = (97, 3, 1, 17, 5)
    layout, slots = arrange(arrangement, shape)
    prompt, rows = draw(shape, "table", dtype, torch.float32)
    out = splice(prompt, layout, "table", rows, draw_ids(shape))
    d_out = normal(tuple(out.shape), dtype, generator(9))
    (d_prompt,) = torch.autograd.grad(out, prompt, d_out)
    true, _ = oracle.splice_gradients(d_out, slots, 3, 1)
    assert (d_prompt.double() - true).abs().max() <= 97 * torch.finfo(torch.float32).eps * d_out.abs().max()


FIELDS = {"attention_mask": torch.ones(3, 5).long(), "labels": draw_ids(SMALL) - 3, "position_ids": draw_ids(SMALL)}


@sources
@arrangements
@pytest.mark.parametrize("names", [(), ("labels",), ("position_ids",), ("attention_mask", "position_ids"), (*FIELDS,)])
def test_splice_batch_writes_mask_labels_and_positions_in_its_one_launch(
    names: tuple[str, ...], arrangement: str, source: str
) -> None:
    layout, slots = arrange(arrangement, SMALL)
    prompt, rows = draw(SMALL, source, torch.float32, torch.float32)
    ids = draw_ids(SMALL)
    fields = {name: FIELDS[name] for name in names}
    with _triton.recorded_launches() as launches, poisoned_memory():
        batch = ops.splice_batch(
            prompt, layout, **tokens_of(source, rows, ids), **fields, first_position=4, backend="triton"
        )
    assert launches == ["splice_forward"]
    assert torch.equal(batch.inputs_embeds, splice(prompt, layout, source, rows, ids))
    counted = [[-slot - 1 + 4 if slot < 0 else None for slot in row] for row in slots]
    for name, fill in (("attention_mask", 1), ("labels", -100), ("position_ids", 0)):
        value = getattr(batch, name)
        if name not in names:
            assert value is None
            continue
        moved = FIELDS[name] + 7 if name == "position_ids" else FIELDS[name]
        expected = oracle.carry(moved, slots, fill)
        if name == "position_ids":
            expected = [[b if a is None else a for a, b in zip(*both)] for both in zip(counted, expected)]
        assert value.dtype == torch.int64 and value.tolist() == expected


@arrangements
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_splice_batch_gives_the_fields_of_the_reference(
    dtype: torch.dtype, ids_dtype: torch.dtype, arrangement: str
) -> None:
    layout, _ = arrange(arrangement, SMALL)
    prompt, table = draw(SMALL, "table", torch.float32, torch.float32)
    fields = {name: FIELDS[name].to(dtype) for name in ("attention_mask", "labels")}
    fields["position_ids"] = FIELDS["position_ids"].to(torch.int32 if dtype == torch.int32 else torch.int64)
    actual, expected = (
        ops.splice_batch(prompt, layout, input_ids=draw_ids(SMALL, ids_dtype), table=table, **fields, backend=backend)
        for backend in ("triton", "reference")
    )
    for value, true in zip(actual, expected):
        assert value.dtype == true.dtype and torch.equal(value, true)


@sources
def test_a_prefix_splice_and_its_prompt_gradient_are_one_launch_each(source: str) -> None:
    prompt, rows = draw(SMALL, source, torch.bfloat16, torch.float32)
    rows.requires_grad_(False)
    with _triton.recorded_launches() as launches:
        out = splice(prompt, Layout.prefix(7), source, rows, draw_ids(SMALL))
        assert launches == ["splice_forward"]
        out.sum().backward()
    assert launches == ["splice_forward", "splice_prefix_backward"]


@sources
@arrangements
def test_splice_computes_only_the_gradients_asked_for(arrangement: str, source: str) -> None:
    layout, _ = arrange(arrangement, SMALL)
    sums = ["splice_prefix_backward"] if arrangement == "prefix" else ["segment_sum"]
    token_sums = [] if arrangement == "prefix" else ["segment_sum"]
    table_sums = ["segment_sum"] if source == "table" else []
    for wanted, expected in (((True, False), sums), ((False, True), token_sums + table_sums), ((False, False), [])):
        values = draw(SMALL, source, torch.float32, torch.float32)
        for value, needed in zip(values, wanted):
            value.requires_grad_(needed)
        out = splice(values[0], layout, source, values[1], draw_ids(SMALL))
        assert out.requires_grad == any(wanted)
        with _triton.recorded_launches() as launches:
            if any(wanted):
                out.sum().backward()
        assert launches == expected
        assert tuple(value.grad is not None for value in values) == wanted


@pytest.mark.parametrize("arrangement", ["prefix", "any"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_a_row_whose_id_is_outside_the_table_is_nan_and_alone(ids_dtype: torch.dtype, arrangement: str) -> None:
    layout, slots = arrange(arrangement, SMALL)
    prompt, table = draw(SMALL, "table", torch.float32, torch.float32)
    ids = draw_ids(SMALL, ids_dtype)
    right = splice(prompt, layout, "table", table, ids)
    # Read, the last two would be far outside of any memory of this process.
    bad = {(0, 1): 11, (0, 3): -1, (1, 0): torch.iinfo(ids_dtype).max, (2, 4): torch.iinfo(ids_dtype).min}
    wrong = ids.clone()
    for place, value in bad.items():
        wrong[place] = value
    batch = ops.splice_batch(prompt, layout, input_ids=wrong, table=table, labels=wrong, backend="triton")
    is_bad = torch.tensor([[(b, slot) in bad for slot in row] for b, row in enumerate(slots)])
    out = batch.inputs_embeds
    assert is_bad.any() and out[is_bad].isnan().all() and torch.equal(out[~is_bad], right[~is_bad])
    assert batch.labels.tolist() == oracle.carry(wrong, slots, -100)
    # Their gradients belong to no row of the table.
    d_out = integers(*out.shape)
    (d_table,) = torch.autograd.grad(out, table, d_out.float())
    _, d_tokens = oracle.splice_gradients(d_out, slots, 7, 5)
    for place in bad:
        d_tokens[place] = 0
    assert torch.equal(d_table, oracle.table_gradient(d_tokens, ids, 11).float())


@sources
def test_a_slot_outside_the_batch_gives_nan_and_takes_no_part_in_the_gradients(source: str) -> None:
    good = torch.tensor([[-1, 0, -7, 4], [3, 2, -2, 1], [0, 0, -3, -3]])
    slots = good.clone()
    slots[0, 1], slots[1, 2], slots[2, 0] = 5, -8, 2**62
    slots[2, 3] = -(2**62)
    prompt, rows = draw(SMALL, source, torch.float32, torch.float32)
    out = splice(prompt, Layout.from_slots(slots, 7), source, rows, draw_ids(SMALL))
    right = splice(prompt, Layout.from_slots(good, 7), source, rows, draw_ids(SMALL))
    moved = slots != good
    assert out[moved].isnan().all() and torch.equal(out[~moved], right[~moved])
    d_out = integers(*out.shape).float()
    actual = torch.autograd.grad(out, (prompt, rows), d_out)
    expected = torch.autograd.grad(right, (prompt, rows), d_out.masked_fill(moved.unsqueeze(-1), 0))
    assert all(map(torch.equal, actual, expected))


def test_checking_ids_raises_index_error_naming_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHECK_IDS", True)
    prompt, table = draw(SMALL, "table", torch.float32, torch.float32)
    ids = draw_ids(SMALL)
    splice(prompt, Layout.prefix(7), "table", table, ids)
    ids[1, 3] = 11
    with pytest.raises(IndexError, match=r"input_ids: expected ids in \[0, 11\), got 11"):
        splice(prompt, Layout.prefix(7), "table", table, ids)


def test_rows_beyond_two_to_the_31_elements_are_found(tmp_path: Path) -> None:
    """A table and an output gradient of 4 GiB each, in sparse files of which a few pages are touched."""
    vocabulary, width = 2**21 + 2, 1024

    def sparse(name: str, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.float16).view(shape)

    table = sparse("table", vocabulary, width)
    table[-1] = 3.0
    prompt = torch.ones(1, width, requires_grad=True)
    ids = torch.tensor([[vocabulary - 1, 0]])
    out = ops.splice(prompt, Layout.prefix(1), input_ids=ids, table=table, backend="triton")
    assert out[0, :, 0].tolist() == [1.0, 3.0, 0.0]
    d_out = sparse("d_out", 3, 2**20 + 1, width)
    d_out[0, 0], d_out[1, 0], d_out[2, 0] = 1.0, 2.0, 4.0
    d_prompt, _ = torch.ops.fusedprompt.splice_backward_triton(d_out, None, 1, 2**20, True, False)
    assert torch.equal(d_prompt, torch.full((1, width), 7.0))


@sources
@arrangements
def test_a_row_of_a_splice_does_not_depend_on_the_other_rows(arrangement: str, source: str) -> None:
    layout, _ = arrange(arrangement, SMALL)
    prompt, rows = draw(SMALL, source, torch.bfloat16, torch.float32)
    ids = draw_ids(SMALL)
    together = splice(prompt, layout, source, rows, ids)
    for b in range(3):
        one = slice(b, b + 1)
        alone = Layout(7, None if layout.slots is None else layout.slots[one])
        assert torch.equal(
            splice(prompt, alone, source, rows if source == "table" else rows[one], ids[one])[0], together[b]
        )


@sources
@arrangements
def test_splice_gradients_twice_have_the_same_bits(arrangement: str, source: str) -> None:
    prompt, rows = draw(SMALL, source, torch.float32, torch.float32)
    out = splice(prompt, arrange(arrangement, SMALL)[0], source, rows, draw_ids(SMALL))
    d_out = normal(tuple(out.shape), torch.float32, generator(9))
    first, second = (torch.autograd.grad(out, (prompt, rows), d_out, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_splice_on_triton_refuses_what_it_cannot_run_with_the_reason() -> None:
    ids, table = draw_ids(SMALL), torch.zeros(11, 33)
    for prompt, rows, fields, reason in (
        (torch.zeros(7, 33), table.double(), [], "needs float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(7, 33).double(), table, [], "needs float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(7, 33), table, [ids] * 4, "carries at most 3 fields, got 4"),
        (torch.zeros(7, 33), table, [ids] * 3, "runs"),
    ):
        arguments = (prompt, None, ids, rows, None, fields, [0] * len(fields))
        assert ops.explain("splice", *arguments)["triton"] == reason
    with pytest.raises(ops.BackendUnavailable, match=r"'triton' of op 'splice' cannot run: it needs float32"):
        ops.splice(torch.zeros(7, 33), Layout.prefix(7), input_ids=ids, table=table.double(), backend="triton")
