"""What `make gpu` runs on a machine with a GPU, tried out on one without."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_contender_of_the_gpu_benchmarks_runs_and_agrees_with_the_truth() -> None:
    command = [sys.executable, "-m", "benches.gpu.run", "--dry-run"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) >= 5
    for line in lines:
        all_of_them = "fusedprompt, ATen" if line.startswith("lstm") else "fusedprompt, ATen, PEFT, PEFT compiled"
        assert line.endswith(f"{all_of_them} agree; left out: none"), line


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_probe_of_the_machine_compiles(tmp_path: Path) -> None:
    source = ROOT / "benches" / "gpu" / "probe.cu"
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-o", str(tmp_path / "probe")]
    process = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_each_part_of_make_gpu_names_commands_that_exist() -> None:
    """`make -n` prints the commands; the modules among them can be found."""
    command = ["make", "-n", "gpu", "PYTHON=python3"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(re.findall(r" -m (\S+)", process.stdout)) - {"pip", "pytest", "fusedprompt"}
    assert modules == {"benches.gpu.small", "benches.gpu.run"}
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert (ROOT / "tests" / "gpu").is_dir()
