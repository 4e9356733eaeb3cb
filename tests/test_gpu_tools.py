"""The parts of what runs on a machine with a GPU, tried out on one without."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches import conftest, report
from benches.gpu._cases import COMPILED, OURS, cases

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_contender_of_the_gpu_benchmarks_runs_and_agrees_with_the_truth() -> None:
    command = [sys.executable, "-m", "pytest", "benches/gpu", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    cases, pairs, modes = 15, 4, 2
    assert f"{cases * modes * 3 + pairs * modes} passed" in process.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_probe_of_the_machine_compiles(tmp_path: Path) -> None:
    source = ROOT / "benches" / "gpu" / "probe.cu"
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-o", str(tmp_path / "probe")]
    process = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_one_case_of_each_op_is_first_and_what_matters_least_is_last() -> None:
    names = [str(case) for case in cases(torch.device("cuda"))]
    assert [name.split("-")[0] for name in names[:4]] == ["splice", "lstm", "head", "mlp"]
    assert [name for name in names if name.endswith("-first")] == names[:4]
    late = [
        name for name in names if (name.startswith("lstm") and name.endswith("tf32")) or name.startswith("mlp-100-8192")
    ]
    assert names[-len(late) :] == late and len(late) == 5 + 4
    assert len(set(names)) == len(names)


def test_peft_is_compiled_in_the_first_case_of_an_op_only() -> None:
    compiled = [str(case) for case in cases(torch.device("cpu")) if COMPILED in case.build().contenders]
    assert compiled == ["splice-2-6-32-first", "head-9-16-40-bf16-first", "mlp-5-16-bf16-first"]


def test_rows_are_written_one_by_one_and_read_as_a_result_also_where_a_run_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "limits", lambda: {"copy_gb_per_s": 1.0})
    path = tmp_path / "bench.jsonl"

    def run(*rows: dict[str, Any]) -> None:
        config = SimpleNamespace(getoption=lambda name: path, stash=pytest.Stash())
        for row in rows:
            benchmark = SimpleNamespace(extra_info=row)
            conftest.pytest_runtest_teardown(
                SimpleNamespace(config=config, funcargs={"benchmark": benchmark}, name="n")
            )
            assert path.read_text().endswith("\n")

    def row(case: str, ratio: float) -> dict[str, Any]:
        figures = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "ratio": ratio}
        named = {"group": "g", "case": case, "dtype": "bf16", "mode": "forward"}
        return {**named, "control": None, "left_out": {}, "contenders": {OURS: figures}}

    run(row("a", 1.0), {}, row("b", 2.0))
    run(row("c", 3.0), row("a", 4.0))
    with path.open("a") as file:
        file.write('{"name": "killed while it wr')
    result = report.merged(report.read(path))
    assert [(row["case"], row["contenders"][OURS]["ratio"]) for row in report.rows_of(result)] == [
        *(("a", 4.0), ("b", 2.0), ("c", 3.0))
    ]
    assert set(result["machine_info"]["versions"]) == set(conftest.PACKAGES) and result["schema"] == conftest.SCHEMA
    assert report.render(result) and json.dumps(result)
