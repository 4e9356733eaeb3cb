"""docs/families.md, from the outcomes of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version

from . import checks
from .outcome import Outcome
from .tiny import MAPPINGS, classes

_TITLES = {
    "CAUSAL_LM": "Causal language models",
    "SEQ_CLS": "Sequence classification",
    "TOKEN_CLS": "Token classification",
    "QUESTION_ANS": "Question answering",
    "SEQ_2_SEQ_LM": "Sequence to sequence",
    "MASKED_LM": "Masked language models",
}
_MARKS = {"equal": "=", "said": "s", "refused": "r", "unchecked": "-", "red": "✗"}
_TOP = """# Families

Every class of six of transformers' mappings (transformers {transformers}, PEFT {peft}, torch {torch}), tiny, with
random weights (four times as large as transformers draws them, so that differences show), behind a prompt of 30 rows,
on batches of 4 texts of 14 tokens. `make families` runs the checks, a process each class, and writes this page; a wrong
number, or an error of the base model where this package could have said no before, fails it. `make test` runs a sample,
another each day.

| mapping | classes | built | nothing red | on the shared route |
|---|---|---|---|---|
{counts}

By hand means without this package: the prompt's rows and the embeddings of one text without padding, joined by
`torch.cat`, through the base model's own `forward`. Values agree to 2e-4 of the largest, gradients to 2e-3, in float32
or else in float64.

| check | what is equal |
|---|---|
{checks}

In the tables: `=` equal, `s` equal with the remark of the note (that `auto` splices, and why), `r` refused by this
package with the reason of the note, `-` nothing to compare with: the base model or PEFT cannot do it, `✗` wrong.
Families whose outcomes are the same are in one row.
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The page as Markdown."""
    notes: dict[str, int] = {}
    parts = [_section(task, [one for one in outcomes if one.task == task], notes) for task in MAPPINGS]
    counts = "\n".join(_count(task, [one for one in outcomes if one.task == task]) for task in MAPPINGS)
    top = _TOP.format(
        transformers=version("transformers"),
        peft=version("peft"),
        torch=version("torch").partition("+")[0],
        counts=counts,
        checks="\n".join(f"| {name} | {_claim(function)} |" for name, function in checks.everything().items()),
    )
    said = "\n".join(f"{number}. {text}" for text, number in notes.items())
    return f"{top}\n{''.join(parts)}\n## Notes\n\n{said}\n"


def _claim(function: object) -> str:
    words = " ".join((function.__doc__ or "").split())
    return words.rstrip(".")


def _by_class(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.name, []).append(one)
    return found


def _is_built(outcomes: Iterable[Outcome]) -> bool:
    return any(one.check == "build" and one.kind == "equal" for one in outcomes)


def _count(task: str, outcomes: Sequence[Outcome]) -> str:
    ran = _by_class(outcomes)
    built = [name for name, found in ran.items() if _is_built(found)]
    good = [name for name in built if all(one.kind != "red" for one in ran[name])]
    shared = [name for name in good if any((one.check, one.kind) == ("routes", "equal") for one in ran[name])]
    if task not in ("CAUSAL_LM", "SEQ_CLS"):
        shared = []
    return f"| {_TITLES[task]} | {len(classes(task))} | {len(built)} | {len(good)} | {len(shared) or '-'} |"


def _section(task: str, outcomes: Sequence[Outcome], notes: dict[str, int]) -> str:
    names = list(checks.of(task))
    rows: dict[tuple[str, ...], list[str]] = {}
    missing: dict[str, list[str]] = {}
    for name, found in _by_class(outcomes).items():
        if not _is_built(found):
            missing.setdefault(found[0].text.partition(": ")[2], []).append(name)
            continue
        rows.setdefault(_cells(found, names, notes), []).append(name)
    ordered = sorted(rows.items(), key=lambda row: (sum(cell != "=" for cell in row[0]), row[1]))
    lines = [f"| {' | '.join(names)} | classes |", f"|{'---|' * (len(names) + 1)}"]
    lines += [f"| {' | '.join(cells)} | {_list(found)} |" for cells, found in ordered]
    text = f"\n## {_TITLES[task]}\n\n" + "\n".join(lines) + "\n"
    if missing:
        text += "\nNot built so small:\n\n"
        text += "".join(f"- {_list(found)}: {reason}\n" for reason, found in missing.items())
    return text


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cells(outcomes: Sequence[Outcome], names: Sequence[str], notes: dict[str, int]) -> tuple[str, ...]:
    """A class's cells; what comes of wrapping or of its process stands in all cells that have nothing else."""
    whole = next((one for one in outcomes if one.check in ("wrap", "run")), None)
    found = {one.check: one for one in outcomes}
    return tuple(_cell(found.get(name, whole), notes) for name in names)


def _cell(outcome: Outcome | None, notes: dict[str, int]) -> str:
    if outcome is None:
        return ""
    if not outcome.text:
        return _MARKS[outcome.kind]
    text = outcome.text.replace(outcome.name, "the base model").replace("|", "/").replace("`", "'")
    number = notes.setdefault(text, len(notes) + 1)
    return f"{_MARKS[outcome.kind]}{number}"
