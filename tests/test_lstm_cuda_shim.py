"""The CUDA recurrence, compiled by g++ from the source that nvcc compiles, run on fibers against the fp64 oracle.

AddressSanitizer and UBSan are on, every array has its exact size and starts as NaN, and a deadlock is an error that
names its step. x stands for the gates before the recurrence: W_ih only selects a direction's columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from cuda_shim.machine import COMPILER, Gpu, KernelFailed, Machine, Plan, build
from tolerance import (
    LOW,
    Tensors,
    assert_as_accurate,
    assert_identical,
    dtypes,
    examples,
    generator,
    normal,
    one_thread,  # noqa: F401
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

Shape = tuple[int, int, int, int]  # (P, B, H, directions)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(build(tmp_path_factory.mktemp("shim")))


def make(shape: Shape, dtype: torch.dtype) -> Tensors:
    """x (B, P, directions * 4H): what the recurrence of each direction is added to; W_hh ~ N(0, 1 / H); biases."""
    steps, batch, hidden, directions = shape
    source = generator(steps + hidden)
    inputs = {"x": normal((batch, steps, directions * 4 * hidden), dtype, source)}
    for direction in range(directions):
        inputs[f"weight_hh_{direction}"] = normal((4 * hidden, hidden), dtype, source).mul_(hidden**-0.5)
        for kind in ("ih", "hh"):
            inputs[f"bias_{kind}_{direction}"] = normal((4 * hidden,), dtype, source)
    return inputs


def all_weights(shape: Shape, inputs: Tensors) -> list[Tensor]:
    """nn.LSTM's list, in which W_ih picks the columns of x that belong to a direction."""
    width, directions = 4 * shape[2], shape[3]
    weights, given = [], list(inputs.values())[1:]
    for direction in range(directions):
        selection = torch.zeros(width, directions * width, dtype=inputs["x"].dtype)
        selection[:, direction * width : (direction + 1) * width] = torch.eye(width)
        weights += [selection, *given[3 * direction : 3 * direction + 3]]
    return weights


def exact(shape: Shape) -> Callable[[Tensors], Tensor]:
    return lambda inputs: oracle.lstm(inputs["x"], all_weights(shape, inputs), shape[3] == 2)


def stock(shape: Shape) -> Callable[[Tensors], Tensor]:
    """nn.LSTM in training mode."""

    def run(inputs: Tensors) -> Tensor:
        zeros = inputs["x"].new_zeros(shape[3], shape[1], shape[2])
        weights = all_weights(shape, inputs)
        return torch._VF.lstm(inputs["x"], (zeros, zeros), weights, True, 1, 0.0, True, shape[3] == 2, True)[0]

    return run


def d_output_of(shape: Shape, dtype: torch.dtype) -> Tensor:
    steps, batch, hidden, directions = shape
    return normal((batch, steps, directions * hidden), dtype, generator(9))


def on_machine(machine: Machine, gpu: Gpu, shape: Shape, inputs: Tensors) -> tuple[Plan, Plan, Tensors]:
    """Both passes, and the products that follow d_gates, in fp32."""
    steps, batch, hidden, directions = shape
    weights, dtype = list(inputs.values())[1:], inputs["x"].dtype
    pre = inputs["x"].float().view(batch, steps, directions, 4 * hidden).permute(2, 1, 0, 3).contiguous()
    forward, gates, cell, output = machine.forward(gpu, weights, pre)
    d_output = d_output_of(shape, dtype).transpose(0, 1).contiguous()
    backward, d_gates = machine.backward(gpu, weights, gates, cell, d_output)
    result = {"output": output.transpose(0, 1)}
    result["d_x"] = d_gates.permute(2, 1, 0, 3).reshape(batch, steps, directions * 4 * hidden)
    for direction in range(directions):
        h = output.float()[..., direction * hidden : (direction + 1) * hidden]
        d_a = d_gates[direction].float()
        before, after = (h[:-1], d_a[1:]) if direction == 0 else (h[1:], d_a[:-1])
        result[f"d_weight_hh_{direction}"] = torch.einsum("tbg,tbh->gh", after, before).to(dtype)
        for kind in ("ih", "hh"):
            result[f"d_bias_{kind}_{direction}"] = d_gates[direction].float().sum((0, 1)).to(dtype)
    return forward, backward, result


def check(machine: Machine, gpu: Gpu, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Plan, Plan]:
    inputs = make(shape, dtype)
    forward, backward, actual = on_machine(machine, gpu, shape, inputs)
    assert gpu.variant is None or {forward.variant, backward.variant} == {gpu.variant}
    assert_as_accurate(actual, stock(shape), exact(shape), inputs, d_output_of(shape, dtype))
    return forward, backward


# Room for everything on chip; for L so little that most weights are read in every step.
GPUS = {
    "S": Gpu(variant="S", clusters=True, blocks=16),
    "M": Gpu(variant="M"),
    "L": Gpu(variant="L", blocks=4, shared=10 << 10, registers=0),
    "STREAM": Gpu(variant="STREAM"),
}


