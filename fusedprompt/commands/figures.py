"""Pictures of learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes, (rows, columns)."""
    # Not pyplot: it would look for a window system and keep the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 3.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(figure: Any, path: Path, horizontal: str) -> None:
    """Label the axes, and write a PNG."""
    for axis in figure.axes:
        axis.set_xlabel(horizontal)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120, format="png")
