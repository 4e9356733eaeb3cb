"""Every class of six of transformers' mappings, every check, a process each: `python -m families.sweep --help`.

A process per model's module imports it and forks one for each class, so that a crash or a timeout loses that class
alone. Outcomes are appended to a file as they come, one JSON object a line.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

import fusedprompt

from . import checks
from .kit import Difference, Family, NoOracle, is_ours, one_line
from .outcome import Job, Outcome, append, jobs_of, known, read, red_lines, remember
from .page import page
from .peers import peft_model
from .tiny import MAPPINGS, classes

MEMORY = 8 << 30
FEWEST = 160  # causal families that must be built
WAITS = 8  # times as long on the clock as on the processor: others work beside it


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


def run_class(job: Job, write: Callable[[Outcome], None]) -> None:
    """All checks of a class; each outcome is written as it comes."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    task, name = job.task, job.name
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
        if not set(job.checks) & set(checks.of(task)) or one in job.checks:
            write(check(family, one))


def in_process(job: Job, timeout: float, path: Path) -> None:
    """A class in a process of its own, which may crash or take too long."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(timeout), math.ceil(timeout)))
            nowhere = os.open(os.devnull, os.O_WRONLY)  # some models print
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            run_class(job, lambda outcome: append(path, outcome))
        except BaseException as error:
            append(path, Outcome(job.task, job.name, "run", "red", one_line(error)))
        os._exit(0)
    done, status = 0, 0
    while not done and time.monotonic() - started < WAITS * timeout:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        append(path, Outcome(job.task, job.name, "run", "red", f"did not end in {WAITS * timeout:.0f} s"))
    elif status:
        ended = f"took more than {timeout:.0f} s of processor time" if _is_out_of_time(status) else f"status {status}"
        append(path, Outcome(job.task, job.name, "run", "red", f"the process ended: {ended}"))


def _is_out_of_time(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)


def groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Classes of one module together, which is imported once."""
    found: dict[str, list[Job]] = {}
    modules = getattr(transformers, "_class_to_module", {})
    for job in jobs:
        found.setdefault(modules.get(job.name, job.name), []).append(job)
    return list(found.values())


def sweep(jobs: Sequence[Job], processes: int, timeout: float, path: Path) -> list[Outcome]:
    """The outcomes of all checks of these classes."""
    torch.set_num_threads(1)
    warm()
    path.write_text("", encoding="utf-8")
    waiting, running = groups(jobs), 0
    total, done = len(waiting), 0
    while waiting or running:
        if waiting and running < processes:
            group = waiting.pop(0)
            if not os.fork():
                run_group(group, timeout, path)
            running += 1
            continue
        os.wait()
        running, done = running - 1, done + 1
        if sys.stderr.isatty():
            print(f"\r{done} of {total} modules", end="", file=sys.stderr)
    return read(path)


def warm() -> None:
    """Import here what every process would, which takes 4 s. Nothing goes backward: that does not survive a fork."""
    warnings.simplefilter("ignore")
    family = Family("LlamaForCausalLM", "CAUSAL_LM")
    for name in ("alone", "greedy"):
        checks.of(family.task)[name](family)
    peer = peft_model(family)
    with torch.no_grad(), fusedprompt.apply(peer):
        peer.generate(**family.batch("no"), max_new_tokens=1)


def run_group(group: Sequence[Job], timeout: float, path: Path) -> None:
    """In a process of its own, which ends here."""
    try:
        for job in group:
            getattr(transformers, job.name, None)
            in_process(job, timeout, path)
    finally:
        os._exit(0)


def wanted(given: argparse.Namespace) -> list[Job]:
    """What the command line asks for."""
    if given.list is not None:
        return known(jobs_of(given.list))
    names = [(task, name) for task in given.mapping for name in classes(task)]
    return [Job(*pair, tuple(given.checks)) for pair in names if not given.only or pair[1] in given.only]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 if anything is red, or too few classes can be built."""
    parser = argparse.ArgumentParser(prog="python -m families.sweep", description="Check every family of transformers.")
    parser.add_argument("--only", nargs="*", default=[], metavar="CLASS")
    parser.add_argument("--mapping", nargs="*", default=list(MAPPINGS), choices=list(MAPPINGS))
    parser.add_argument("--checks", nargs="*", default=[], metavar="CHECK")
    parser.add_argument("--list", type=Path, help="a file with a line for each class: mapping, class, checks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of processor time for a class")
    parser.add_argument("--json", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--remember", type=Path, help="a file of that kind, to which what is red is added")
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/families.md")
    given = parser.parse_args(arguments)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    jobs = wanted(given)
    outcomes = sweep(jobs, given.jobs, given.timeout, given.json)
    if given.write is not None:
        given.write.write_text(page(outcomes), encoding="utf-8")
    if given.remember is not None:
        remember(given.remember, outcomes)
    red = red_lines(outcomes)
    built = {(one.task, one.name) for one in outcomes if one.check == "build" and one.kind == "equal"}
    print(f"{len(built)} of {len(jobs)} classes built, {len(outcomes)} outcomes, {len(red)} red", *red, sep="\n")
    causal = sum(task == "CAUSAL_LM" for task, _ in built)
    if sum(job.task == "CAUSAL_LM" for job in jobs) == len(classes("CAUSAL_LM")) and causal < FEWEST:
        print(f"{causal} causal families were built, fewer than {FEWEST}")
        return 1
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
