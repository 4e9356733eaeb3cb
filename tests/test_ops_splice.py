"""The splice op against the oracle's loops.

A splice copies, so its output must have the bits of the oracle's, rounded once to the token rows' dtype. Its gradients
are sums: of small integers they must be exact in every dtype, of normal numbers as accurate as autograd's through
repeat, cast, embedding and cat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import oracle
from fusedprompt import Layout, ops
from tolerance import (
    Function,
    Tensors,
    assert_as_accurate,
    assert_identical,
    dtypes,
    each_backend,
    evaluate,
    examples,
    generator,
    largest,
    normal,
    one_thread,  # noqa: F401
    require,
    ulp,
)

# (B, R, T, D, V)
Shape = tuple[int, int, int, int, int]
SHAPES = [(1, 1, 1, 1, 1), (3, 7, 33, 97, 50), (7, 33, 1, 33, 7), (2, 20, 97, 64, 1000)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-R{}-T{}-D{}-V{}".format(*s))
sources = pytest.mark.parametrize("source", ["table", "inputs_embeds"])
arrangements = pytest.mark.parametrize("arrangement", ["prefix", "own", "insert", "any"])


def any_slots(shape: Shape, seed: int) -> oracle.Slots:
    """Any mixture: rows and tokens several times, or never."""
    batch, num_prompt_rows, length, *_ = shape
    choices = torch.randint(
        -num_prompt_rows, length, (batch, num_prompt_rows + length + 3), generator=generator(seed), device="cpu"
    )
    return choices.tolist()


def arrange(arrangement: str, shape: Shape) -> tuple[Layout, oracle.Slots]:
    """A layout of the package, and the oracle's account of it."""
    batch, num_prompt_rows, length, *_ = shape
    if arrangement == "prefix":
        return Layout.prefix(num_prompt_rows), oracle.prefix_slots(batch, num_prompt_rows, length)
    if arrangement == "own":
        num_prompts = {33: 3, 20: 4}.get(num_prompt_rows, num_prompt_rows)
        rows = num_prompt_rows // num_prompts
        which = torch.randint(0, num_prompts, (batch,), generator=generator(6), device="cpu")
        slots = [[-a * rows - r - 1 for r in range(rows)] + [*range(length)] for a in which.tolist()]
        return Layout.prefixes(rows, which, num_prompts), slots
    if arrangement == "any":
        slots = any_slots(shape, 5)
        return Layout.from_slots(torch.tensor(slots), num_prompt_rows), slots
    starts = torch.randint(0, length + 1, (batch,), generator=generator(6), device="cpu")
    shifts = torch.randint(-length, length + 1, (batch,), generator=generator(7), device="cpu")
    slots = oracle.insert_slots(num_prompt_rows, length, starts.tolist(), shifts.tolist())
    return Layout.insert(num_prompt_rows, length, starts, shifts), slots


def ids_for(shape: Shape, seed: int = 8) -> Tensor:
    return torch.randint(0, shape[4], (shape[0], shape[2]), generator=generator(seed), device="cpu")


def make(
    shape: Shape, source: str, dtype: torch.dtype, prompt_dtype: torch.dtype, layout: str = "contiguous"
) -> Tensors:
    batch, num_prompt_rows, length, width, vocabulary = shape
    numbers = generator(0)
    tokens = (vocabulary, width) if source == "table" else (batch, length, width)
    return {
        "prompt": normal((num_prompt_rows, width), prompt_dtype, numbers, layout),
        source: normal(tokens, dtype, numbers, layout),
    }


def fused(layout: Layout, input_ids: Tensor, backend: str = "auto") -> Function:
    def run(inputs: Tensors) -> Tensor:
        prompt, *_ = inputs.values()
        if "table" in inputs:
            return ops.splice(prompt, layout, input_ids=input_ids, table=inputs["table"], backend=backend)
        return ops.splice(prompt, layout, inputs_embeds=inputs["inputs_embeds"], backend=backend)

    return run


def token_rows(inputs: Tensors, input_ids: Tensor) -> Tensor:
    return F.embedding(input_ids, inputs["table"]) if "table" in inputs else inputs["inputs_embeds"]


def plain(slots: oracle.Slots, input_ids: Tensor) -> Function:
    """repeat, cast, embedding, cat, and a gather for what is not a prefix."""

    def run(inputs: Tensors) -> Tensor:
        tokens = token_rows(inputs, input_ids)
        prompt = inputs["prompt"].repeat(tokens.shape[0], 1, 1).to(tokens.dtype)
        joined = torch.cat((prompt, tokens), dim=1)
        rows = torch.tensor([[-s - 1 if s < 0 else prompt.shape[1] + s for s in row] for row in slots])
        return joined[torch.arange(len(slots)).unsqueeze(1), rows]

    return run


