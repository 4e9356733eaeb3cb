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


@dataclass(frozen=True)
class Job:
    """A class of a mapping, and the checks that are wanted of it; none are all."""

    task: str
    name: str
    checks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\t".join((self.task, self.name, *self.checks))


def jobs_of(path: Path) -> list[Job]:
    """Jobs from a file: a line each, mapping, class and checks with tabs between them."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [Job(task, name, tuple(checks)) for task, name, *checks in lines]


def known(jobs: Sequence[Job]) -> list[Job]:
    """Those whose classes the installed transformers has."""
    return [job for job in jobs if job.name in classes(job.task)]


def remember(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Add what is red to a file of jobs."""
    found = {(job.task, job.name): list(job.checks) for job in jobs_of(path)}
    for one in outcomes:
        if one.kind == "red":
            ever = found.setdefault((one.task, one.name), [])
            if one.check not in ever:
                ever.append(one.check)
    path.write_text("".join(f"{Job(*key, tuple(ever))}\n" for key, ever in sorted(found.items())), encoding="utf-8")


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
