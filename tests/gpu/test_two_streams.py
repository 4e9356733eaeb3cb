"""Two cooperative grids at once, in a process of their own: should they wait for each other, it is killed.

Nothing inside a process can end a kernel that hangs, and a test that follows would hang behind it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedprompt import ops

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_two_streams_at_once_neither_hang_nor_mix() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(
        [sys.executable, __file__], env=environment, timeout=SECONDS, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr


def step(x: torch.Tensor, weights: list[torch.Tensor], d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = ops.lstm(x, weights, num_layers=2, bidirectional=True, backend="native")
    return (out.detach(), *torch.autograd.grad(out, [x, *weights], d_out))


def main() -> None:
    """Each launch wants most of the multiprocessors: the second waits for the first, whole."""
    torch.manual_seed(0)
    module = torch.nn.LSTM(64, 1024, num_layers=2, bidirectional=True, device="cuda")
    weights = [getattr(module, name) for names in module._all_weights for name in names]
    x = torch.randn(1, 50, 64, device="cuda", requires_grad=True)
    d_out = torch.randn(1, 50, 2048, device="cuda")
    expected = step(x, weights, d_out)
    results = []
    for stream in [torch.cuda.Stream() for _ in range(3)]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results += [step(x, weights, d_out) for _ in range(4)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected))


if __name__ == "__main__":
    main()
