"""The benchmark harness: turns, figures, the correctness gate and the report. Nothing here asserts a time."""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches import conftest, report
from benches._interleave import (
    AGAIN,
    BACKWARD,
    COMPILED,
    FORWARD,
    OURS,
    PEFT,
    STEP,
    Case,
    Contender,
    Race,
    _round_count,
    check,
    measure,
    order,
    summary,
)


class FakeBenchmark:
    """pytest-benchmark's fixture, as far as the harness uses it."""

    def __init__(self, disabled: bool = False) -> None:
        self.disabled = disabled
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target: Any, *, setup: Any, teardown: Any, rounds: int, iterations: int) -> None:
        assert iterations == 1
        if self.disabled:
            setup()
            target()
            return
        for _ in range(rounds):
            setup()
            target()
            teardown()
            self.rounds += 1


def doubling(name: str, log: Any = None, factor: float = 2.0, gradient: float | None = 1.0) -> Contender:
    """A contender that computes factor * weight; its backward leaves `gradient` times the gradient, or none."""
    weight = torch.nn.Parameter(torch.arange(1.0, 5.0))
    log = [] if log is None else log

    def forward() -> torch.Tensor:
        log.append(name)
        return weight * factor

    def backward(rows: torch.Tensor) -> None:
        rows.sum().backward()
        weight.grad = None if gradient is None else weight.grad * gradient

    return Contender(
        name,
        forward=forward,
        backward=backward,
        outputs=lambda rows: {"rows": rows},
        parameters={"weight": weight},
        update=lambda: log.append(f"{name} update"),
    )


def run_rounds(race: Race, count: int) -> None:
    for _ in range(count):
        race.before()
        race.ours()
        race.after()


def case_of(*contenders: Contender, **fields: Any) -> Case:
    fields = {"tolerance": (1e-6, 1e-6), "seconds": 0.0, **fields}
    return Case("g", "c", "fp32", list(contenders), doubling("truth"), **fields)


