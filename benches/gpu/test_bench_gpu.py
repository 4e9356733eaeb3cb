"""The kernels on a GPU against PEFT, PEFT compiled, ATen (cuDNN) and the floor: `make gpu-bench`.

Every row is measured in three states: `cold` and `warm` are device times inside a CUDA graph (_timing.py), `eager` is
the time of a call from Python. Without a GPU, and with --benchmark-disable, every contender runs once at toy sizes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .._work import BACKWARD, FORWARD
from ._cases import OURS, Case, Planned, Work, cases, matmul_precision
from ._timing import Figures, capture, time_calls, time_graphs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATES = ("cold", "warm", "eager")
BEGIN = time.monotonic()
# No case begins after this time, so that what was measured is written before a machine is taken away.
SECONDS = float(os.environ.get("FUSEDPROMPT_BENCH_SECONDS", "420"))


@dataclass
class Prepared:
    """A case whose results have been checked. works: of each contender that is right, on each set of inputs."""

    case: Case
    works: dict[str, list[Work]]

    def calls(self, name: str, mode: str, sets: int = 1) -> list[Callable[[], object]]:
        """A call per set of inputs."""
        works = self.works[name]
        while len(works) < sets:
            works.append(self.case.contenders[name](len(works)))
        return [work.forward if mode == FORWARD else work.both for work in works[:sets]]


def prepare(planned: Planned) -> Iterator[Prepared]:
    """What a fixture yields."""
    if time.monotonic() - BEGIN > SECONDS:
        pytest.skip(f"not begun after {SECONDS:.0f} s")
    torch._dynamo.reset()
    case = planned.build()
    with matmul_precision(case.precision):
        right = case.check({name: make(0) for name, make in case.contenders.items()})
        yield Prepared(case, {name: [work] for name, work in right.items()})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", params=cases(DEVICE), ids=str)
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    yield from prepare(request.param)


def device_times(prepared: Prepared, mode: str, state: str) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures of each contender in a CUDA graph, and why some have none."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(64, -(-3 * cache // prepared.case.set_bytes))) if state == "cold" else 1
    graphs, left_out = {}, {}
    for name in prepared.works:
        todo = prepared.calls(name, mode, sets) * (10 if state == "warm" else 1)
        try:
            graphs[name] = (capture(todo), len(todo))
        except RuntimeError as error:  # what cannot be captured has no device time
            left_out[name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return time_graphs(graphs), left_out


def measure(benchmark: Any, prepared: Prepared, mode: str, state: str) -> None:
    """Put the figures of a row into `benchmark.extra_info`."""
    case, left_out = prepared.case, {}
    if state != "eager" and not (benchmark.disabled or torch.cuda.is_available()):
        pytest.skip("needs a GPU's graphs")
    benchmark.pedantic(prepared.calls(OURS, mode)[0], rounds=2)
    if benchmark.disabled:
        assert set(prepared.works) == set(case.contenders), case.left_out
        return
    if state == "eager":
        found = time_calls({name: prepared.calls(name, mode)[0] for name in prepared.works})
    else:
        found, left_out = device_times(prepared, mode, state)
    figures: dict[str, dict[str, float]] = {name: value.as_dict() for name, value in found.items()}
    shape = case.shape
    work, floor = shape.work[mode], shape.floor(None)[mode] * 1e3
    for figure in figures.values():
        figure["ratio"] = figure["median_ms"] / figures[OURS]["median_ms"]
        figure["share"] = floor / figure["median_ms"]
    benchmark.extra_info.update(
        group=shape.group,
        case=shape.name,
        dtype=shape.dtype,
        mode=mode,
        state=state,
        bytes=work.bytes,
        flops=work.flops,
        floor_ms=floor,
        contenders=figures,
        control=None,
        left_out={**case.left_out, **left_out},
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_gpu(benchmark: Any, prepared: Prepared, mode: str, state: str) -> None:
    measure(benchmark, prepared, mode, state)