class Spliced(torch.autograd.Function):
    """The oracle's two loops as one function."""

    @staticmethod
    def forward(ctx: Any, prompt: Tensor, tokens: Tensor, slots: oracle.Slots) -> Tensor:
        ctx.slots, ctx.rows, ctx.length = slots, prompt.shape[0], tokens.shape[1]
        return oracle.splice(prompt, slots, tokens)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*oracle.splice_gradients(d_out, ctx.slots, ctx.rows, ctx.length), None)


def exact(slots: oracle.Slots, input_ids: Tensor) -> Function:
    def run(inputs: Tensors) -> Tensor:
        if "inputs_embeds" in inputs:
            return Spliced.apply(inputs["prompt"], inputs["inputs_embeds"], slots)
        return Spliced.apply(inputs["prompt"], TableRows.apply(inputs["table"], input_ids), slots)

    return run


class TableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, input_ids: Tensor) -> Tensor:
        ctx.input_ids, ctx.vocabulary = input_ids, table.shape[0]
        return oracle.table_rows(table, input_ids)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        return oracle.table_gradient(d_rows, ctx.input_ids, ctx.vocabulary), None


def integers(shape: tuple[int, ...], seed: int = 9) -> Tensor:
    """Small enough that their sums here are exact in every dtype."""
    return torch.randint(-2, 3, shape, generator=generator(seed), device="cpu").double()


def needs(backend: str, inputs: Tensors, layout: Layout, input_ids: Tensor) -> None:
    prompt, tokens = inputs.values()
    ids, table, embeds = (input_ids, tokens, None) if "table" in inputs else (None, None, tokens)
    require("splice", backend, prompt, layout.slots, ids, table, embeds, [], [])


def check_bits(inputs: Tensors, layout: Layout, slots: oracle.Slots, input_ids: Tensor, backend: str = "auto") -> None:
    """Output and gradients equal the oracle's, bit by bit."""
    prompt, tokens = inputs.values()
    width = len(slots[0]) if slots else layout.output_length(input_ids.shape[1])
    d_out = integers((input_ids.shape[0], width, prompt.shape[1]))
    actual = evaluate(fused(layout, input_ids, backend), inputs, d_out)
    truth = evaluate(exact(slots, input_ids), {name: value.double() for name, value in inputs.items()}, d_out)
    _, of_prompt, of_tokens = truth
    expected = {
        "output": truth["output"].to(tokens.dtype),
        of_prompt: truth[of_prompt].to(prompt.dtype),
        of_tokens: truth[of_tokens].to(tokens.dtype),
    }
    assert_identical(actual, expected)


@each_backend("splice")
@dtypes
@arrangements
@sources
@shapes
def test_splice_and_its_gradients_have_the_bits_of_the_oracle(
    shape: Shape, source: str, arrangement: str, dtype: torch.dtype, backend: str
) -> None:
    layout, slots = arrange(arrangement, shape)
    inputs = make(shape, source, dtype, torch.float32)
    needs(backend, inputs, layout, ids_for(shape))
    check_bits(inputs, layout, slots, ids_for(shape), backend)


