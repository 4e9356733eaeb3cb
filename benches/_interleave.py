"""Measure implementations of the same work against each other, interleaved in one process.

A round gives each contender one turn. Rounds go A B C | C B A | B C A | A C B | C A B | B A C and so on: over 2n rounds
of n contenders each has stood twice at every place. With a fixed order, the one that runs first in a round would always
get its memory from the pages that the last one gave back; PEFT's LSTM encoder against itself came out at 2.4x that way.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ._limits import floor_seconds, synchronize
from ._memory import peak_bytes
from ._work import BACKWARD, STEP, Work
from ._work import FORWARD as FORWARD  # with the other names of this module, for the benchmarks

OURS, PEFT, COMPILED, AGAIN = "fusedprompt", "PEFT", "PEFT compiled", "PEFT again"


@dataclass
class Contender:
    """One implementation of the work of a case.

    forward: runs with gradients enabled; its result goes to the other functions.
    backward: leaves gradients in `parameters`.
    outputs: the tensors of a result that must agree between contenders, by name.
    update: the optimizer's step, for `STEP`.
    refusals: exceptions that say it cannot run here, which costs it its figures; any other fails the case.
    objection: asked after its first run, a reason to give it no figures.
    comparable: False where it does something else by design, so that there is nothing to compare.
    """

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], None]
    outputs: Callable[[Any], dict[str, Tensor]]
    parameters: dict[str, Tensor]
    update: Callable[[], None] | None = None
    refusals: tuple[type[Exception], ...] = ()
    objection: Callable[[], str | None] = lambda: None
    comparable: bool = True

    def work(self, mode: str) -> Callable[[], Any]:
        """What one turn times: `BACKWARD` (with its forward), `STEP` (both, and the update), else the forward."""
        if mode not in (BACKWARD, STEP):
            return self.forward
        update = self.update if mode == STEP else None
        assert mode == BACKWARD or update is not None

        def forward_and_backward() -> Any:
            result = self.forward()
            self.backward(result)
            if update is not None:
                update()
            return result  # so that it is not freed in time that counts

        return forward_and_backward

    def clear(self) -> None:
        """Give the gradients' memory back. Never timed."""
        for parameter in self.parameters.values():
            parameter.grad = None


@dataclass
class Case:
    """The same work done by several contenders; the first is ours.

    group, name: table and row of the report. dtype: "fp32" or "bf16".
    truth: done by neither of them where possible: PEFT in fp64.
    tolerance: largest relative error (Frobenius norm) of outputs and of gradients.
    peers_may_err: why a peer may be wrong here, which costs it its figures; else a wrong peer fails the case.
    work: the least that must be done, by mode.
    seconds: time to spend on a mode's rounds, within `rounds` (fewest, most).
    """

    group: str
    name: str
    dtype: str
    contenders: list[Contender]
    truth: Contender
    tolerance: tuple[float, float]
    peers_may_err: str = ""
    work: dict[str, Work] = field(default_factory=dict)
    seconds: float = 1.5
    rounds: tuple[int, int] = (8, 120)
    wrong_outputs: dict[str, str] = field(default_factory=dict)
    wrong_gradients: dict[str, str] = field(default_factory=dict)

    def left_out(self, mode: str) -> dict[str, str]:
        """Contenders without a figure, with the reason."""
        return {**self.wrong_gradients, **self.wrong_outputs} if mode in (BACKWARD, STEP) else self.wrong_outputs


def order(index: int, count: int) -> list[int]:
    """Who takes each turn of round `index`: 0 1 2, then 2 1 0, then 1 2 0, then 0 2 1, ..."""
    first = index // 2 % count
    turns = [(first + turn) % count for turn in range(count)]
    return turns[::-1] if index % 2 else turns


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile of at least two times, in milliseconds."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p20_ms": p20 * 1e3,
        "p80_ms": p80 * 1e3,
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Frobenius norm, in fp64; absolute where the truth is zero."""
    exact = truth.detach().double()
    difference = (value.detach().double().reshape(exact.shape) - exact).norm()
    size = exact.norm()
    return float(difference / size if size > 0 else difference)


def _worst(values: Mapping[str, Tensor | None], truths: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative error and the name of the tensor that has it; names must be the same on both sides."""
    if set(values) != set(truths):
        return float("inf"), f"names {sorted(set(values) ^ set(truths))}"
    errors = []
    for name, truth in truths.items():
        value = values[name]
        if value is None or truth is None:
            errors.append((0.0 if value is truth else float("inf"), name))
        else:
            error = relative_error(value, truth)
            errors.append((error if error == error else float("inf"), name))  # NaN counts as wrong
    return max(errors, default=(0.0, "none"))


def _run(contender: Contender) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    contender.clear()
    result = contender.forward()
    outputs = {name: value.detach() for name, value in contender.outputs(result).items()}
    contender.backward(result)
    gradients = {name: parameter.grad for name, parameter in contender.parameters.items()}
    contender.clear()
    return outputs, gradients