def name(shape: Shape) -> str:
    return "P{}-B{}-H{}-{}".format(*shape)


@dtypes
@pytest.mark.parametrize("variant", list(GPUS))
@pytest.mark.parametrize("shape", [(7, 1, 67, 2), (5, 3, 37, 1)], ids=name)
def test_recurrence_and_gradients_match_fp64_oracle(
    machine: Machine, shape: Shape, variant: str, dtype: torch.dtype
) -> None:
    check(machine, GPUS[variant], shape, dtype)


@pytest.mark.parametrize("blocks", range(1, 9))
def test_any_number_of_blocks_matches_fp64_oracle(machine: Machine, blocks: int) -> None:
    forward, backward = check(machine, Gpu(blocks=blocks, variant="M"), (5, 1, 23, 1))
    assert max(forward.blocks, backward.blocks) <= blocks
    assert forward.blocks == -(-23 // forward.units) and backward.blocks == -(-23 // backward.units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_in_registers_shared_memory_and_memory_at_once_match_fp64_oracle(
    machine: Machine, dtype: torch.dtype
) -> None:
    """Full blocks of 256 threads, and rows so long that they are divided among all three places."""
    gpu = Gpu(variant="L", blocks=2, threads=256, shared=48 << 10, registers=64 << 10)
    for plan in check(machine, gpu, (3, 1, 307, 1), dtype):
        assert plan.held_depth > 0 and plan.shared_slots > 0 and plan.streamed_bytes > 0
        assert plan.tiles > 1 and plan.depth > plan.held_depth


def test_few_rows_are_shared_by_several_warps_and_match_fp64_oracle(machine: Machine) -> None:
    """5 units a block: 20 rows of two chunks a lane forward, 5 rows of five backward."""
    forward, backward = check(machine, Gpu(blocks=32, threads=256, variant="M"), (2, 2, 131, 1))
    assert forward.split == 2 and backward.split == 8


@dtypes
def test_weights_that_are_not_aligned_match_fp64_oracle(machine: Machine, dtype: torch.dtype) -> None:
    for variant in ("M", "STREAM"):
        check(machine, dataclasses.replace(GPUS[variant], misaligned=True), (3, 1, 32, 1), dtype)


