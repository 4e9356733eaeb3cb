"""What launching a Triton kernel costs the host, by Triton's own dispatch and by ours: `python -m benches.launch_cost`.

Needs no GPU: the launches go through Triton's launcher to a driver that carries nothing out (tests/stub_driver).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import stub_driver


def microseconds(calls: dict[str, Callable[[], object]], rounds: int = 30, inner: int = 300) -> dict[str, float]:
    """Median time a call, in turns A B B A."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            start = time.perf_counter()
            for _ in range(inner):
                calls[name]()
            samples[name].append((time.perf_counter() - start) / inner * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    """Measure each kernel of a training step of P-tuning."""
    stub_driver.install()
    import torch
    import triton

    from fusedprompt.ops import _triton
    from fusedprompt.ops.mlp import triton as mlp
    from fusedprompt.ops.splice import triton as splice

    seen: dict[str, tuple[Any, ...]] = {}
    launch = _triton.Launch.__call__

    def remember(self: Any, *arguments: Any) -> None:
        seen.setdefault(self.name, (self, *arguments))
        launch(self, *arguments)

    patched: Any = _triton.Launch
    patched.__call__ = remember
    x, ids, table = (
        torch.zeros(20, 768, requires_grad=True),
        torch.zeros(4, 100, dtype=torch.int64),
        torch.zeros(99, 768),
    )
    weights = [torch.zeros(768, 768, requires_grad=True) for _ in range(3)]
    biases = [torch.zeros(768, requires_grad=True) for _ in range(3)]
    prompt = mlp.mlp(x, weights, biases, [])
    embeds, _ = splice.splice(prompt, None, ids, table, None, [ids, ids], [1, -100])
    embeds.backward(torch.zeros_like(embeds))
    patched.__call__ = launch

    print(f"torch {torch.__version__}, Triton {triton.__version__}; microseconds of host time a launch")
    for name, (made, grid, tensors, integers) in seen.items():

        def dispatch(made: Any = made, grid: Any = grid, tensors: Any = tensors, integers: Any = integers) -> None:
            made.kernel[grid](*tensors, *integers, **made.constants, **made._options)

        def cached(made: Any = made, grid: Any = grid, tensors: Any = tensors, integers: Any = integers) -> None:
            made(grid, tensors, integers)

        cached()
        found = microseconds({"dispatch": dispatch, "ours": cached})
        ratio = found["dispatch"] / found["ours"]
        print(f"{name:24} Triton's dispatch {found['dispatch']:5.1f}   ours {found['ours']:4.1f}   {ratio:.1f}x")


if __name__ == "__main__":
    main()
