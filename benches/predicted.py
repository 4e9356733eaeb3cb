"""What the LSTM should take on a GPU, by csrc/lstm_plan.cpp: `python -m benches.predicted probe.json`.

A prediction is made before the measurement, to be held against it: where they differ, a figure or the model is wrong.
The file is what benches/gpu/probe.cu measured on that GPU. Without one, the published figures of an H200 are taken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ._work import BACKWARD, FORWARD

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
SHAPES = (
    (20, 768, 256, "float32"),
    (20, 768, 256, "bfloat16"),
    (100, 1024, 1024, "float32"),
    (100, 1024, 1024, "bfloat16"),
    (50, 3072, 3072, "float32"),
    (50, 3072, 3072, "bfloat16"),
)
# FLOP/s of products as cuBLAS makes them: fp32 without tensor cores, two-byte types with them.
MATRIX_RATE = {4: 50e12, 2: 600e12}
# The fields of GpuFigures in csrc/lstm_plan.h, by the data sheets and the CUDA C++ programming guide.
H200 = {
    "multiprocessors": 132,
    "shared_bytes": 227 << 10,
    "register_bytes": 256 << 10,
    "l2_kept_bytes": 25 << 20,
    "l2_gb_per_s": 5500.0,
    "memory_gb_per_s": 4800.0,
    "clock_ghz": 1.755,
    "clusters": True,
}
H100 = {**H200, "memory_gb_per_s": 3350.0}


def figures(probe: dict[str, Any]) -> dict[str, Any]:
    """The planner's figures of the GPU that a probe ran on; what the probe does not measure is an H200's.

    L2 keeps what is read at more than half of the way from memory's rate to L2's best: the largest such buffer counts.
    """
    memory = float(probe["read_gb_per_s"])
    rates = {float(size.removesuffix(" MiB")): float(rate) for size, rate in probe["l2_read_gb_per_s"].items()}
    best = max(rates.values())
    kept = max((size for size, rate in rates.items() if rate > (memory + best) / 2), default=0.0)
    return {
        **H200,
        "multiprocessors": int(probe["multiprocessors"]),
        "shared_bytes": int(probe["shared_bytes_per_block"]),
        "l2_kept_bytes": int(kept * 2**20),
        "l2_gb_per_s": best,
        "memory_gb_per_s": memory,
        "clusters": int(probe["sm"]) >= 90,
    }


def lstm(rows: int, width: int, hidden: int, dtype: str, gpu: dict[str, Any]) -> dict[str, float]:
    """Seconds of two layers in both directions at batch 1, (P, D) to (P, 2H), by mode.

    P steps of the planner's in each layer and pass, and the products around them at the rate of memory or of cuBLAS,
    whichever takes longer. The launches between them are left out. gpu: see `figures`. ValueError for wrong arguments.
    """
    import torch  # noqa: F401  (whose libraries the next one needs)

    from fusedprompt import _C

    def steps(backward: bool) -> float:
        plan = _C.plan_lstm(
            steps=rows, batch=1, hidden=hidden, directions=2, dtype=dtype, backward=backward, gpu=gpu, variant=None
        )
        return float(rows * plan["predicted_us"] * 1e-6)

    def products(elements: float, flops: float) -> float:
        size = ITEMSIZE[dtype]
        return max(elements * size / (gpu["memory_gb_per_s"] * 1e9), flops / MATRIX_RATE[size])

    times = {FORWARD: 0.0, BACKWARD: 0.0}
    for inputs in (width, 2 * hidden):
        into, across = 8 * hidden * inputs, 8 * hidden * hidden  # W_ih and W_hh of both directions
        forward = steps(False) + products(into, 2 * rows * into)
        # Reads W_ih for the inputs' gradient and writes both gradients of weights, beside the transpose of W_hh.
        backward = steps(True) + products(2 * into + 3 * across, 2 * rows * (2 * into + across))
        times[FORWARD] += forward
        times[BACKWARD] += forward + backward
    return times


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    files = sys.argv[1:] if arguments is None else arguments
    gpu = figures(json.loads(Path(files[0]).read_text())) if files else H200
    print(f"FUSEDPROMPT_LSTM_L2_MB={gpu['l2_kept_bytes'] / 1e6:.0f}")
    print("| P, D, H | dtype | forward, ms | forward and backward, ms |\n|---|---|---|---|")
    for rows, width, hidden, dtype in SHAPES:
        times = lstm(rows, width, hidden, dtype, gpu)
        print(f"| {rows}, {width}, {hidden} | {dtype} | {times[FORWARD] * 1e3:.3f} | {times[BACKWARD] * 1e3:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
