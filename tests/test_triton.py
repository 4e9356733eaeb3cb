"""Tests that need processes of their own, because Triton decides at its import what its kernels run on.

`triton_interpreter`: kernels executed on the CPU by Triton's interpreter. `stub_driver`: kernels compiled and launched,
on a driver that carries nothing out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_tests(path: Path, **environment: str) -> None:
    """Its output goes where this process's does: shown if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run(command, cwd=FOLDER.parent, env={**variables, **environment}).returncode == 0


@pytest.mark.parametrize("path", sorted((FOLDER / "triton_interpreter").glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_pass_their_tests_in_the_interpreter(path: Path) -> None:
    run_tests(path, TRITON_INTERPRET="1")


def test_gpu_tests_pass_in_the_interpreter_as_far_as_it_goes() -> None:
    run_tests(FOLDER / "gpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="building the stub needs gcc")
def test_launches_pass_their_tests_on_a_stub_driver() -> None:
    run_tests(FOLDER / "stub_driver", FUSEDPROMPT_STUB_DRIVER="1")