@each_backend("splice")
@arrangements
@sources
@pytest.mark.parametrize(
    ("dtype", "prompt_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_splice_gradients_match_fp64_oracle_as_well_as_cat_does(
    dtype: torch.dtype, prompt_dtype: torch.dtype, source: str, arrangement: str, backend: str
) -> None:
    shape = (33, 3, 7, 17, 20)
    layout, slots = arrange(arrangement, shape)
    inputs, input_ids = make(shape, source, dtype, prompt_dtype), ids_for(shape)
    needs(backend, inputs, layout, input_ids)
    d_out = normal((33, len(slots[0]), 17), dtype, generator(9))
    actual = evaluate(fused(layout, input_ids, backend), inputs, d_out)
    assert_as_accurate(actual, plain(slots, input_ids), exact(slots, input_ids), inputs, d_out, neighbours=0)


@each_backend("splice")
@arrangements
@sources
def test_splice_sums_bf16_gradients_of_an_fp32_prompt_as_accurately_as_fp32_does(
    source: str, arrangement: str, backend: str
) -> None:
    shape = (97, 3, 7, 17, 20)
    layout, slots = arrange(arrangement, shape)
    inputs, input_ids = make(shape, source, torch.bfloat16, torch.float32), ids_for(shape)
    needs(backend, inputs, layout, input_ids)
    d_out = normal((97, len(slots[0]), 17), torch.bfloat16, generator(9))
    actual = evaluate(fused(layout, input_ids, backend), inputs, d_out)["d_prompt"]
    wide = {name: value.float() for name, value in inputs.items()}
    single = evaluate(plain(slots, input_ids), wide, d_out)["d_prompt"]
    truth, _ = oracle.splice_gradients(d_out, slots, 3, 7)
    allowed = 2 * largest(single.double() - truth) + ulp(largest(truth), torch.float32)
    assert actual.dtype == torch.float32 and largest(actual.double() - truth) <= allowed


@examples(60)
@given(data=st.data())
def test_splice_by_any_slots_has_the_bits_of_the_oracle(data: st.DataObject) -> None:
    batch, num_prompt_rows, length = (data.draw(st.integers(0, high)) for high in (3, 4, 5))
    width, vocabulary = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    places = [*range(-num_prompt_rows, length)]
    out_length = data.draw(st.integers(0, 9)) if places else 0
    slots = [[data.draw(st.sampled_from(places)) for _ in range(out_length)] for _ in range(batch)]
    shape = (batch, num_prompt_rows, length, width, vocabulary)
    layout = Layout.from_slots(torch.tensor(slots, dtype=torch.int64).view(batch, out_length), num_prompt_rows)
    source = data.draw(st.sampled_from(("table", "inputs_embeds")))
    dtype, prompt_dtype = (data.draw(st.sampled_from((torch.float32, torch.bfloat16))) for _ in range(2))
    inputs = make(shape, source, dtype, prompt_dtype)
    d_out = integers((batch, out_length, width))
    actual = evaluate(fused(layout, ids_for(shape)), inputs, d_out)
    if batch:
        check_bits(inputs, layout, slots, ids_for(shape))
    else:
        assert actual["output"].shape == (0, out_length, width)
        assert not actual["d_prompt"].any() and actual["d_prompt"].shape == inputs["prompt"].shape


@each_backend("splice")
@sources
@arrangements
@pytest.mark.parametrize("memory", ["transposed", "strided"])
def test_splice_of_noncontiguous_tensors_has_the_bits_of_the_oracle(
    memory: str, arrangement: str, source: str, backend: str
) -> None:
    shape = (3, 7, 5, 9, 11)
    layout, slots = arrange(arrangement, shape)
    if layout.slots is not None:
        layout = Layout.from_slots(layout.slots.t().contiguous().t(), 7)
        assert not layout.slots.is_contiguous()
    input_ids = ids_for(shape).t().contiguous().t()
    inputs = make(shape, source, torch.float32, torch.float32, memory)
    assert not any(value.is_contiguous() for value in inputs.values()) and not input_ids.is_contiguous()
    needs(backend, inputs, layout, input_ids)
    check_bits(inputs, layout, slots, input_ids, backend)


@each_backend("splice")
@sources
@arrangements
def test_splice_of_noncontiguous_output_gradients_has_the_gradients_of_contiguous_ones(
    arrangement: str, source: str, backend: str
) -> None:
    shape = (3, 7, 5, 9, 11)
    layout, slots = arrange(arrangement, shape)
    inputs, input_ids = make(shape, source, torch.float32, torch.float32), ids_for(shape)
    needs(backend, inputs, layout, input_ids)
    full = (3, len(slots[0]), 9)
    run = fused(layout, input_ids, backend)
    expanded = torch.ones(()).expand(full)  # what sum().backward() sends
    assert_identical(evaluate(run, inputs, expanded), evaluate(run, inputs, expanded.contiguous()))
    transposed = integers(full).float().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_identical(evaluate(run, inputs, transposed), evaluate(run, inputs, transposed.contiguous()))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@arrangements
def test_splice_takes_int32_and_int64_ids_alike(arrangement: str, ids_dtype: torch.dtype) -> None:
    shape = (3, 7, 5, 9, 11)
    layout, slots = arrange(arrangement, shape)
    inputs = make(shape, "table", torch.float32, torch.float32)
    check_bits(inputs, layout, slots, ids_for(shape).to(ids_dtype))


@sources
@arrangements
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 0, 0, 5, 6), (0, 0, 0, 5, 6)])
def test_splice_of_empty_batches_prompts_and_texts_has_the_bits_of_the_oracle(
    shape: Shape, arrangement: str, source: str
) -> None:
    batch, num_prompt_rows, length, width, _ = shape
    if arrangement == "prefix":
        layout, slots = arrange(arrangement, shape)
    elif arrangement == "insert":
        zeros = torch.zeros(batch, dtype=torch.int64)
        layout = Layout.insert(num_prompt_rows, length, zeros, zeros)
        slots = oracle.prefix_slots(batch, num_prompt_rows, length)
    else:
        slots = [[*range(length), *range(-num_prompt_rows, 0)] for _ in range(batch)]
        layout = Layout.from_slots(torch.tensor(slots, dtype=torch.int64).view(batch, -1 if batch else 7), 0)
        layout = Layout(num_prompt_rows, layout.slots)
    inputs = make(shape, source, torch.float32, torch.float32)
    if slots:
        check_bits(inputs, layout, slots, ids_for(shape))
        return
    out_length = layout.output_length(length)
    result = evaluate(fused(layout, ids_for(shape)), inputs, torch.zeros(0, out_length, width))
    assert result["output"].shape == (0, out_length, width)
    for name, value in inputs.items():
        assert torch.equal(result[f"d_{name}"], torch.zeros_like(value))


