"""A run's learning curve, from what Trainer keeps of it: lines, a table and a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import figures


@dataclass(frozen=True)
class Point:
    """One interval. Losses are in nats per token that is learned: the interval's mean, and the one at its end."""

    step: int
    loss: float
    held_out: float
    learning_rate: float


def points(history: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The intervals in a `log_history`."""
    trained = {entry["step"]: entry for entry in history if "loss" in entry}
    watched = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return [
        Point(step, float(entry["loss"]), float(watched[step]), float(entry["learning_rate"]))
        for step, entry in sorted(trained.items())
        if step in watched
    ]


def best(curve: list[Point]) -> Point | None:
    """The first with the lowest loss on held-out rows; None if there is no finite one."""
    return min((one for one in curve if math.isfinite(one.held_out)), key=lambda one: one.held_out, default=None)


def is_over(curve: list[Point], steps: int, patience: int) -> bool:
    """Whether a run has made all its steps, or its last `patience` intervals (0: any number) have brought nothing."""
    if not curve or curve[-1].step >= steps:
        return bool(curve)
    lowest = best(curve)
    since = sum(one.step > (lowest.step if lowest else 0) for one in curve)
    return 0 < patience <= since


def as_csv(curve: list[Point]) -> str:
    """A table of the intervals; the same for runs that are."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("step", "loss", "held_out_loss", "learning_rate"))
    writer.writerows((one.step, one.loss, one.held_out, one.learning_rate) for one in curve)
    return file.getvalue()


def draw(path: Path, curve: list[Point], without: float, title: str) -> None:
    """Both losses over the steps, and the held-out one without a prompt."""
    figure, axes = figures.new(1, 1)
    axis, steps = axes[0][0], [one.step for one in curve]
    axis.plot(steps, [one.loss for one in curve], color="tab:blue", alpha=0.35, label="training")
    axis.plot(steps, [one.held_out for one in curve], color="tab:blue", marker="o", markersize=3, label="held out")
    axis.axhline(without, color="gray", linestyle="--", label=f"held out, without a prompt ({without:.3f})")
    lowest = best(curve)
    if lowest is not None:
        axis.plot([lowest.step], [lowest.held_out], "o", color="tab:orange", label=f"kept ({lowest.held_out:.3f})")
    axis.set(title=title, ylabel="loss (nats per learned token)")
    figures.finish(figure, path, "steps")
