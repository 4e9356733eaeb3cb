"""Measure the ops on a GPU against PEFT, PEFT compiled, ATen and the floor: `python -m benches.gpu.run --out FOLDER`.

Writes FOLDER/<gpu>.json. Without a GPU, `--dry-run` runs every contender of every case once at toy sizes and measures
nothing. `make gpu-bench` also runs the probe of the machine (probe.cu) and hands over what it printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusedprompt

from ._cases import OURS, Case, Work, cases, matmul_precision
from ._timing import capture, copy_bandwidth, time_calls, time_graphs

MODES = ("forward", "forward+backward")


def measure(case: Case, bandwidth: float, cache_bytes: int) -> list[dict[str, Any]]:
    """A row per mode: every contender's device time cold and warm, and its time from Python."""
    sets = max(2, min(64, -(-3 * cache_bytes // case.set_bytes)))
    works = {name: [make(0)] for name, make in case.contenders.items()}
    right = case.check({name: work[0] for name, work in works.items()})
    rows = []
    for mode, floor_bytes in zip(MODES, case.floor_bytes):
        calls = {name: _call(work, mode) for name, work in right.items()}
        figures = {name: {"eager": value.as_dict()} for name, value in time_calls(calls).items()}
        for state in ("warm", "cold"):
            graphs = {}
            for name in right:
                while state == "cold" and len(works[name]) < sets:
                    works[name].append(case.contenders[name](len(works[name])))
                try:
                    todo = [_call(work, mode) for work in works[name]] if state == "cold" else [calls[name]] * 10
                    graphs[name] = (capture(todo), len(todo))
                except RuntimeError as error:  # what cannot be captured has no device time
                    case.left_out[f"{name}, {mode}, {state}"] = str(error).splitlines()[0]
                    torch.cuda.synchronize()
            for name, value in time_graphs(graphs).items():
                figures[name][state] = value.as_dict()
            del graphs
        floor = floor_bytes / bandwidth * 1e6
        rows.append(
            {
                "group": case.group,
                "case": case.name,
                "dtype": case.dtype,
                "mode": mode,
                "sets": sets,
                "floor_bytes": floor_bytes,
                "floor_us": floor,
                "contenders": figures,
                "left_out": dict(case.left_out),
            }
        )
    return rows


def _call(work: Work, mode: str) -> Callable[[], object]:
    return work.forward if mode == MODES[0] else work.both


def line(row: dict[str, Any]) -> str:
    """One line of text: ours in microseconds, its share of the floor's speed, and the others' times over ours."""
    found = row["contenders"]
    cells = [f"{row['group']} {row['case']} {row['dtype']} {row['mode']}".ljust(52), f"floor {row['floor_us']:7.1f}"]
    for state in ("cold", "warm", "eager"):
        ours = found[OURS].get(state)
        if ours is None:
            continue
        ratios = [
            f"{name} {figures[state]['median_us'] / ours['median_us']:.2f}x"
            for name, figures in found.items()
            if name != OURS and state in figures
        ]
        share = f" ({row['floor_us'] / ours['median_us']:4.0%})" if state == "cold" else ""
        cells.append(f"{state} {ours['median_us']:.1f} us{share}: {', '.join(ratios)}")
    return " | ".join(cells)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "fusedprompt": fusedprompt.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benches.gpu.run", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--probe", type=Path, help="what probe.cu printed, to go into the result")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no case after this time")
    parser.add_argument("--only", default="", help="measure the cases whose name holds this text")
    parser.add_argument("--dry-run", action="store_true", help="run everything once, at toy sizes, on this machine")
    options = parser.parse_args(arguments)
    if options.dry_run:
        for make in cases(torch.device("cpu")):
            case = make()
            with matmul_precision(case.precision):
                right = case.check({name: build(0) for name, build in case.contenders.items()})
            print(
                f"{case.group} {case.name} {case.dtype}: {', '.join(right)} agree; left out: {case.left_out or 'none'}"
            )
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU; --dry-run works without")
    if options.out is None:
        parser.error("--out is needed")
    start = time.monotonic()
    about, bandwidth = machine(), copy_bandwidth()
    result: dict[str, Any] = {
        "machine": about,
        "probe": json.loads(options.probe.read_text()) if options.probe else None,
        "copy_bytes_per_s": bandwidth,
        "rows": [],
        "not_begun": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{re.sub(r'[^a-z0-9]+', '-', about['gpu'].lower()).strip('-')}.json"
    print(
        f"{about['gpu']}, torch {about['torch']}, Triton {about['triton']}: copy {bandwidth / 1e12:.2f} TB/s",
        flush=True,
    )
    for make in cases(torch.device("cuda")):
        case = make()
        name = f"{case.group} {case.name} {case.dtype}"
        if options.only not in name:
            continue
        if time.monotonic() - start > options.seconds:
            result["not_begun"].append(name)
            continue
        torch._dynamo.reset()
        with matmul_precision(case.precision):
            rows = measure(case, bandwidth, about["l2_bytes"])
        result["rows"] += rows
        for row in rows:
            print(line(row), flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")  # after each case, in case time runs out
        del case, rows
        torch.cuda.empty_cache()
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}; not begun: {', '.join(result['not_begun']) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
