"""The example of docs/peft.md does what it says, and the same with PEFT alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "peft_trainer.py"


def run(*options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(EXAMPLE), "--steps", "5", *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_example_trains_to_the_loss_of_plain_peft() -> None:
    patched, plain = run(), run("--plain")
    assert "mlp: " in patched and "route shared where it pays" in patched and "fusedprompt" not in plain
    for text in (patched, plain):
        assert "reloaded by PEFT: the prompt is the same" in text
    losses = [float(re.search(r"^loss ([\d.]+) after 5 steps", text, re.MULTILINE)[1]) for text in (patched, plain)]
    assert abs(losses[0] - losses[1]) <= 1e-4 * losses[1]
    assert len(EXAMPLE.read_text().splitlines()) < 80
