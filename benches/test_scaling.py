"""Time against size, ours and the peer's, with the floor: `make bench-scaling`; benches/pictures.py draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from . import _work, test_bench_encode, test_bench_lstm, test_bench_shared, test_bench_splice
from ._interleave import BACKWARD, STEP, Case, measure


@dataclass(frozen=True)
class Curve:
    """x: the name of the size that grows, and its values. build: gives the case of a value. seconds: for each."""

    name: str
    x: str
    values: tuple[int, ...]
    build: Callable[[int], Case]
    mode: str = BACKWARD
    seconds: float = 1.0


def _mlp(rows: int, width: int) -> Case:
    return test_bench_encode.build("MLP", rows, width, width, "fp32", compile_too=False)


def _lstm(rows: int, hidden: int) -> Case:
    case = test_bench_lstm.build(rows, 768, hidden, "fp32")
    case.work = _work.lstm(rows, 768, hidden, 4)
    return case


def _splice(tokens: int) -> Case:
    return test_bench_splice.build(max(1, tokens // 256), min(tokens, 256), 20, 768, compile_too=False)


CURVES = [
    Curve("MLP encoder, D = H = 1024", "prompt rows P", (8, 16, 32, 64, 128, 256, 512), lambda p: _mlp(p, 1024)),
    Curve("MLP encoder, P = 20", "width D = H", (512, 1024, 2048, 4096, 8192), lambda d: _mlp(20, d)),
    Curve("splice, P = 20, D = 768", "tokens B * T", (64, 256, 1024, 4096, 16384), _splice),
    Curve("LSTM, D = 768, H = 512", "prompt rows P", (8, 16, 32, 64, 128, 256), lambda p: _lstm(p, 512)),
    Curve("LSTM, P = 20, D = 768", "hidden size H", (128, 256, 512, 1024, 2048), lambda h: _lstm(20, h)),
    Curve(
        *("training step, B = 4, T = 128", "virtual tokens N", (8, 25, 50, 100, 200, 400)),
        *(lambda n: test_bench_shared.build_step(4, n, 128, all_peers=False), STEP, 6.0),
    ),
    Curve(
        *("training step, N = 100, T = 64", "rows B", (1, 2, 4, 8, 16)),
        *(lambda b: test_bench_shared.build_step(b, 100, 64, all_peers=False), STEP, 6.0),
    ),
]


@pytest.fixture(
    scope="module",
    params=[(curve, value) for curve in CURVES for value in curve.values],
    ids=lambda param: f"{param[0].name} {param[0].x} {param[1]}".replace(" ", "-"),
)
def point(request: pytest.FixtureRequest) -> Iterator[tuple[Curve, int, Case]]:
    curve, value = request.param
    case = curve.build(value)
    case.seconds, case.rounds = curve.seconds, (4, 60)
    yield curve, value, case


def test_scaling(benchmark: Any, point: tuple[Curve, int, Case]) -> None:
    curve, value, case = point
    measure(benchmark, case, curve.mode)
    benchmark.extra_info.update(group=f"scaling: {curve.name}", x=curve.x, value=value)
