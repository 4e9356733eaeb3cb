"""The LSTM ops of csrc/lstm_cuda.cu against the fp64 oracle: the whole stack on CPU tensors, kernels on fibers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_shim.machine import COMPILER, ROOT, SOURCES

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


def build(folder: Path) -> Path:
    from torch.utils import cpp_extension

    library = folder / "ops.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DFP_SHIM", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wno-attributes"]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    sources = [
        "-x",
        "c++",
        *(str(ROOT / name) for name in ("csrc/lstm_cuda.cu", *SOURCES)),
    ]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = [str(COMPILER), *flags, *includes, *sources, *paths, "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def test_cuda_ops_and_all_gradients_match_fp64_oracle_on_fibers(tmp_path: Path) -> None:
    script = ROOT / "tests" / "cuda_shim" / "ops_script.py"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(build(tmp_path))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
