"""The scripts that meet a GPU first, on a machine without one: what is left of them when they are killed, and that
neither a failure nor a process that hangs stops them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches import _rows, report
from benches.gpu.keep import failed

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = Path(__file__).parent / "gpu_stand_ins"
LINE = re.compile(
    r" *\d+ s  (\S+) +(begun, has \d+ s|ok, \d+ s|FAILED: .+|skipped: .+"
    r"|did not work: .+|every step is ok|stopped by a signal)\n"
)

STEPS = [
    *("build", "probe", "warm-up", "doctor", "small-lstm-S", "small-lstm-M", "small-lstm-STREAM", "small-lstm-L"),
    *("test-ops", "test-lstm", "bench-first", "metamath-prompt-tuning-N=200"),
    *("test-machinery", "test-lstm-large", "test-two-streams"),
    *("metamath-P-tuning-MLP-N=20", "metamath-P-tuning-LSTM-N=50", "test-compile", "bench-rest"),
]

# In place of Python: writes down how it is called, and measures rows, 10 ms each, through what the benchmarks use.
PYTHON = f"""#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
  *benches.gpu.keep\\ /*) exec {sys.executable} "$@" ;;
esac
case "$*" in
  *${{HANGS:-nothing at all}}*) trap '' TERM; while :; do sleep 0.1; done ;;
  *${{FAILS:-nothing at all}}*) exit 3 ;;
  *--rows*) ;;
  *) exit 0 ;;
esac
while [ "$1" != --rows ]; do shift; done
exec {sys.executable} -c '
import sys, time
from pathlib import Path
from benches._rows import append
for index in range(100):
    append(Path(sys.argv[1]), dict(row=index, text="x" * 3000))
    time.sleep(0.01)
' "$2"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    path = os.pathsep.join([str(STAND_INS), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "PATIENCE": "1"}


def steps_of(out: Path) -> dict[str, list[str]]:
    """What summary.txt says of each step, in order; each of its lines is whole."""
    found: dict[str, list[str]] = {}
    for line in (out / "summary.txt").read_text().splitlines(keepends=True):
        match = LINE.fullmatch(line)
        assert match, line
        found.setdefault(match[1], []).append(match[2])
    return found


def has_begun(step: str, out: Path) -> bool:
    summary = out / "summary.txt"
    return summary.exists() and f"  {step} " in summary.read_text()


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benches" / "gpu" / script), *map(str, arguments)]
    # Or pytest-benchmark would take the script's pytest for a worker of this one, and measure nothing.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")


def processes_of(session: int) -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            yield int(status.parent.name)


@pytest.mark.parametrize("point", ["build", "doctor", "small-lstm-M", "test-lstm", "bench-first"])
def test_first_contact_keeps_what_it_learnt_when_it_is_killed(
    point: str, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    environment["HANGS"] = {
        "build": "setup.py",
        "doctor": "doctor",
        "small-lstm-M": "lstm-M",
        "test-lstm": "test_lstm_cuda.py",
        "bench-first": "nothing at all",
    }[point]
    command = [str(ROOT / "benches" / "gpu" / "first.sh"), str(out)]
    script = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    rows = out / "bench.jsonl"
    try:
        for _ in range(600):
            time.sleep(0.1)
            if has_begun(point, out) and (
                point != "bench-first" or (rows.exists() and rows.read_text().count("\n") > 5)
            ):
                break
        else:
            pytest.fail(f"{point} never began")
        assert script.poll() is None
    finally:
        while left := [script.pid, *processes_of(script.pid)][script.poll() is not None :]:
            for process in left:  # the script first
                os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
    steps = steps_of(out)
    unfinished = [name for name, said in steps.items() if len(said) == 1]
    assert point in unfinished and "script" not in steps
    assert all(said[0].startswith("begun") for said in steps.values())
    together = {"build": {"probe", "warm-up"}, "small-lstm-M": {"small-lstm-S", "small-lstm-STREAM", "small-lstm-L"}}
    assert set(unfinished) <= {point} | together.get(point, set())
    assert all(said[1].startswith("ok") for name, said in steps.items() if name not in unfinished)
    if point == "bench-first":
        text = rows.read_text()
        assert [json.loads(line)["row"] for line in text.splitlines()] == list(range(text.count("\n")))
        assert text.endswith("\n")
    assert len(list(out.iterdir())) <= 8


def test_a_signal_that_asks_first_contact_to_stop_ends_what_it_started(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [str(ROOT / "benches" / "gpu" / "first.sh"), str(out)]
    script = subprocess.Popen(
        command, env={**environment, "HANGS": "doctor"}, start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not has_begun("doctor", out):
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait() == 143
    while list(processes_of(script.pid)):  # the one that hangs ignores SIGTERM, and is killed a second later
        time.sleep(0.1)
    steps = steps_of(out)
    assert len(steps["doctor"]) == 1 and steps["script"] == ["stopped by a signal"]


def test_first_contact_stops_neither_at_failures_nor_at_what_hangs(environment: dict[str, str], tmp_path: Path) -> None:
    """test_ops.py and test_machinery.py hang and ignore SIGTERM. The first gets what two thirds of 24 s leave, and the
    numbers keep their time; after the second nothing is left."""
    out = tmp_path / "out"
    first = run(
        "first.sh",
        out,
        **environment,
        FAILS="fusedprompt doctor",
        HANGS="tests/gpu/test_[om]",
        BUDGET="24",
    )
    steps = steps_of(out)
    assert first.returncode == 1 and steps["doctor"][1].startswith("FAILED: status 3")
    assert steps["small-lstm-S"][1].startswith("ok")
    assert steps["test-ops"][1].startswith("FAILED: killed")
    assert steps["test-lstm"] == ["skipped: 16 s are over"]
    assert steps["bench-first"][1].startswith("ok") and steps["metamath-prompt-tuning-N=200"][1].startswith("ok")
    assert steps["test-machinery"][1].startswith("FAILED: killed")
    skipped = STEPS[STEPS.index("test-machinery") + 1 :]
    assert all(steps[name] == ["skipped: 24 s are over"] for name in skipped)
    failed_first = ["doctor", "test-ops", "test-lstm", "test-machinery"]
    assert steps["script"] == [f"did not work: {' '.join([*failed_first, *skipped])}"]


def test_first_contact_runs_each_step_with_files_that_exist(environment: dict[str, str], tmp_path: Path) -> None:
    first = run("first.sh", tmp_path / "out", **environment)
    assert first.returncode == 0, first.stdout + first.stderr
    steps = steps_of(tmp_path / "out")
    assert steps.pop("script") == ["every step is ok"] and list(steps) == STEPS
    calls = Path(environment["CALLS"]).read_text().splitlines()
    named = {word for call in calls for word in re.findall(r"(?:benches|tests)/[\w/]+\.py", call)}
    assert {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")} < named
    assert all((ROOT / path).exists() for path in named)
    tests = [call for call in calls if "tests/gpu" in call]
    assert len(tests) == 6 and all("--timeout-method thread" in call and "--keep" in call for call in tests)
    assert sum("--rows" in call for call in calls) == 5
    *others, compiles = [call for call in tests if "test_machinery" in call or "test_lstm_cuda" in call]
    assert "--timeout 80" in compiles and compiles.endswith("-k compile")  # a cold compiler needs longer than a test
    assert all("--timeout 60" in call and ("compile" in call) is ("not " in call) for call in others)


def test_tests_that_failed_or_hung_are_run_again_by_id(environment: dict[str, str], tmp_path: Path) -> None:
    lines = [
        *(
            {"test": f"tests/gpu/test_a.py::{name}", "outcome": "begun"}
            for name in ("good", "bad[1, 2]", "hung", "torn")
        ),
        {"test": "tests/gpu/test_a.py::good", "outcome": "passed"},
        {"test": "tests/gpu/test_a.py::bad[1, 2]", "outcome": "failed"},
        {"test": "tests/gpu/test_a.py::torn", "outcome": "passed"},
        {"test": "tests/gpu/test_a.py::torn", "outcome": "failed"},
        {"test": "benches/gpu/test_b.py::bad", "outcome": "failed"},
        {"test": "tests/gpu/test_a.py::lost", "outcome": "begun"},
        {"test": "tests/gpu/test_a.py::lost", "outcome": "skipped", "message": "Skipped: the device is lost since bad"},
        {"test": "tests/gpu/test_a.py::skipped", "outcome": "begun"},
        {"test": "tests/gpu/test_a.py::skipped", "outcome": "skipped", "message": "Skipped: needs two GPUs"},
        {"test": "tests/gpu/test_a.py::last", "outcome": "begun"},
        {"test": "tests/gpu/test_a.py::last", "outcome": "failed"},
    ]
    order = ("waits", "good", "bad[1, 2]", "hung", "torn", "lost", "skipped", "last")
    lines = [*({"test": f"tests/gpu/test_a.py::{name}", "outcome": "collected"} for name in order), *lines]
    for line in lines:
        _rows.append(tmp_path / "tests.jsonl", line)
    with (tmp_path / "tests.jsonl").open("a") as file:
        file.write('{"test": "tests/gpu/test_a.py::go')  # killed while it wrote
    assert len(failed(_rows.read(tmp_path / "tests.jsonl"))) == 7
    again = run("again.sh", tmp_path, tmp_path / "out", **environment)
    assert again.returncode == 0, again.stdout + again.stderr
    (call,) = [line for line in Path(environment["CALLS"]).read_text().splitlines() if "test_a.py" in line]
    assert call.endswith(
        " ".join(f"tests/gpu/test_a.py::{name}" for name in ("bad[1, 2]", "hung", "torn", "last", "waits", "lost"))
    )
    assert "--timeout-method thread" in call and "-n 3" in call
    steps = steps_of(tmp_path / "out")
    assert steps["memcheck-lstm-S"][1].startswith("ok") and steps["pairs"][1].startswith("ok")


def test_second_contact_says_when_it_does_not_know_what_failed(environment: dict[str, str], tmp_path: Path) -> None:
    again = run("again.sh", tmp_path / "empty", tmp_path / "out", **environment)
    steps = steps_of(tmp_path / "out")
    assert steps["failed-tests"] == [f"FAILED: no {tmp_path / 'empty'}/tests.jsonl"]
    assert again.returncode == 1 and steps["script"] == ["did not work: failed-tests"]


def test_make_gpu_runs_all_steps_whatever_fails_and_ends_with_the_list(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = ["make", "-s", "gpu", f"PYTHON={environment.pop('PYTHON')}", f"OUT={tmp_path / 'out'}"]
    process = subprocess.run(command, cwd=ROOT, env={**environment, "FAILS": "lstm-M"}, capture_output=True, text=True)
    assert process.returncode == 2 and "Error 1" in process.stderr
    assert process.stdout.splitlines()[-1].endswith("did not work: memcheck-lstm-M racecheck-lstm-M")
    steps = steps_of(tmp_path / "out")
    assert {"doctor", "test-two_streams", "racecheck-lstm-L", "probe", "bench", "metamath", "generation"} < set(steps)
    for part, step, other in (("gpu-test", "doctor", "probe"), ("gpu-bench", "probe", "doctor")):
        command[2] = part
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        assert step in steps_of(tmp_path / "out") and other not in steps_of(tmp_path / "out")


PROJECT = """
import os, signal, pytest
def test_good(): pass
def test_bad(): print("what it printed"); assert 1 == 2
@pytest.mark.skip(reason="a reason")
def test_skipped(): pass
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_after(): pass
"""


def kept(project: str, workers: int, folder: Path) -> list[dict[str, Any]]:
    """What is kept of the tests of a file, run without pytest-xdist or with so many workers."""
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    (folder / "test_project.py").write_text(project)
    keep, extra = folder / "tests.jsonl", ["-n", str(workers)] if workers else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benches.gpu.keep", "--keep", str(keep), *extra]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["TRITON_INTERPRET"] = "1"
    command += ["--rootdir", str(folder), str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    return _rows.read(keep)


def names(lines: list[dict[str, Any]], outcome: str) -> list[str]:
    return [line["test"].rpartition("::")[2] for line in lines if line["outcome"] == outcome]


@pytest.mark.parametrize("workers", [0, 1])
def test_outcomes_are_kept_though_the_run_is_killed(workers: int, tmp_path: Path) -> None:
    """With pytest-xdist a worker dies; its test is then one that failed, and another worker goes on."""
    lines = kept(PROJECT, workers, tmp_path)
    assert names(lines, "collected") == ["test_good", "test_bad", "test_skipped", "test_killed", "test_after"]
    assert names(lines, "passed") == ["test_good", *(["test_after"] if workers else [])]
    again = ["test_bad", "test_killed", *([] if workers else ["test_after"])]
    assert [name.rpartition("::")[2] for name in failed(lines)] == again
    (bad,) = [line for line in lines if line["outcome"] == "failed" and "test_bad" in line["test"]]
    assert "assert 1 == 2" in bad["message"] and "what it printed" in bad["output"]
    assert any(line["outcome"] == "skipped" for line in lines)


LOSES_ITS_DEVICE = """
import torch
lost = False
def synchronize():
    if lost: raise RuntimeError("CUDA error: unspecified launch failure")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
def test_fails(): assert False
def test_before(): pass
def test_traps():
    global lost
    lost = True
    synchronize()
def test_after(): synchronize()
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_no_test_fails_because_another_lost_the_device(workers: int, tmp_path: Path) -> None:
    """With pytest-xdist the worker ends and another goes on; without, the rest is skipped, and is to be run again."""
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    lines = kept(LOSES_ITS_DEVICE, workers, tmp_path)
    assert set(names(lines, "failed")) == {"test_fails", "test_traps"}
    assert names(lines, "passed") == ["test_before", *(["test_after"] if workers else [])]
    assert names(lines, "skipped") == ([] if workers else ["test_after"])
    again = ["test_fails", "test_traps", *([] if workers else ["test_after"])]
    assert [name.rpartition("::")[2] for name in failed(lines)] == again


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_step_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "BUDGET": "3600"}
    first = run("first.sh", "--dry-run", tmp_path / "first", **environment)
    logs = "".join(path.read_text() for path in sorted((tmp_path / "first").glob("*.log")))
    assert first.returncode == 0, first.stdout + logs
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {
        "summary.txt",
        "build.log",
        "probe.json",
        "doctor.txt",
        "tests.jsonl",
        "tests.log",
        "bench.jsonl",
        "bench.log",
    }
    (result, *others) = report.read(tmp_path / "first" / "bench.jsonl")
    assert "metamath" in report.render(report.merged([result, *others]))
    assert "healthy" in (tmp_path / "first" / "doctor.txt").read_text()
    lines = _rows.read(tmp_path / "first" / "tests.jsonl")
    passed = [line for line in lines if line["outcome"] == "passed"]
    assert failed(lines) == [] and len(passed) >= 6
    _rows.append(tmp_path / "first" / "tests.jsonl", {**passed[0], "outcome": "failed"})
    again = run("again.sh", "--dry-run", tmp_path / "first", tmp_path / "again", **environment)
    logs = "".join(path.read_text() for path in sorted((tmp_path / "again").glob("*.log")))
    assert again.returncode == 0, again.stdout + logs
    rerun = _rows.read(tmp_path / "again" / "tests.jsonl")
    assert passed[0]["test"] in [line["test"] for line in rerun if line["outcome"] == "passed"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [*sorted((ROOT / "benches" / "gpu").glob("*.sh")), *sorted(STAND_INS.iterdir())]
    process = subprocess.run(["shellcheck", "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
