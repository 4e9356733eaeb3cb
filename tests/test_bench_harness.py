"""The benchmark harness: turns, figures, the correctness gate and the report. Nothing here asserts a time."""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches import _work, compare, conftest, report
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
from benches._limits import LAUNCH_SECONDS, floor_seconds, predicted_seconds
from benches._memory import peak_bytes
from benches.gpu._cases import matmul_precision


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


class Options:
    """pytest's configuration, as far as benches/conftest.py asks it."""

    def getoption(self, name: str, default: Any = None) -> Any:
        return {"--device": "cpu"}.get(name, default)


@pytest.fixture
def tf32() -> Iterator[None]:
    """The settings with which every fp32 product may be in TF32; afterwards as they were."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_truth_and_contenders_of_a_run_are_computed_without_tf32(tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes it unasked; 5e-4 away from the truth, PEFT's LSTM in fp32 would be no peer, or the truth wrong."""
    found: list[tuple[bool, bool]] = []

    def recording(name: str) -> Contender:
        watched = doubling(name)
        inner = watched.forward
        watched.forward = lambda: (found.append(flags()), inner())[1]
        return watched

    monkeypatch.setattr(torch, "set_default_device", lambda device: None)  # for the rest of this process, otherwise
    conftest.pytest_configure(Options())
    case = case_of(recording(OURS), recording(PEFT), rounds=(2, 2))
    case.truth = recording("truth")
    measure(FakeBenchmark(), check(case), FORWARD)
    assert len(found) > 5 and set(found) == {(False, False)}


def test_gpu_cases_in_tf32_allow_it_and_others_do_not(tf32: None) -> None:
    for before in (True, False):
        torch.backends.cudnn.allow_tf32 = before
        for precision, allowed in (("highest", False), ("high", True)):
            with matmul_precision(precision):
                assert flags() == (allowed, allowed)
        assert flags() == (True, before)


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


