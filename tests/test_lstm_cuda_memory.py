"""The CUDA recurrence under a weaker memory than a CPU's: accesses that nothing orders, and stores that arrive late.

Plain loads and stores of the kernels are seen through g++ -fsanitize=thread (csrc/shim/races.h), and with a seed
relaxed stores arrive word by word in any order (csrc/shim/stores.h). `make shim` runs many seeds.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cuda_shim.machine import COMPILER, Gpu, KernelFailed, Machine, build_watched, build_with_faults
from test_lstm_cuda_shim import GPUS, Shape, check, drawn, make, name, on_machine
from tolerance import LOW, Tensors, dtypes, examples, generator, normal, one_thread  # noqa: F401

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

SEEDS = range(int(os.environ.get("FUSEDPROMPT_SHIM_SEEDS", "2")))
SMALL: Shape = (4, 3, 11, 1)

# What is wrong: in which file, what stands there, what stands there instead.
PERSISTENT, EXCHANGE = "lstm_persistent.cuh", "lstm_exchange.cuh"
BEGINS = "begin_arrivals(arrivals + thread(), blocks)"
SENDS = "exchange.publish(next + b * plan.staged_bytes + place, published, step)"
FAULTS = {
    "plain load": [(EXCHANGE, "load_relaxed(from + chunk)", "from[chunk]")],
    "no wait": [(EXCHANGE, "!arrived(arrivals + before % 2, uint32_t(before / 2 % 2))", "false")],
    "no release": [(EXCHANGE, "release_shared()", "void()")],
    "an arrival before the barrier": [
        (
            PERSISTENT,
            "slice.multiply(now, batch, sums)",
            "(cluster && !last ? exchange.have_read(step) : void(), slice.multiply(now, batch, sums))",
        ),
        (PERSISTENT, "(cluster && !last)", "(cluster && !last && step == 0)"),
    ],
    "nobody begins": [(EXCHANGE, "(thread() < 2)", "false")],
    "one arrival too many": [(EXCHANGE, BEGINS, BEGINS.replace("blocks", "blocks - 1"))],
    "a word twice": [(PERSISTENT, SENDS, f"({SENDS}, {SENDS})")],
    "one vector": [
        (PERSISTENT, "(second ? vector_bytes : 0)", "0"),
        (PERSISTENT, "(second ? 0 : vector_bytes)", "0"),
    ],
    "one place for sums": [(PERSISTENT, "(second ? sums_bytes : 0)", "0")],
    "a word after the last step": [(PERSISTENT, "(has_cell && stores && !last)", "(has_cell && stores)")],
    "no memset": [("lstm_launch.cuh", "(workspace.exchange_bytes > 0)", "false")],
    "one word of four": [
        (EXCHANGE, "!complete(arrived[k], words_in_chunk(chunk, words))", "(arrived[k].x == kUnwritten)")
    ],
    "no wait for copies": [("lstm_matvec.cuh", "wait_for_copies<kLstmTileRows - 1>()", "void()")],
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(build_watched(tmp_path_factory.mktemp("watched")))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(build_with_faults(tmp_path_factory.mktemp("faulty"), FAULTS))


def results(machine: Machine, gpu: Gpu, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensors:
    return on_machine(machine, gpu, shape, make(shape, dtype))[2]


@pytest.mark.parametrize("seed", SEEDS)
@dtypes
@pytest.mark.parametrize("variant", list(GPUS))
@pytest.mark.parametrize("shape", [(5, 1, 45, 2), (4, 3, 37, 1)], ids=name)
def test_kernels_have_no_races_and_stand_late_stores(
    watched: Machine, shape: Shape, variant: str, dtype: torch.dtype, seed: int
) -> None:
    check(watched, dataclasses.replace(GPUS[variant], seed=seed), shape, dtype)


@examples(5 * len(SEEDS))
@given(data=st.data())
def test_any_shape_on_any_device_has_no_races_and_stands_late_stores(watched: Machine, data: st.DataObject) -> None:
    shape, gpu = drawn(data)
    check(watched, gpu, shape, data.draw(st.sampled_from(LOW)))


@pytest.mark.parametrize("variant", ["S", "M", "L"])
def test_each_barrier_is_missed(watched: Machine, variant: str) -> None:
    """All threads reach it, but it orders nothing."""
    inputs = make(SMALL, torch.float32)
    forward, backward, _ = on_machine(watched, GPUS[variant], SMALL, inputs)
    assert forward.barriers == backward.barriers >= SMALL[0]
    for barrier in range(forward.barriers):
        with pytest.raises(KernelFailed, match="lstm_persistent: race at shared memory of block"):
            on_machine(watched, dataclasses.replace(GPUS[variant], deaf_barrier=barrier), SMALL, inputs)


RACE = r"race at {0}, byte \d+: {1} by block \d+ thread \d+.* orders it behind the {1} by block \d+ thread"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("fault", "variant", "message"),
    [
        ("plain load", "M", RACE.format("workspace", "(plain load|relaxed store)")),
        ("plain load", "L", RACE.format("workspace", "(plain load|relaxed store)")),
        ("no wait", "S", RACE.format(r"shared memory of block \d", "(plain load|sent store)")),
        ("no release", "S", RACE.format(r"shared memory of block \d", "(plain load|sent store)")),
        ("an arrival before the barrier", "S", RACE.format(r"shared memory of block \d", "(plain load|sent store)")),
        ("nobody begins", "S", "(an mbarrier is used that nobody began|poll of what was not set at shared memory)"),
        ("one arrival too many", "S", "(race at shared memory of block|more threads arrive in a phase of an mbarrier)"),
        ("a word twice", "S", RACE.format(r"shared memory of block \d", "sent store")),
        ("one vector", "S", RACE.format(r"shared memory of block \d", "(plain load|sent store)")),
        ("one place for sums", "S", RACE.format(r"shared memory of block \d", "plain (load|store)")),
        ("no memset", "M", r"poll of what was not set at workspace, byte \d+: relaxed load by block \d+ thread"),
        ("no memset", "L", r"poll of what was not set at workspace, byte \d+: relaxed load by block \d+ thread"),
    ],
)
def test_a_fault_is_found_in_any_order(faulty: Machine, fault: str, variant: str, message: str, seed: int) -> None:
    results(faulty, dataclasses.replace(GPUS[variant], seed=seed), SMALL)
    with pytest.raises(KernelFailed, match=f"lstm_persistent: {message}"):
        results(faulty, dataclasses.replace(GPUS[variant], fault=fault, seed=seed), SMALL)


def test_a_store_into_a_block_that_has_ended_is_found(faulty: Machine) -> None:
    gpu = dataclasses.replace(GPUS["S"], fault="a word after the last step")
    with pytest.raises(KernelFailed, match=r"access behind the end of its block|word sent to a block that has ended"):
        for seed in range(1, 9):
            results(faulty, dataclasses.replace(gpu, seed=seed), SMALL)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_weights_that_nobody_waits_for_are_missed(faulty: Machine, seed: int) -> None:
    gpu = dataclasses.replace(GPUS["L"], seed=seed)
    right = results(faulty, gpu, SMALL)["output"]
    assert not torch.equal(
        results(faulty, dataclasses.replace(gpu, fault="no wait for copies"), SMALL)["output"], right
    )


def test_a_protocol_that_takes_four_words_for_one_fails_only_where_stores_arrive_late(faulty: Machine) -> None:
    """Backward in fp32 a thread stores the 16 bytes that another one loads."""
    steps, batch, hidden, directions = SMALL
    weights, source = list(make(SMALL, torch.float32).values())[1:], generator(1)
    gates = normal((directions, steps, batch, 4 * hidden), torch.float32, source).sigmoid()
    cell = normal((directions, steps, batch, hidden), torch.float32, source)
    d_output = normal((steps, batch, directions * hidden), torch.float32, source)

    def d_gates(**changes: object) -> Tensor:
        return faulty.backward(dataclasses.replace(GPUS["M"], **changes), weights, gates, cell, d_output)[1]

    right = d_gates()
    assert torch.equal(d_gates(fault="one word of four"), right)
    seeds = range(1, 9)
    assert all(torch.equal(d_gates(seed=seed), right) for seed in seeds)
    assert not all(torch.equal(d_gates(fault="one word of four", seed=seed), right) for seed in seeds)
