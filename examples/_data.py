"""What the examples learn from: the documentation of Python's standard library, which is on every machine."""

from __future__ import annotations

import importlib
import inspect
import random

MODULES = ("ast", "decimal", "logging", "mailbox", "pathlib", "ssl")
Row = dict[str, str]


def first_sentence(one: object) -> str:
    """Of what is documented, without the full stop; empty if nothing is."""
    return " ".join((inspect.getdoc(one) or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def documented(modules: tuple[str, ...] = MODULES, each: int = 60) -> list[Row]:
    """First sentences on functions, classes and methods: {"module", "name", "text"}, at most `each` of a module.

    Every text is there once, in a random order that is always the same. Private names, inherited ones, and sentences of
    fewer than 5 or more than 30 words are left out.
    """
    found: dict[str, Row] = {}
    for module in modules:
        members = vars(importlib.import_module(module))
        owned = [one for key, one in members.items() if key[0] != "_" and getattr(one, "__module__", "") == module]
        methods = [
            member for one in owned if inspect.isclass(one) for key, member in vars(one).items() if key[0] != "_"
        ]
        new: dict[str, Row] = {}
        for one in [*owned, *methods]:
            text = first_sentence(one)
            name = getattr(one, "__name__", "")
            if callable(one) and name and 5 <= len(text.split()) <= 30:
                new.setdefault(text, {"module": module, "name": name, "text": text})
        found |= dict(random.Random(0).sample(sorted(new.items()), min(each, len(new))))
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    return rows


def split(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and `held_out` others."""
    return rows[held_out:], rows[:held_out]
