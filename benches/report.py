"""Print benchmark results as tables, and keep them: `python -m benches.report RESULT.json ... [--save]`."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _rows
from ._interleave import AGAIN, COMPILED, OURS

RESULTS = Path(__file__).parent / "results"
MISSING = "-"
TITLES = {OURS: "ours", COMPILED: "compiled"}


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured rows: `extra_info` of each benchmark, as `_interleave.measure` fills it."""
    return [row["extra_info"] for row in result["benchmarks"] if "contenders" in row.get("extra_info", {})]


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row measured, by which it is found in another result."""
    return row["group"], row["case"], row["dtype"], label(row)


def label(row: dict[str, Any]) -> str:
    """What was timed; on a GPU also in which state: cold, warm, or called from Python (eager)."""
    return " ".join(filter(None, (row["mode"], row.get("state"))))


def machine_name(machine: dict[str, Any]) -> str:
    """A file name for a machine: its GPU, or its processor and the threads used."""
    words = re.sub(r"\((?:r|tm)\)", " ", (machine.get("gpu") or machine["cpu"]).lower())
    threads = [] if machine.get("gpu") else [str(machine["threads"]), "threads"]
    return "-".join([*re.findall(r"[a-z0-9]+", words), *threads])


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Parts of one machine's benchmarks as one result; of a row that is there twice the last counts.

    Raises:
        ValueError: they are from different machines or versions.
    """
    first = results[0]
    about = [{key: value for key, value in result["machine_info"].items() if key != "limits"} for result in results]
    if any(machine != about[0] for machine in about):
        raise ValueError("results: expected one machine and the same versions, got several")
    rows = {key_of(row["extra_info"]): row for result in results for row in result["benchmarks"] if row["extra_info"]}
    last = results[-1]
    return {**first, **last, "benchmarks": list(rows.values())}


def aligned(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table with a rule under its first row. The first `left` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float, control: float | None) -> str:
    """A ratio, with ~ where PEFT against itself is as far from 1 in either direction."""
    within_noise = control is not None and abs(math.log(value)) <= abs(math.log(control))
    return f"{'~' if within_noise else ''}{value:.2f}"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One group's table: ours with its spread, then each peer's median and its ratio to ours, then the control."""
    found = dict.fromkeys(name for row in rows for name in (*row["contenders"], *row["left_out"]))
    peers = [name for name in found if name not in (OURS, AGAIN)]
    header = ["case", "dtype", "measured", f"{TITLES[OURS]} ms", "p20", "p80"]
    for peer in peers:
        header += [f"{TITLES.get(peer, peer)} ms", "ratio"]
    extra = [name for name, key in (("least", "floor_ms"), ("MB", "peak_mb")) if _has(rows, key)]
    cells = [[*header, "PEFT/PEFT", *(EXTRA[name] for name in extra)]]
    for row in rows:
        ours = row["contenders"][OURS]
        line = [row["case"], row["dtype"], label(row)]
        line += [_milliseconds(ours[key]) for key in ("median_ms", "p20_ms", "p80_ms")]
        for peer in peers:
            figures = row["contenders"].get(peer)
            if figures:
                line += [_milliseconds(figures["median_ms"]), _ratio(figures["ratio"], row.get("control"))]
            else:
                line += [MISSING, MISSING]
        control = row.get("control")
        line.append(MISSING if control is None else f"{control:.2f}")
        line += [least(row) if name == "least" else memory(row) for name in extra]
        cells.append(line)
    return aligned(cells, left=3)


EXTRA = {"least": "least, of limit", "MB": "peak MB, theirs"}


def _has(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row.get(key) or row["contenders"][OURS].get(key) for row in rows)


def least(row: dict[str, Any]) -> str:
    """The least work of a row, and the share of the machine's limit at which ours did it."""
    share = row["contenders"][OURS].get("share")
    if share is None:
        return MISSING
    by_bytes = row["bytes"] and not row["flops"]
    amount = f"{row['bytes'] / 1e6:.1f} MB" if by_bytes else f"{row['flops'] / 1e9:.2f} GFLOP"
    if row["bytes"] and row["flops"]:
        amount = f"{row['bytes'] / 1e6:.1f} MB, {amount}"
    return f"{amount}: {share:.0%}"


