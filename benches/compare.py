"""What changed between two results: `python -m benches.compare OLD.json NEW.json`.

Times of different days or machines cannot be compared, ratios to a peer measured in turns can: so the ratios to the
first peer stand first, and the times beside them. Results of every schema can be read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._interleave import AGAIN, OURS
from .report import MISSING, aligned, key_of, rows_of


def first_peer(row: dict[str, Any]) -> str | None:
    """The peer that a row's ratio is taken to."""
    return next((name for name in row["contenders"] if name not in (OURS, AGAIN)), None)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A table: the rows that are in both, and then the names of those that are not."""
    before, after = ({key_of(row): row for row in rows_of(result)} for result in (old, new))
    cells = [["group", "case", "dtype", "measured", "peer", "ratio", "now", "change", "ours ms", "now", "change"]]
    for key, row in after.items():
        if key not in before:
            continue
        was = before[key]
        peer = first_peer(row)
        ratios = [found["contenders"].get(peer, {}).get("ratio") for found in (was, row)]
        times = [found["contenders"][OURS]["median_ms"] for found in (was, row)]
        cells.append([*key, peer or MISSING, *_change(ratios, "{:.2f}"), *_change(times, "{:.3f}")])
    lines = aligned(cells, left=5) if len(cells) > 1 else ["no row is in both"]
    for title, keys in (("only before", before.keys() - after.keys()), ("only now", after.keys() - before.keys())):
        lines += [f"{title}: {', '.join(key)}" for key in sorted(keys)]
    return lines


def _change(values: Sequence[float | None], form: str) -> list[str]:
    old, new = values
    if old is None or new is None:
        return [MISSING if value is None else form.format(value) for value in values] + [MISSING]
    return [form.format(old), form.format(new), f"{new / old - 1:+.1%}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benches.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    for name, result in (("old", old), ("new", new)):
        machine = result["machine_info"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        print(f"{name}: {result['datetime'][:19]}, {machine.get('gpu') or machine['cpu']}, {versions}")
    print("\n" + "\n".join(compare(old, new)))


if __name__ == "__main__":
    main()
