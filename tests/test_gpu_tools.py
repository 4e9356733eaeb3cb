"""What `make gpu` runs on a machine with a GPU, tried out on one without."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_contender_of_the_gpu_benchmarks_runs_and_agrees_with_the_truth() -> None:
    command = [sys.executable, "-m", "pytest", "benches/gpu", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    cases, modes, states = 9 + 4, 2, 3  # and four pairs
    assert f"{cases * modes * states} passed" in process.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_probe_of_the_machine_compiles(tmp_path: Path) -> None:
    source = ROOT / "benches" / "gpu" / "probe.cu"
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-o", str(tmp_path / "probe")]
    process = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