def memory(row: dict[str, Any]) -> str:
    """Peak memory of ours, and of the first peer."""
    found = [figures.get("peak_mb") for figures in row["contenders"].values()]
    return ", ".join(MISSING if value is None else f"{value:.1f}" for value in found[:2])


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why figures are missing, one line per contender and reason."""
    missing = Counter((name, reason) for row in rows for name, reason in row["left_out"].items() if name != AGAIN)
    return [
        f"no figure for {name} in {count} row{'s' * (count > 1)}: {reason}" for (name, reason), count in missing.items()
    ]


def control(rows: Sequence[dict[str, Any]]) -> str:
    """What PEFT against itself says about the run."""
    measured = [row["control"] for row in rows if row.get("control") is not None]
    if not measured:
        return "PEFT against itself: not measured."
    return (
        f"PEFT against itself: {statistics.median(measured):.2f} in the median of {len(measured)} rows, from "
        f"{min(measured):.2f} to {max(measured):.2f}."
    )


def _machine(machine: dict[str, Any]) -> str:
    """One line about a machine, with the limits that were measured on it."""
    cpus = f"{machine['threads']} threads on {machine['cpus']} CPUs, {machine['system']}"
    line = machine.get("gpu") or f"{machine['cpu']} ({machine['cpu_capability']}), {cpus}"
    found = machine.get("limits")
    if not found:
        return str(line)
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in found.get("matrix_gflop_per_s", {}).items())
    return f"{line}; copies {found['copy_gb_per_s']:.0f} GB/s, multiplies {rates or 'unmeasured'}"


def render(result: dict[str, Any]) -> str:
    """The whole report as text.

    Raises:
        ValueError: the result has no measured rows.
    """
    rows = rows_of(result)
    if not rows:
        raise ValueError("result: expected benchmarks with measured contenders, got none")
    machine, commit = result["machine_info"], result.get("commit_info") or {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    changed = ", with changes" if commit.get("dirty") else ""
    lines = [
        f"Machine:  {_machine(machine)}",
        f"Software: python {machine['python']}, {versions}",
        f"Date:     {result['datetime'][:19]}, commit {(commit.get('id') or 'unknown')[:12]}{changed}",
        f"Baseline: PEFT {machine['versions']['peft']} in the same process, eager and under torch.compile, interleaved "
        "with ours.",
        "Columns:  medians in milliseconds; ratio = peer / ours, so above 1 ours is faster.",
        "          ours: fusedprompt, eager. compiled: PEFT under torch.compile, in `step` with the whole base model.",
        "          PEFT/PEFT: PEFT against a second PEFT, the control; a ratio marked ~ is no further from 1.",
        "          least, of limit: fewest bytes and operations, and ours' share of the machine's measured limit.",
        "          peak MB, theirs: most memory held at once, ours and the first peer's.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        lines += ["", group, *table(of_group), *notes(of_group)]
    return "\n".join([*lines, "", control(rows)])


def read(path: Path) -> list[dict[str, Any]]:
    """A result, or those of a file that --rows wrote: one for each run, also of runs that were killed."""
    if path.suffix != ".jsonl":
        return [json.loads(path.read_text())]
    results: list[dict[str, Any]] = []
    for line in _rows.read(path):
        if "machine_info" in line:
            results.append({**line, "benchmarks": []})
        else:
            results[-1]["benchmarks"].append(line)
    return results


def save(result: dict[str, Any], part: str = "") -> Path:
    """Write the result under the machine's name, and its part's if it is one, in place of an older one."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{'-'.join(filter(None, (machine_name(result['machine_info']), part)))}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benches.report", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="what --benchmark-json or --rows wrote, or files of benches/results"
    )
    parser.add_argument("--save", action="store_true", help="also keep it in benches/results, by the machine's name")
    parser.add_argument("--part", default="", help="keep it as this part of the benchmarks, in a file of its own")
    options = parser.parse_args(arguments)
    result = merged([result for path in options.results for result in read(path)])
    print(render(result))
    if options.save:
        print(f"\nSaved as {save(result, options.part)}")


if __name__ == "__main__":
    main()
