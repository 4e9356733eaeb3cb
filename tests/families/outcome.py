"""What came of one check of one class, and how to say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .tiny import MAPPINGS, classes


@dataclass(frozen=True)
class Outcome:
    """What came of one check of one class.

    kind: "equal"; "said", equal with a remark; "refused" by the package, with its reason; "unchecked", because there
    is nothing to compare with; "red": a wrong number, or an error that is not the package's.
    """

    task: str
    name: str
    check: str
    kind: str
    text: str = ""


def append(path: Path, outcome: Outcome) -> None:
    """One line, in one write, so that processes do not mix theirs."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def read(path: Path) -> list[Outcome]:
    """Outcomes from a file, in the mappings' order."""
    found = [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    tasks = list(MAPPINGS)
    places = {(task, name): (tasks.index(task), place) for task in tasks for place, name in enumerate(classes(task))}
    return sorted(found, key=lambda one: places[one.task, one.name])


def red_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """What is red, a line each."""
    return [f"{one.task} {one.name} | {one.check}: {one.text}" for one in outcomes if one.kind == "red"]
