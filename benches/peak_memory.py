"""Peak memory of a training step, ours and PEFT's: `python -m benches.peak_memory`.

Every figure is the most memory that a fresh process ever held (resident set), less what it held before its first step:
gradients, optimizer state, activations and logits, without the model.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from .test_bench_shared import SHAPES

CONTENDERS = ("fusedprompt", "PEFT")


def peak_of_steps(name: str, size: int, rows: int, length: int) -> float:
    """MB that two training steps add to this process."""
    from ._models import batch_of, contender
    from .test_bench_shared import theirs_and_ours

    theirs, ours = theirs_and_ours(rows)
    model = theirs if name == "PEFT" else ours
    turn = contender(name, model, model, batch_of(size, length))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        turn.work("training step")()
        turn.clear()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Run each contender at each shape in a process of its own and print a table."""
    if len(sys.argv) > 1:
        print(peak_of_steps(sys.argv[1], *map(int, sys.argv[2:])))
        return
    print(f"{'B':>3} {'N':>4} {'T':>4}" + "".join(f"{name + ' MB':>18}" for name in CONTENDERS))
    for shape in SHAPES.values():
        figures = []
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benches.peak_memory", name, *map(str, shape)]
            figures.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print("{:>3} {:>4} {:>4}".format(*shape) + "".join(f"{figure:>18.0f}" for figure in figures))


if __name__ == "__main__":
    main()
