"""One configuration of every Triton kernel, compiled for every chip without a GPU; `make kernels` compiles them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import dataclasses, json
from benches import compile_table as table
first = {}
for configuration in table.configurations():
    first.setdefault(configuration.kernel.__name__, configuration)
rows = []
for name, configuration in first.items():
    for chip in table.CHIPS:
        compiled = table.compile_for(configuration, chip)
        fields = {field: getattr(compiled, field) for field in ("registers", "spilled", "shared", "wide_accesses")}
        rows.append({"kernel": name, "chip": chip, "limit": table.SHARED_LIMIT[chip], **fields,
                     "tensor": compiled.tensor_instructions})
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: kernels cannot be compiled where they are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return rows


def test_every_kernel_compiles_for_every_chip_without_spills(compiled: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in compiled} >= {
        "splice_forward",
        "splice_prefix_backward",
        "segment_sum",
        "linear_forward",
        "linear_backward",
    }
    for row in compiled:
        assert row["spilled"] == 0 and row["shared"] <= row["limit"], row


def test_rows_are_moved_in_128_bit_accesses_and_products_use_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["wide_accesses"] > 0, row
        if row["kernel"].startswith("linear"):
            assert row["tensor"] != "none", row