def check(case: Case) -> Case:
    """Compare every contender with the truth; there is no figure without a correct result.

    A contender that cannot run, or one that errs where it may, goes to the case's lists of those left out.

    Raises:
        AssertionError: a result is wrong; the message names contender, tensor and error.
    """
    outputs, gradients = _run(case.truth)
    for contender in case.contenders:
        try:
            own_outputs, own_gradients = _run(contender)
        except contender.refusals as error:
            text = str(error).strip() or type(error).__name__
            case.wrong_outputs[contender.name] = f"cannot run: {text.splitlines()[0]}"
            continue
        if reason := contender.objection():
            case.wrong_outputs[contender.name] = reason
            continue
        if not contender.comparable:
            continue
        found = (_worst(own_outputs, outputs), _worst(own_gradients, gradients))
        lists = (case.wrong_outputs, case.wrong_gradients)
        for kind, (error, name), limit, wrong in zip(("output", "gradient of"), found, case.tolerance, lists):
            if error <= limit:
                continue
            message = f"{kind} {name} is {error:.2g} away from the truth (tolerance {limit:.0e})"
            if contender.name == OURS or not case.peers_may_err:
                raise AssertionError(f"{case.group} {case.name} {case.dtype}: {contender.name}: {message}")
            wrong[contender.name] = f"{message}: {case.peers_may_err}"
    return case


class Race:
    """The turns of one case in one mode. pytest-benchmark times ours; `before` and `after` hold the peers' turns."""

    def __init__(self, contenders: Sequence[Contender], mode: str) -> None:
        assert contenders[0].name == OURS
        self.contenders = contenders
        self.work = [contender.work(mode) for contender in contenders]
        self.seconds: list[list[float]] = [[] for _ in contenders]
        self.round = 0
        self._result: Any = None

    def start(self, index: int) -> None:
        """The timed part of a contender's turn. The result lives until `finish`, so that freeing it is not timed."""
        work = self.work[index]
        synchronize()
        begin = time.perf_counter()
        self._result = work()
        synchronize()
        self.seconds[index].append(time.perf_counter() - begin)

    def finish(self, index: int) -> None:
        """The rest of the turn: give everything back that was allocated."""
        self._result = None
        self.contenders[index].clear()

    def ours(self) -> None:
        self.start(0)

    def before(self) -> None:
        gc.collect()
        turns = order(self.round, len(self.contenders))
        self.turns(turns[: turns.index(0)])

    def after(self) -> None:
        self.finish(0)
        turns = order(self.round, len(self.contenders))
        self.turns(turns[turns.index(0) + 1 :])
        self.round += 1

    def turns(self, turns: Sequence[int]) -> None:
        for index in turns:
            self.start(index)
            self.finish(index)


def _round_count(seconds_per_round: float, case: Case, count: int) -> int:
    """A whole number of cycles of 2 rounds per contender where time allows, else a whole number of A B | B A."""
    fewest, most = case.rounds
    wanted = min(most, max(fewest, case.seconds / seconds_per_round))
    cycle = 2 * count if wanted >= 2 * count else 2
    return max(2, int(wanted) // cycle * cycle)


def measure(benchmark: Any, case: Case, mode: str) -> None:
    """Time a checked case and put every contender's figures into `benchmark.extra_info`: benches/README.md, "The file".

    benchmark: pytest-benchmark's fixture; its own statistics are ours. With --benchmark-disable nothing is timed.
    """
    left_out = case.left_out(mode)
    contenders = [contender for contender in case.contenders if contender.name not in left_out]
    race = Race(contenders, mode)
    gc.collect()
    gc.freeze()  # so that collecting between rounds costs next to nothing
    gc.disable()
    try:
        race.turns(range(len(contenders)))  # `check` has run them once, so this tells how long a round takes
        rounds = _round_count(sum(map(sum, race.seconds)), case, len(contenders))
        race.seconds = [[] for _ in contenders]
        benchmark.pedantic(race.ours, setup=race.before, teardown=race.after, rounds=rounds, iterations=1)
    finally:
        gc.enable()
        gc.unfreeze()
    if benchmark.disabled:
        return
    figures = {contender.name: summary(seconds) for contender, seconds in zip(contenders, race.seconds)}
    medians = {name: figure["median_ms"] for name, figure in figures.items()}
    work = case.work.get(mode)
    floor = floor_seconds(work, case.dtype) * 1e3 if work else None
    for contender, figure in zip(contenders, figures.values()):
        figure["ratio"] = figure["median_ms"] / medians[OURS]
        figure["peak_mb"] = peak_bytes(contender.work(mode)) / 1e6
        contender.clear()
        if floor is not None:
            figure["share"] = floor / figure["median_ms"]
    benchmark.extra_info.update(
        group=case.group,
        case=case.name,
        dtype=case.dtype,
        mode=mode,
        rounds=rounds,
        bytes=work.bytes if work else None,
        flops=work.flops if work else None,
        floor_ms=floor,
        contenders=figures,
        control=medians[AGAIN] / medians[PEFT] if AGAIN in medians and PEFT in medians else None,
        left_out=left_out,
    )
