"""What a base model is used for: one record a task."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class TaskType(str, enum.Enum):
    """What the base model is used for, under PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class Task:
    """What a task adds to a forward pass.

    name: by which a configuration asks for it.
    labels: "tokens" for labels (B, T), which go where the tokens go; "rows" for others, which the base model gets as
        they are; None where it takes none.
    predicts_next: each position predicts the label of the one behind it; the output keeps the prompt's positions.
    pools: the base model reads one column of each row: a decoder the last, an encoder the first.
    token_outputs: fields of the output with a value for each token, from which the prompt's are cut.
    answers: arguments (B,) that count tokens.
    token_types: whether token types are passed on: "always", "never", or "placed": to an encoder, in a given layout.
    shares: a decoder's text can be run behind a shared prompt.
    heads: modules that transformers initialises at random, so that a prompt alone cannot learn the task; they are
        trained and saved beside it.
    submodules: stacks of the base model that get a prompt of their own, in PEFT's count.
    """

    name: str
    labels: str | None = None
    predicts_next: bool = False
    pools: bool = False
    token_outputs: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    token_types: str = "always"
    shares: bool = False
    heads: tuple[str, ...] = ()
    submodules: int = 1


_HEADS = ("classifier", "score")
_TASKS = {
    task.name: task
    for task in (
        Task("SEQ_CLS", labels="rows", pools=True, shares=True, heads=_HEADS),
        Task("SEQ_2_SEQ_LM", labels="rows", token_types="never", submodules=2),
        Task("CAUSAL_LM", labels="tokens", predicts_next=True, token_types="placed", shares=True),
        Task("TOKEN_CLS", labels="tokens", token_outputs=("logits",), heads=_HEADS),
        Task(
            "QUESTION_ANS",
            token_outputs=("start_logits", "end_logits"),
            answers=("start_positions", "end_positions"),
            heads=("qa_outputs",),
        ),
        Task("FEATURE_EXTRACTION"),
    )
}


def register_task(task: Task) -> None:
    """Make a task known to configurations, `task_type=task.name`.

    Raises:
        TypeError, ValueError: there is one of that name, or a field is none of its values.
    """
    if task.name in _TASKS:
        raise ValueError(f"task: expected a new name, got {task.name!r}, which is one of {[*_TASKS]}")
    allowed = {"labels": ("tokens", "rows", None), "token_types": ("always", "never", "placed")}
    for field, values in allowed.items():
        if getattr(task, field) not in values:
            raise ValueError(f"task.{field}: expected one of {values}, got {getattr(task, field)!r}")
    for field in ("token_outputs", "answers", "heads"):
        if not isinstance(getattr(task, field), tuple):
            raise TypeError(f"task.{field}: expected a tuple of names, got {getattr(task, field)!r}")
    _TASKS[task.name] = task


def task_names() -> list[str]:
    """The names of all tasks."""
    return [*_TASKS]


def task_of(task_type: Any) -> Task:
    """The record of a configuration's `task_type`, a member of `TaskType` or a name.

    Raises:
        ValueError: there is no such task.
    """
    name = getattr(task_type, "value", task_type)
    if name not in _TASKS:
        raise ValueError(f"task_type: expected one of {', '.join(_TASKS)}, got {name!r}")
    return _TASKS[name]