def test_measure_counts_memory_and_compares_with_the_machines_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benches._limits.copy_bandwidth", lambda: 1e3)
    monkeypatch.setattr("benches._limits.matrix_rate", lambda dtype: 1e4)
    benchmark = FakeBenchmark()
    work = {FORWARD: _work.Work(bytes=2e3, flops=5e4)}  # 2 s of copying, 5 s of multiplying
    measure(benchmark, check(case_of(doubling(OURS), doubling(PEFT), rounds=(4, 4), work=work)), FORWARD)
    info = benchmark.extra_info
    assert (info["bytes"], info["flops"], info["floor_ms"]) == (2e3, 5e4, 5e3)
    for figures in info["contenders"].values():
        assert figures["share"] == 5e3 / figures["median_ms"]
        assert figures["peak_mb"] == 28e-6  # four numbers of 4 bytes, and the factor as a tensor of 8 and of 4


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_predictions_are_the_floors_of_all_kernels_and_their_launches(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benches._limits.copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr("benches._limits.matrix_rate", lambda dtype: 8e14)
    forward = mode == FORWARD
    for least, kernels, number in (
        (_work.mlp(20, 4096, 4096, 2), _work.mlp_kernels(20, 4096, 4096, 2), 3 if forward else 6),
        (_work.splice(8, 512, 20, 4096, 2, 4), _work.splice_kernels(8, 512, 20, 4096, 2, 4), 1 if forward else 2),
        (_work.head_loss(100, 64, 1000, 2), _work.head_loss_kernels(100, 64, 1000, 2), 2 if forward else 3),
        (_work.head_loss(840, 3072, 128256, 2), _work.head_loss_kernels(840, 3072, 128256, 2), 6),
    ):
        work, parts = least[mode], kernels[mode]
        assert len(parts) == number
        assert sum(part.bytes for part in parts) >= work.bytes * (1 - 1e-12)
        # A loss of several parts makes its gradient in the forward pass.
        assert sum(part.flops for part in parts) == (least[BACKWARD] if number == 6 else work).flops
        assert predicted_seconds(parts, "bf16") >= floor_seconds(work, "bf16") + number * LAUNCH_SECONDS
    rows, vocabulary = 420, 128256
    (_, loss, _) = _work.head_loss_kernels(840, 3072, vocabulary, 2)[BACKWARD][:3]
    assert loss.bytes == 6 * rows * vocabulary  # a logit is read twice and written once


def test_peak_memory_is_what_is_held_at_once() -> None:
    def work() -> torch.Tensor:
        for _ in range(3):
            torch.empty(1000)
        kept = torch.empty(500)
        torch.empty(2000)
        return kept

    assert peak_bytes(work) == 4 * 2500


def test_work_of_attention_to_a_prefix_is_counted_one_pair_at_a_time() -> None:
    """Its kernels make the scores again, and so more products than the least."""
    batch, heads, kv_heads, length, prefix, width = sizes = (3, 4, 2, 5, 7, 8)
    seen = sum(prefix + t + 1 for t in range(length)) * batch * heads
    least, kernels = _work.prefix_attention(*sizes, 2), _work.prefix_attention_kernels(*sizes, 2)
    queries, keys = batch * heads * length * width, kv_heads * width * (prefix + batch * length)
    assert least[FORWARD] == _work.Work(2 * (2 * queries + 2 * keys) + 4 * batch * heads * length, 2 * seen * 2 * width)
    assert least[BACKWARD].flops == 7 * 2 * seen * width
    assert [len(kernels[mode]) for mode in (FORWARD, BACKWARD)] == [1, 4]
    assert sum(part.flops for part in kernels[BACKWARD]) == (2 + 3 + 4) * 2 * seen * width
    assert sum(part.bytes for part in kernels[BACKWARD]) >= least[BACKWARD].bytes


def test_least_work_of_the_ops_is_counted_by_the_formula() -> None:
    rows, width, hidden = 3, 5, 7
    mlp = _work.mlp(rows, width, hidden, itemsize=2)
    parameters = (width * hidden + hidden) + (hidden * hidden + hidden) + (hidden * width + width)
    assert mlp[FORWARD] == _work.Work(2 * (parameters + 2 * rows * width), 2 * rows * (2 * 35 + 49))
    assert mlp[BACKWARD].flops == 3 * mlp[FORWARD].flops
    lstm, module = _work.lstm(rows, width, hidden, itemsize=4), torch.nn.LSTM(width, hidden, 2, bidirectional=True)
    numbers = sum(parameter.numel() for parameter in module.parameters()) + rows * width + rows * 2 * 2 * hidden
    assert lstm[FORWARD].bytes == 4 * numbers
    matrices = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
    assert lstm[FORWARD].flops == 2 * rows * matrices


def test_a_contender_that_does_something_else_is_not_compared() -> None:
    other = doubling("other", factor=9.0)
    other.comparable = False
    assert check(case_of(doubling(OURS), other)).left_out(STEP) == {}


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


def test_the_report_shows_least_work_share_and_memory_where_they_were_measured() -> None:
    benchmark = copy.deepcopy(MLP)
    benchmark["extra_info"].update(bytes=3e6, flops=2e9, floor_ms=0.5)
    benchmark["extra_info"]["contenders"][OURS].update(share=0.25, peak_mb=1.0)
    benchmark["extra_info"]["contenders"][PEFT].update(share=0.5, peak_mb=2.5)
    machine = {**MACHINE, "limits": {"copy_gb_per_s": 12.0, "matrix_gflop_per_s": {"fp32": 34.0}}}
    text = report.render({**RESULT, "machine_info": machine, "benchmarks": [benchmark]})
    assert "copies 12 GB/s, multiplies 34 GFLOP/s in fp32" in text
    assert "3.0 MB, 2.00 GFLOP: 25%" in text and "1.0, 2.5" in text


def test_parts_of_a_run_are_merged_by_what_they_measured() -> None:
    again = copy.deepcopy(MLP)
    again["extra_info"]["rounds"] = 99
    whole = report.merged([RESULT, {**RESULT, "benchmarks": [again]}])
    assert [row.get("rounds") for row in report.rows_of(whole)] == [99, None]
    with pytest.raises(ValueError, match="one machine"):
        report.merged([RESULT, {**RESULT, "machine_info": {**MACHINE, "cpu": "other"}}])


def test_a_comparison_shows_changed_ratios_and_reads_results_without_a_schema() -> None:
    now = copy.deepcopy(RESULT)
    now["schema"] = conftest.SCHEMA
    now["benchmarks"][0]["extra_info"]["contenders"][PEFT]["ratio"] = 2.1
    del now["benchmarks"][1]
    lines = [" ".join(line.split()) for line in compare.compare(RESULT, now)]
    assert "encode MLP P=20 fp32 forward PEFT 1.05 2.10 +100.0% 2.000 2.000 +0.0%" in lines
    assert "only before: splice, B=8, fp32, forward+backward" in lines


@pytest.mark.parametrize("file", sorted(report.RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_committed_result_can_be_rendered_and_compared(file: Path) -> None:
    result = json.loads(file.read_text())
    assert report.render(result)
    assert len(compare.compare(result, result)) >= 3


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
    assert json.loads(kept.read_text()) == {**RESULT, "benchmarks": [MLP, SPLICE]}  # what was measured
    assert str(kept) in capsys.readouterr().out


def test_a_result_names_versions_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "limits", lambda: {"copy_gb_per_s": 1.0})
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
    assert output["schema"] == conftest.SCHEMA
    assert output["benchmarks"][0] == {**RESULT["benchmarks"][0], "name": "n"}


def test_operations_within_our_own_ops_are_counted() -> None:
    from benches._memory import counted_flops
    from fusedprompt import ops

    hidden, weight, labels = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(50, 8),
        torch.tensor([1, -100, 2, 3, 4, 5]),
    )
    assert counted_flops(lambda: ops.head_loss(hidden, weight, labels)) == 4 * 5 * 8 * 50
    assert counted_flops(lambda: ops.head_loss(hidden.detach(), weight, labels)) == 2 * 5 * 8 * 50
    if ops.explain("lstm", torch.zeros(1, 3, 4)).get("native") == "runs":
        weights = [torch.randn(*shape, requires_grad=True) for shape in ((20, 4), (20, 5), (20,), (20,))]
        forward = 2 * 3 * (20 * 4 + 20 * 5)
        work = lambda: ops.lstm(torch.zeros(1, 3, 4), weights, num_layers=1, bidirectional=False).sum().backward()  # noqa: E731
        assert counted_flops(work) == 3 * forward
