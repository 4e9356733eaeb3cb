"""Families of transformers, others every day, and all that ever were wrong: the checks of `make families`.

A check that is red here is a wrong number, or an error of a base model's own where a refusal was due.
"""

from __future__ import annotations

import datetime
import os
import random
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from families.outcome import Job, Outcome, jobs_of, known, read, red_lines
from families.tiny import MAPPINGS, classes

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "families.md"
DRAWN = {"CAUSAL_LM": 15, "SEQ_CLS": 3, "TOKEN_CLS": 2, "QUESTION_ANS": 2, "SEQ_2_SEQ_LM": 1, "MASKED_LM": 2}
TIMEOUT = 60


def drawn(day: datetime.date) -> list[Job]:
    """25 classes of all mappings, every check."""
    draw = random.Random(str(day))
    return [Job(task, name) for task, count in DRAWN.items() for name in draw.sample(classes(task), count)]


TODAY = drawn(datetime.date.today())
ONCE = [job for job in known(jobs_of(HERE / "families" / "ever_failed.txt")) if Job(job.task, job.name) not in TODAY]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("families")
    wanted, found = folder / "list.txt", folder / "outcomes.jsonl"
    wanted.write_text("".join(f"{job}\n" for job in [*TODAY, *ONCE]), encoding="utf-8")
    command = [sys.executable, "-m", "families.sweep", "--list", str(wanted), "--json", str(found)]
    paths = os.pathsep.join((str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--timeout", str(TIMEOUT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1) and found.exists(), done.stderr
    return read(found)


@pytest.mark.parametrize("job", [*TODAY, *ONCE], ids=lambda job: f"{job.task}-{job.name}-{job.checks or 'all'}")
def test_a_family_is_right_or_refused_with_a_reason(job: Job, outcomes: list[Outcome]) -> None:
    own = [one for one in outcomes if (one.task, one.name) == (job.task, job.name)]
    assert own, "no outcome: the sweep did not get to it"
    assert not red_lines(own)


def page_text() -> str:
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')}," not in text:
        pytest.skip("the page is of another version of transformers")
    return text


def test_the_page_lists_the_classes_of_the_mappings() -> None:
    sections = page_text().split("\n## ")[1 : 1 + len(MAPPINGS)]
    for task, section in zip(MAPPINGS, sections):
        assert sorted(re.findall(r"`(\w+)`", section)) == sorted(classes(task)), task


def test_nearly_all_causal_families_are_built_and_nothing_is_wrong() -> None:
    text = page_text()
    row = re.search(r"\| Causal language models \| (\d+) \| (\d+) \| (\d+) \|", text)
    assert row is not None and int(row[2]) >= 160
    assert "✗" not in text.partition("\n## ")[2]
