"""The tables of docs/gpu.md: of each shape the floor, what is predicted, and what was measured, if it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import predicted
from .._interleave import OURS, PEFT
from .._models import LORA
from .._work import BACKWARD, FORWARD
from ..report import RESULTS, label, rows_of
from .shapes import Shape, shown

MODES = (FORWARD, BACKWARD)


@dataclass(frozen=True)
class Card:
    """limits: as of `_limits.limits`; lstm: as of `predicted.figures`. rows: measured ones, none without a result."""

    name: str
    limits: Mapping[str, Any]
    lstm: Mapping[str, Any]
    rows: tuple[dict[str, Any], ...] = ()


# Assumed: nine tenths of the published bandwidth when copying, and of products what cuBLAS is known to reach.
_RATES = {"fp32": 50e3, "tf32": 400e3, "bf16": 700e3}
ASSUMED = {
    "h100": Card("NVIDIA H100", {"copy_gb_per_s": 3000.0, "matrix_gflop_per_s": _RATES}, predicted.H100),
    "h200": Card("NVIDIA H200", {"copy_gb_per_s": 4300.0, "matrix_gflop_per_s": _RATES}, predicted.H200),
}


def card(key: str) -> Card:
    """As measured, where benches/results has a file of such a GPU, else as assumed."""
    assumed = ASSUMED[key]
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"nvidia-{key}*.json"))]
    if not results:
        return assumed
    rows = tuple(row for result in results for row in rows_of(result))
    machines = [result["machine_info"] for result in results]
    limits = next((found for machine in machines if (found := machine.get("limits"))), assumed.limits)
    return Card(machines[0]["gpu"], limits, assumed.lstm, rows)


def _measured(of: Card, shape: Shape, mode: str) -> dict[str, Any] | None:
    wanted = (shape.group, shape.name, shape.dtype, f"{mode} cold")
    found = [row for row in of.rows if (row["group"], row["case"], row["dtype"], label(row)) == wanted]
    return found[-1]["contenders"] if found else None


def _microseconds(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _pair(values: list[str]) -> str:
    return " / ".join(values) if any(values) else ""


def _ratio(contenders: dict[str, Any] | None, name: str) -> str:
    return f"{contenders[name]['ratio']:.2f}" if contenders and name in contenders else ""


def kernels(key: str) -> list[list[str]]:
    """A line a shape; cells have forward, and forward with backward."""
    of = card(key)
    title = f"{of.name}: forward / forward and backward, µs"
    lines = [[title, "floor", "predicted", "measured", "share of the floor", "peers, times as long"]]
    for shape in shown():
        floor, expected = shape.floor(of.limits), shape.seconds(of.limits, of.lstm)
        found = {mode: _measured(of, shape, mode) for mode in MODES}
        times = {mode: each and each[OURS]["median_ms"] / 1e3 for mode, each in found.items()}
        shares = [f"{100 * floor[mode] / time:.0f} %" if time else "" for mode, time in times.items()]
        names = dict.fromkeys(name for each in found.values() for name in each or () if name != OURS)
        ratios = {name: [_ratio(each, name) for each in found.values()] for name in names}
        peers = [f"{name} {_pair(values)}" for name, values in ratios.items()]
        lines.append(
            [
                f"{shape.group}, {shape.name.replace(' ', ', ')}, {shape.dtype}",
                _pair([_microseconds(floor[mode]) for mode in MODES]),
                _pair([_microseconds(expected[mode]) for mode in MODES]),
                _pair([_microseconds(time) if time else "" for time in times.values()]),
                _pair(shares),
                ", ".join(peers),
            ]
        )
    return lines


STEPS = ("prompt tuning N=200", "P-tuning MLP N=20", "P-tuning LSTM N=50")


def steps(key: str) -> list[list[str]]:
    """Whole training steps of PEFT's MetaMathQA shapes, all 28 layers."""
    of = card(key)
    lines = [[f"{of.name}: training step, 28 layers, ms", "ours", "PEFT", "LoRA of rank 32", "ours / LoRA"]]
    for name in STEPS:
        rows = [row["contenders"] for row in of.rows if row["group"] == "metamath" and row["case"].startswith(name)]
        times = {who: each["median_ms"] for who, each in rows[-1].items()} if rows else {}
        cells = [f"{times[who]:.1f}" if who in times else "" for who in (OURS, PEFT, LORA)]
        lines.append([name, *cells, f"{times[OURS] / times[LORA]:.2f}" if {OURS, LORA} <= times.keys() else ""])
    return lines