def test_two_contenders_go_a_b_b_a() -> None:
    turns = [turn for index in range(4) for turn in order(index, 2)]
    assert turns == [0, 1, 1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_contender_stands_at_every_place_twice_in_a_cycle(count: int) -> None:
    rounds = [order(index, count) for index in range(2 * count)]
    assert all(sorted(turns) == list(range(count)) for turns in rounds)
    for place in range(count):
        assert Counter(turns[place] for turns in rounds) == dict.fromkeys(range(count), 2)


def test_a_race_takes_turns_in_the_order_of_its_rounds() -> None:
    log: list[str] = []
    race = Race([doubling(OURS, log), doubling(PEFT, log), doubling(COMPILED, log)], FORWARD)
    run_rounds(race, 6)
    assert log == [(OURS, PEFT, COMPILED)[turn] for index in range(6) for turn in order(index, 3)]
    assert [len(seconds) for seconds in race.seconds] == [6, 6, 6]


def test_a_turn_gives_its_memory_back_before_the_next_one_starts() -> None:
    contenders = [doubling(OURS), doubling(PEFT)]
    held: list[bool] = []
    for contender in contenders:
        inner = contender.forward

        def watched(inner: Any = inner) -> Any:
            held.append(any(other.parameters["weight"].grad is not None for other in contenders))
            held.append(race._result is not None)
            return inner()

        contender.forward = watched
    race = Race(contenders, BACKWARD)
    run_rounds(race, 2)
    assert held == [False] * 8


def test_a_step_updates_after_its_backward() -> None:
    log: list[str] = []
    contender = doubling(OURS, log)
    contender.work(STEP)()
    assert log == [OURS, f"{OURS} update"]
    assert contender.parameters["weight"].grad is not None


def test_summary_gives_milliseconds() -> None:
    figures = summary([0.005, 0.001, 0.003, 0.002, 0.004, 0.006])
    assert figures == pytest.approx({"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0})


def test_round_counts_are_whole_cycles_within_bounds() -> None:
    case = case_of(doubling(OURS), seconds=2.0, rounds=(4, 120))
    assert _round_count(0.1, case, 3) == 18
    assert _round_count(1e-6, case, 4) == 120
    assert _round_count(10.0, case, 4) == 4
    assert _round_count(0.4, case, 4) == 4


def test_the_gate_passes_equal_results() -> None:
    case = check(case_of(doubling(OURS), doubling(PEFT)))
    assert case.left_out(FORWARD) == case.left_out(BACKWARD) == {}
    assert all(contender.parameters["weight"].grad is None for contender in case.contenders)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (doubling(OURS, factor=2.1), "fusedprompt: output rows is 0.05 away"),
        (doubling(OURS, gradient=3.0), "fusedprompt: gradient of weight is 2 away"),
        (doubling(OURS, gradient=float("nan")), "fusedprompt: gradient of weight is inf away"),
        (doubling(OURS, gradient=None), "fusedprompt: gradient of weight is inf away"),
        (doubling(PEFT, factor=2.1), "PEFT: output rows is 0.05 away"),
    ],
)
def test_the_gate_fails_wrong_results(wrong: Contender, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(case_of(wrong))


def test_a_peer_that_may_err_loses_only_the_figures_that_are_wrong() -> None:
    peer = doubling(PEFT, gradient=3.0)
    case = check(case_of(doubling(OURS), peer, peers_may_err="known to be wrong"))
    assert case.left_out(FORWARD) == {}
    assert "known to be wrong" in case.left_out(BACKWARD)[PEFT]
    with pytest.raises(AssertionError, match="fusedprompt"):
        check(case_of(doubling(OURS, gradient=3.0), peers_may_err="known to be wrong"))


def test_a_peer_that_refuses_is_left_out_with_the_reason() -> None:
    def refuse() -> Any:
        raise LookupError("no C++ compiler\nand more")

    peer = doubling(COMPILED)
    peer.forward = refuse
    with pytest.raises(LookupError):
        check(case_of(doubling(OURS), peer))
    peer.refusals = (LookupError,)
    case = check(case_of(doubling(OURS), peer))
    assert case.left_out(FORWARD) == case.left_out(STEP) == {COMPILED: "cannot run: no C++ compiler"}
    objector = doubling(COMPILED)
    objector.objection = lambda: "not what it seems"
    assert check(case_of(doubling(OURS), objector)).left_out(FORWARD) == {COMPILED: "not what it seems"}


def test_measure_writes_every_contenders_figures() -> None:
    benchmark = FakeBenchmark()
    contenders = (doubling(OURS), doubling(PEFT), doubling(COMPILED, gradient=3.0), doubling(AGAIN))
    case = check(case_of(*contenders, rounds=(6, 6), peers_may_err="wrong"))
    measure(benchmark, case, BACKWARD)
    info = benchmark.extra_info
    assert (info["group"], info["case"], info["dtype"], info["mode"]) == ("g", "c", "fp32", BACKWARD)
    assert info["rounds"] == benchmark.rounds == 6
    assert set(info["contenders"]) == {OURS, PEFT, AGAIN}
    assert set(info["left_out"]) == {COMPILED}
    medians = {name: figures["median_ms"] for name, figures in info["contenders"].items()}
    assert info["contenders"][PEFT]["ratio"] == medians[PEFT] / medians[OURS]
    assert info["control"] == medians[AGAIN] / medians[PEFT]
    assert gc.isenabled()
    json.dumps(info)


def test_measure_times_nothing_when_benchmarks_are_disabled() -> None:
    benchmark = FakeBenchmark(disabled=True)
    measure(benchmark, check(case_of(doubling(OURS), doubling(PEFT))), FORWARD)
    assert benchmark.extra_info == {}


def row(group: str, case: str, mode: str, ratios: dict[str, float], **fields: Any) -> dict[str, Any]:
    """A benchmark of a result; ours takes 2 ms."""
    contenders = {
        name: {"median_ms": 2.0 * ratio, "p20_ms": 1.8 * ratio, "p80_ms": 2.5 * ratio, "ratio": ratio}
        for name, ratio in ratios.items()
    }
    return {"extra_info": dict(group=group, case=case, dtype="fp32", mode=mode, contenders=contenders, **fields)}


MACHINE = {
    "cpu": "Example(R) Chip 9000",
    "cpu_capability": "AVX2",
    "cpus": 4,
    "threads": 2,
    "system": "Linux x86_64",
    "python": "3.12.1",
    "versions": {"torch": "9.9", "peft": "8.8"},
}
MLP = row("encode", "MLP P=20", FORWARD, {OURS: 1.0, PEFT: 1.05, COMPILED: 2.5, AGAIN: 0.945}, control=0.9, left_out={})
SPLICE = row("splice", "B=8", BACKWARD, {OURS: 1.0, PEFT: 8.0}, control=None, left_out={COMPILED: "cannot run: why"})
RESULT: dict[str, Any] = {
    "machine_info": MACHINE,
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "datetime": "2020-01-02T03:04:05.678+00:00",
    "benchmarks": [MLP, SPLICE, {"extra_info": {}}],
}


def test_the_report_has_a_table_per_group() -> None:
    text = report.render(RESULT)
    lines = text.splitlines()
    assert lines[0] == "Machine:  Example(R) Chip 9000 (AVX2), 2 threads on 4 CPUs, Linux x86_64"
    assert lines[1] == "Software: python 3.12.1, torch 9.9, peft 8.8"
    assert lines[2] == "Date:     2020-01-02T03:04:05, commit 0123456789ab"
    assert "PEFT 8.8" in lines[3]
    encode = next(line for line in lines if line.startswith("MLP P=20"))
    # A ratio of 1.05 means nothing where PEFT against itself gives 0.90.
    assert " ".join(encode.split()) == "MLP P=20 fp32 forward 2.000 1.800 2.500 2.100 ~1.05 5.000 2.50 0.90"
    splice = next(line for line in lines if line.startswith("B=8"))
    assert " ".join(splice.split()) == "B=8 fp32 forward+backward 2.000 1.800 2.500 16.0 8.00 - - -"
    assert "no figure for PEFT compiled in 1 row: cannot run: why" in lines
    assert lines[-1] == "PEFT against itself: 0.90 in the median of 1 rows, from 0.90 to 0.90."


def test_a_result_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="expected benchmarks with measured contenders"):
        report.render({**RESULT, "benchmarks": [{"extra_info": {}}]})


def test_the_command_prints_and_saves_by_the_machines_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RESULT))
    report.main([str(file)])
    assert capsys.readouterr().out == report.render(RESULT) + "\n"
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.main([str(file), "--save"])
    kept = tmp_path / "results" / "example-chip-9000-2-threads.json"
    assert json.loads(kept.read_text()) == RESULT
    assert str(kept) in capsys.readouterr().out


def test_a_result_names_versions_and_not_the_host() -> None:
    machine: dict[str, Any] = {"node": "secret-host"}
    conftest.pytest_benchmark_update_machine_info(None, machine)
    assert "secret-host" not in str(machine)
    assert set(machine["versions"]) == set(conftest.PACKAGES)
    assert machine["threads"] == torch.get_num_threads()


def test_a_result_keeps_figures_and_leaves_out_single_times() -> None:
    output = copy.deepcopy(RESULT)
    output["commit_info"].update(branch="b", project="p")
    output["benchmarks"][0].update(stats={"data": [1.0]}, name="n")
    conftest.pytest_benchmark_update_json(None, None, output)
    assert output["commit_info"] == RESULT["commit_info"]
    assert output["benchmarks"][0] == {**RESULT["benchmarks"][0], "name": "n"}
