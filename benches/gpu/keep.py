"""A pytest plugin that keeps each test's outcome at once: `python -m pytest -p benches.gpu.keep --keep FILE`.

pytest tells of failures when it ends, and a run that is killed has no end. Run by itself, `python -m benches.gpu.keep
FILE FOLDER` prints the tests under FOLDER that failed, or began and never ended (those that hung), and last those that
never ran: their step was killed before their turn, or the device was lost.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .._rows import append, read

LOST = "the device is lost"  # the reason for which tests/gpu/conftest.py skips


class Keeper:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.collected: set[str] = set()

    def pytest_collection_finish(self, session: Any) -> None:
        self.collect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collect(ids)

    def collect(self, tests: Iterable[str]) -> None:
        """Every worker of pytest-xdist collects the same."""
        for test in tests:
            if test not in self.collected:
                self.collected.add(test)
                append(self.path, {"test": test, "outcome": "collected"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        append(self.path, {"test": nodeid, "outcome": "begun"})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:  # setup and teardown are told of where they fail
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            line["message"] = report.longreprtext[-4000:]
            line["output"] = (report.capstdout + report.capstderr)[-2000:]
        append(self.path, line)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--keep", type=Path, help="keep each test's outcome in this file as soon as it is known")
    parser.addoption("--few", type=int, help="run so many of the first tests only")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    del items[config.getoption("--few") or len(items) :]


def pytest_configure(config: Any) -> None:
    path = config.getoption("--keep")
    if path is not None and not hasattr(config, "workerinput"):  # pytest-xdist's workers tell the process that keeps
        config.pluginmanager.register(Keeper(path))


def failed(lines: Iterable[dict[str, Any]]) -> list[str]:
    """The tests of a file that failed or never ended, in the order in which they began; then those that never ran."""
    last: dict[str, str] = {}
    for line in lines:
        test, outcome = line["test"], line["outcome"]
        if outcome == "begun":
            last.pop(test, None)
        if outcome == "skipped" and LOST in line["message"]:
            outcome = "collected"
        if last.get(test) != "failed":
            last[test] = outcome
    bad = [test for test, outcome in last.items() if outcome in ("begun", "failed")]
    return bad + [test for test, outcome in last.items() if outcome == "collected"]


if __name__ == "__main__":
    file, folder = sys.argv[1:]
    print(*(test for test in failed(read(Path(file))) if test.startswith(folder)), sep="\n")
