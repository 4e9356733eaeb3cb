"""Pairs that differ in one thing, in turns: what a choice gains that was made without a GPU. Part of again.sh.

"fusedprompt" is the choice, the other contender what it was chosen over. Both must be right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from fusedprompt.ops.mlp import triton as mlp
from fusedprompt.ops.splice import triton as splice

from .._work import BACKWARD, FORWARD
from ._cases import OURS, Case, Planned, Work, lstm_case, mlp_case, splice_case
from .test_bench_gpu import DEVICE, Prepared, measure, prepare


@contextlib.contextmanager
def no_early_launch() -> Iterator[None]:
    """Without programmatic dependent launch: each kernel begins when the one before it has ended."""
    with (
        mock.patch.object(mlp, "supports_pdl", lambda _: False),
        mock.patch.object(splice, "supports_pdl", lambda _: False),
    ):
        yield


@contextlib.contextmanager
def table_rows_evicted() -> Iterator[None]:
    launches = functools.cache(splice._forward_launch.__wrapped__)
    with (
        mock.patch.object(splice, "TABLE_POLICY", "evict_first"),
        mock.patch.object(splice, "_forward_launch", launches),
    ):
        yield


def variant(name: str) -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, FUSEDPROMPT_LSTM_VARIANT=name)


@dataclass
class Switched(Work):
    """Work that is done while `switch` is entered."""

    switch: Callable[[], AbstractContextManager[Any]]

    def __post_init__(self) -> None:
        forward = self.forward

        def switched() -> Tensor:
            with self.switch():
                return forward()

        self.forward = switched

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self.switch():
            return super().both()


def pair(case: Case, question: str, **switches: Callable[[], AbstractContextManager[Any]]) -> Case:
    """The case with ours as it is, and ours under each switch, as its only contenders."""
    ours = case.contenders[OURS]
    case.contenders = {OURS: ours}
    for name, switch in switches.items():

        def make(index: int, switch: Any = switch) -> Work:
            work = ours(index)
            return Switched(work.forward, work.parameters, work.d_out, switch)

        case.contenders[name.replace("_", " ")] = make
    case.shape = dataclasses.replace(case.shape, group=f"pairs: {question}")
    return case


def pairs() -> Iterator[Planned]:
    """At full size on a GPU, else at toy sizes."""
    on_gpu = DEVICE.type == "cuda"

    def early_launch(function: Any, *arguments: Any) -> Planned:
        return Planned(
            "-".join(map(str, ("early-launch", function.__name__, *arguments))),
            lambda: pair(function(*arguments, DEVICE), "programmatic dependent launch", without=no_early_launch),
        )

    def table_rows(*arguments: int) -> Planned:
        return Planned(
            "-".join(map(str, ("table-rows", *arguments))),
            lambda: pair(splice_case(*arguments, DEVICE), "table rows kept in L2", evicted_first=table_rows_evicted),
        )

    def variants(*arguments: Any) -> Planned:
        switches = {name: functools.partial(variant, name) for name in ("S", "M", "L", "STREAM")}
        return Planned(
            "-".join(map(str, ("lstm-variants", *arguments))),
            lambda: pair(lstm_case(*arguments, DEVICE), "variant of the LSTM against the planner's", **switches),
        )

    yield early_launch(mlp_case, *((20, 4096) if on_gpu else (5, 16)), "bf16")
    yield table_rows(*((32, 2048, 4096) if on_gpu else (2, 6, 32)))
    yield variants(*((100, 1024, 1024) if on_gpu else (5, 16, 24)), "bf16")
    yield early_launch(splice_case, *((8, 512, 4096) if on_gpu else (2, 6, 32)))
    if on_gpu:
        yield variants(20, 768, 256, "bf16")
        yield table_rows(8, 512, 4096)
        yield early_launch(mlp_case, 20, 768, "bf16")
        yield variants(50, 3072, 3072, "bf16")


@pytest.fixture(scope="module", params=pairs(), ids=str)
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    yield from prepare(request.param)


# On a GPU not from Python, where a switch itself takes tens of microseconds.
@pytest.mark.parametrize("state", ["cold", "warm"] if DEVICE.type == "cuda" else ["eager"])
@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_pair(benchmark: Any, prepared: Prepared, mode: str, state: str) -> None:
    measure(benchmark, prepared, mode, state)
