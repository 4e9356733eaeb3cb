"""Every class of six of transformers' mappings, every check, a process each: `python -m families.sweep --help`.

A process per model's module imports it and forks one for each class, so that a crash or a timeout loses that class
alone. Outcomes are appended to a file as they come, one JSON object a line.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from . import checks
from .kit import Difference, Family, NoOracle, is_ours, one_line
from .outcome import Outcome, append, read, red_lines
from .tiny import MAPPINGS, classes

MEMORY = 8 << 30


def outcome_of(family: Family, check: str) -> tuple[str, str]:
    """Run a check: a kind and what there is to say."""
    try:
        said = checks.of(family.task)[check](family)
    except Difference as error:
        return "red", str(error)
    except NoOracle as error:
        return "unchecked", str(error)
    except TimeoutError:
        raise
    except Exception as error:
        if is_ours(error):
            return "refused", " ".join(str(error).split())
        own = family.own_error(check in checks.STEPS)
        return ("red", one_line(error)) if own is None else ("unchecked", f"the base model fails: {own}")
    return ("equal", "") if said is None else ("said", said)


def check(family: Family, name: str) -> Outcome:
    """An outcome. A difference that is rounding's goes away in float64."""
    kind, text = outcome_of(family, name)
    if kind == "red" and " off by " in text and "inf" not in text:
        try:
            again = Family(family.name, family.task, family.seed, torch.float64)
            finer, _ = outcome_of(again, name)
        except Exception:
            finer = "unchecked"
        if finer in ("equal", "said"):
            kind, text = finer, ""
    return Outcome(family.task, family.name, name, kind, text)


def run_class(task: str, name: str, wanted: Sequence[str], write: Any) -> None:
    """All checks of a class; each outcome is written as it comes."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        family = Family(name, task, zlib.crc32(name.encode()) % 1000)
    except Exception as error:
        write(Outcome(task, name, "build", "unchecked", f"not built: {one_line(error)}"))
        return
    write(Outcome(task, name, "build", "equal"))
    try:
        _ = family.model
    except Exception as error:
        kind = "refused" if is_ours(error) else "red"
        write(Outcome(task, name, "wrap", kind, str(error) if kind == "refused" else one_line(error)))
        return
    for one in checks.of(task):
        if not wanted or one in wanted:
            write(check(family, one))


def in_process(task: str, name: str, wanted: Sequence[str], timeout: float, path: Path) -> None:
    """A class in a process of its own, which may crash or take too long."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            run_class(task, name, wanted, lambda outcome: append(path, outcome))
        except BaseException as error:
            append(path, Outcome(task, name, "run", "red", one_line(error)))
        os._exit(0)
    status = None
    while status is None and time.monotonic() - started < timeout:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = code
        else:
            time.sleep(0.02)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        append(path, Outcome(task, name, "run", "red", f"did not end in {timeout:.0f} s"))
    elif status:
        append(path, Outcome(task, name, "run", "red", f"the process ended with status {status}"))


def groups(pairs: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Classes of one module together, which is imported once."""
    found: dict[str, list[tuple[str, str]]] = {}
    modules = getattr(transformers, "_class_to_module", {})
    for task, name in pairs:
        found.setdefault(modules.get(name, name), []).append((task, name))
    return list(found.values())


def sweep(
    pairs: Sequence[tuple[str, str]], wanted: Sequence[str], jobs: int, timeout: float, path: Path, show: bool = True
) -> list[Outcome]:
    """The outcomes of all checks of these classes."""
    torch.set_num_threads(1)
    path.write_text("", encoding="utf-8")
    waiting, running = groups(pairs), 0
    total, done = len(waiting), 0
    while waiting or running:
        if waiting and running < jobs:
            group = waiting.pop(0)
            if not os.fork():
                run_group(group, wanted, timeout, path)
            running += 1
            continue
        os.wait()
        running, done = running - 1, done + 1
        if show and sys.stderr.isatty():
            print(f"\r{done} of {total} modules", end="", file=sys.stderr)
    return read(path)


def run_group(group: Sequence[tuple[str, str]], wanted: Sequence[str], timeout: float, path: Path) -> None:
    """In a process of its own, which ends here."""
    try:
        for task, name in group:
            getattr(transformers, name, None)
            in_process(task, name, wanted, timeout, path)
    finally:
        os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m families.sweep", description="Check every family of transformers.")
    parser.add_argument("--only", nargs="*", default=[], metavar="CLASS")
    parser.add_argument("--mapping", nargs="*", default=list(MAPPINGS), choices=list(MAPPINGS))
    parser.add_argument("--checks", nargs="*", default=[], metavar="CHECK")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="seconds a class")
    parser.add_argument("--json", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/families.md")
    given = parser.parse_args(arguments)
    pairs = [(task, name) for task in given.mapping for name in classes(task)]
    pairs = [pair for pair in pairs if not given.only or pair[1] in given.only]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    outcomes = sweep(pairs, given.checks, given.jobs, given.timeout, given.json)
    if given.write is not None:
        from .page import page

        given.write.write_text(page(outcomes), encoding="utf-8")
    red = red_lines(outcomes)
    built = {(one.task, one.name) for one in outcomes if one.check == "build" and one.kind == "equal"}
    print(f"{len(built)} of {len(pairs)} classes built, {len(outcomes)} outcomes, {len(red)} red", *red, sep="\n")
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
