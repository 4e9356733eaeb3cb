"""The tests of `triton_interpreter`: kernels executed on the CPU by Triton's interpreter, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "triton_interpreter"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_pass_their_tests_in_the_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    # Its output goes where this process's does: shown if it fails.
    process = subprocess.run(command, cwd=FOLDER.parent.parent, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert process.returncode == 0