@sources
@arrangements
def test_splice_gradients_match_finite_differences(arrangement: str, source: str) -> None:
    shape = (2, 3, 2, 2, 4)
    layout, _ = arrange(arrangement, shape)
    inputs = make(shape, source, torch.float64, torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values()]
    run = fused(layout, ids_for(shape))
    assert torch.autograd.gradcheck(lambda *values: run(dict(zip(inputs, values))), leaves)


@each_backend("splice")
@sources
@arrangements
def test_a_row_of_a_splice_does_not_depend_on_the_other_rows(arrangement: str, source: str, backend: str) -> None:
    shape = (5, 7, 33, 17, 50)
    layout, _ = arrange(arrangement, shape)
    inputs, input_ids = make(shape, source, torch.bfloat16, torch.float32), ids_for(shape)
    needs(backend, inputs, layout, input_ids)
    together = fused(layout, input_ids, backend)(inputs)
    for row in range(5):
        alone = {**inputs, "prompt": inputs["prompt"]}
        if source == "inputs_embeds":
            alone[source] = inputs[source][row : row + 1]
        slots, which = (None if own is None else own[row : row + 1] for own in (layout.slots, layout.which))
        of_row = dataclasses.replace(layout, slots=slots, which=which)
        one = fused(of_row, input_ids[row : row + 1], backend)(alone)
        assert torch.equal(one[0], together[row])


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@each_backend("splice")
@sources
@pytest.mark.parametrize("arrangement", ["prefix", "any"])
def test_splice_gradients_twice_have_the_same_bits_on_several_threads(
    arrangement: str, source: str, backend: str
) -> None:
    # Large enough for every loop in torch to be split over threads.
    shape = (32, 2, 30, 256, 3)
    layout, slots = arrange(arrangement, shape)
    inputs, input_ids = make(shape, source, torch.float32, torch.float32), ids_for(shape)
    needs(backend, inputs, layout, input_ids)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out = fused(layout, input_ids, backend)(leaves)
    d_out = normal((32, len(slots[0]), 256), torch.float32, generator(9))

    # Not `evaluate`: its poison asks torch for deterministic algorithms, which users do not.
    def gradients() -> Tensors:
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), d_out, retain_graph=True)))

    first = gradients()
    for _ in range(7):
        assert_identical(gradients(), first)


@each_backend("splice")
@arrangements
@sources
def test_splice_gives_gradients_only_to_tensors_that_require_them(source: str, arrangement: str, backend: str) -> None:
    shape = (3, 7, 5, 9, 11)
    layout, _ = arrange(arrangement, shape)
    for wanted in ("prompt", source):
        inputs = make(shape, source, torch.float32, torch.float32)
        needs(backend, inputs, layout, ids_for(shape))
        inputs[wanted].requires_grad_()
        fused(layout, ids_for(shape), backend)(inputs).sum().backward()
        assert [name for name, value in inputs.items() if value.grad is not None] == [wanted]
    frozen = make(shape, source, torch.float32, torch.float32)
    assert not fused(layout, ids_for(shape), backend)(frozen).requires_grad


@each_backend("splice")
@sources
def test_splice_never_hands_back_the_memory_of_its_arguments(source: str, backend: str) -> None:
    shape = (2, 0, 5, 9, 11)  # no prompt: nothing but the tokens to return
    inputs = make(shape, source, torch.float32, torch.float32)
    for layout in (Layout.prefix(0), Layout.from_slots(torch.arange(5).repeat(2, 1), 0)):
        needs(backend, inputs, layout, ids_for(shape))
        before = {name: value.clone() for name, value in inputs.items()}
        fused(layout, ids_for(shape), backend)(inputs).fill_(7.0)
        assert_identical(inputs, before)