def drawn(data: st.DataObject) -> tuple[Shape, Gpu]:
    """Any shape, on any device, in any order."""
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 40), st.integers(1, 2)))
    gpu = Gpu(
        blocks=data.draw(st.integers(1, 8)),
        shared=data.draw(st.sampled_from([2, 8, 64])) << 10,
        registers=data.draw(st.sampled_from([0, 16, 64])) << 10,
        clusters=data.draw(st.booleans()),
        threads=data.draw(st.sampled_from([32, 64, 128])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    return shape, gpu


@examples(10)
@given(data=st.data())
def test_any_shape_on_any_device_in_any_order_matches_fp64_oracle(machine: Machine, data: st.DataObject) -> None:
    shape, gpu = drawn(data)
    misaligned, variant = data.draw(st.booleans()), data.draw(st.sampled_from(["S", "M", "L"]))
    gpu = dataclasses.replace(gpu, misaligned=misaligned, variant=variant)
    dtype = data.draw(st.sampled_from(LOW))
    try:
        check(machine, gpu, shape, dtype)
    except KernelFailed as error:
        assert "variant: expected one that fits" in str(error)
        check(machine, dataclasses.replace(gpu, variant=None), shape, dtype)


@pytest.mark.parametrize("variant", list(GPUS))
def test_any_order_of_threads_gives_the_same_bits(machine: Machine, variant: str) -> None:
    shape = (4, 1, 29, 2)
    inputs = make(shape, torch.bfloat16)
    first = on_machine(machine, GPUS[variant], shape, inputs)[2]
    for seed in range(1, 5 if variant != "STREAM" else 2):
        again = on_machine(machine, dataclasses.replace(GPUS[variant], seed=seed), shape, inputs)[2]
        assert_identical(again, first)


@dtypes
@pytest.mark.parametrize("variant", list(GPUS))
def test_nan_gates_end_in_nan_and_not_in_a_deadlock(machine: Machine, variant: str, dtype: torch.dtype) -> None:
    """All ones is the word that says "not written yet", and a NaN."""
    shape = (4, 1, 11, 1)
    inputs = make(shape, dtype)
    inputs["x"][0, 1, 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32).to(dtype)
    inputs["weight_hh_0"].view(torch.int32 if dtype == torch.float32 else torch.int16)[2, 5] = -1
    output = on_machine(machine, GPUS[variant], shape, inputs)[2]["output"][0]
    assert output[2:].isnan().all() and not output[0].isnan().any()


def test_streamed_weights_of_a_batch_that_takes_two_rounds_match_fp64_oracle(machine: Machine) -> None:
    """Four entries share a read of the weights, so six read what is streamed twice in a step."""
    check(machine, GPUS["L"], (4, 6, 23, 2), torch.bfloat16)


@pytest.mark.parametrize("variant", ["S", "M", "L"])
@pytest.mark.parametrize(("lost", "step"), [(0, 1), (13, 2), (29, 3)])
def test_a_lost_word_is_a_deadlock_that_names_its_step(machine: Machine, variant: str, lost: int, step: int) -> None:
    """11 words a step forward in fp32, in S to each of 8 blocks."""
    shape, gpu = (4, 1, 11, 1), GPUS[variant]
    inputs = make(shape, torch.float32)
    lost *= 8 if variant == "S" else 1
    with pytest.raises(KernelFailed, match=rf"deadlock in lstm_persistent at step {step}: \d+ threads poll"):
        on_machine(machine, dataclasses.replace(gpu, lose_store=lost), shape, inputs)


@pytest.mark.parametrize("variant", ["S", "M", "L"])
def test_a_thread_that_waits_in_vain_gives_up_and_names_block_and_step(machine: Machine, variant: str) -> None:
    """With the watchdog off, as on a GPU; word 13 belongs to step 1, so that step 2 waits for it."""
    shape, word = (4, 1, 11, 1), 13 * (8 if variant == "S" else 1)
    gpu = dataclasses.replace(GPUS[variant], lose_store=word, most_polls=1000)
    with pytest.raises(KernelFailed, match=r"lstm_persistent: block \d waited in vain in step 2"):
        on_machine(machine, gpu, shape, make(shape, torch.float32))
    check(machine, dataclasses.replace(gpu, lose_store=-1), shape)


@pytest.mark.parametrize("variant", list(GPUS))
@pytest.mark.parametrize("held", [0x00, -1], ids=["zeros", "random"])
def test_what_the_workspace_held_before_changes_no_bit(machine: Machine, variant: str, held: int) -> None:
    shape = (4, 1, 29, 2)
    inputs = make(shape, torch.bfloat16)
    expected = on_machine(machine, GPUS[variant], shape, inputs)[2]
    assert_identical(
        on_machine(machine, dataclasses.replace(GPUS[variant], workspace=held), shape, inputs)[2], expected
    )


@pytest.mark.parametrize("variant", ["M", "L"])
@pytest.mark.parametrize("held", [0x00, -1], ids=["zeros", "random"])
def test_words_of_an_earlier_call_would_be_taken_for_new_ones_were_they_not_cleared(
    machine: Machine, variant: str, held: int
) -> None:
    """So the test above would find a memset that is missing. All ones, as in cleared memory, would hide it."""
    shape = (4, 1, 32, 2)
    inputs = make(shape, torch.bfloat16)
    expected = on_machine(machine, GPUS[variant], shape, inputs)[2]
    for workspace, same in ((0xFF, True), (held, False)):
        gpu = dataclasses.replace(GPUS[variant], workspace=workspace, lose_fills=True)
        actual = on_machine(machine, gpu, shape, inputs)[2]
        assert torch.equal(actual["output"], expected["output"]) is same


def test_a_plan_is_asked_for_once_and_again_in_another_environment(machine: Machine) -> None:
    """To ask what fits on the device costs 10 to 30 us, which a step of training should not pay at each recurrence."""
    shape = (3, 1, 23, 1)
    inputs = make(shape, torch.float32)
    for gpu, queries in ((GPUS["S"], 1), (Gpu(), 1), (Gpu(resident=1), 2), (GPUS["STREAM"], 0)):
        for plan in on_machine(machine, gpu, shape, inputs)[:2]:
            assert (plan.queries, plan.queries_again, plan.queries_elsewhere) == (queries, 0, queries)


def test_a_device_that_cannot_hold_all_blocks_runs_step_by_step_and_matches_fp64_oracle(machine: Machine) -> None:
    forward, backward = check(machine, Gpu(blocks=8, resident=1), (5, 2, 23, 2))
    assert forward.variant == backward.variant == "STREAM"


def test_a_device_that_cannot_run_the_cluster_does_without_and_matches_fp64_oracle(machine: Machine) -> None:
    shape = (3, 1, 23, 2)
    for runs, variant in ((True, "S"), (False, "M")):
        forward, backward = check(machine, Gpu(blocks=16, clusters=True, clusters_run=runs), shape)
        assert forward.variant == backward.variant == variant


def test_a_variant_that_does_not_fit_is_refused_by_name(machine: Machine) -> None:
    shape = (3, 1, 23, 1)
    for gpu in (Gpu(resident=1, variant="M"), Gpu(variant="S"), Gpu(variant="L")):
        with pytest.raises(KernelFailed, match=f"variant: expected one that fits this GPU, got {gpu.variant}"):
            on_machine(machine, gpu, shape, make(shape, torch.float32))


def test_launches_do_not_grow_with_the_steps_except_in_stream(machine: Machine) -> None:
    """One for all steps; backward one transpose a direction more."""
    for steps in (2, 9):
        shape = (steps, 1, 8, 2)
        forward, backward, _ = on_machine(machine, GPUS["S"], shape, make(shape, torch.float32))
        assert (forward.launches, backward.launches) == (1, 3)
        forward, backward, _ = on_machine(machine, GPUS["STREAM"], shape, make(shape, torch.float32))
        assert (forward.launches, backward.launches) == (steps, steps + 2)
