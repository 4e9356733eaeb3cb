"""What a run was asked for, and its folder, which knows it: a run goes on with the same settings alone."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "tune.json"
METHODS = ("p-tuning", "prompt-tuning", "prefix", "cpt")
# The highest learning rate of each method, where none is given.
RATES = {"p-tuning": 2e-3, "prompt-tuning": 1e-2, "prefix": 1e-2, "cpt": 1e-3}


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes.

    Attributes:
        model: name or folder. data, held_out_data: SHA-256 of the files. template: of rows; None for a text.
        encoder: of P-tuning, "MLP" or "LSTM". examples: rows in the context of CPT.
        max_length: tokens of a row, without the prompt. held_out: the part of the rows that is not trained on.
        steps, batch_size, learning_rate (the highest), interval (steps), patience (intervals): of the training.
    """

    model: str
    data: str
    method: str
    template: str | None
    held_out_data: str | None
    virtual_tokens: int
    encoder: str
    init_text: str | None
    examples: int
    max_length: int
    skip_long: bool
    held_out: float
    steps: int
    batch_size: int
    learning_rate: float
    interval: int
    patience: int
    dtype: str
    seed: int


def read(folder: Path) -> dict[str, Any] | None:
    """What a run wrote into its folder: `settings`, `data`, `held_out_loss_without_prompt`, and at its end `result`.

    Returns:
        None if the folder is not that of a run.

    Raises:
        ValueError: the file is there and no such thing.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        Settings(**run["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the settings of a run, but they cannot be read: {error}") from None
    return dict(run)


def write(folder: Path, run: dict[str, Any]) -> None:
    """Write them, whole or not at all."""
    write_text(folder / FILE, json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace a file, so that whoever is killed leaves the old one or the new one."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def check_same(folder: Path, run: dict[str, Any], settings: Settings) -> None:
    """Refuse to go on with other settings than a folder's.

    Raises:
        ValueError: some differ; the message names each with both values.
    """
    before, now = run["settings"], dataclasses.asdict(settings)
    different = [
        f"another {name}" if name in ("data", "held_out_data") else f"{name} {before[name]!r}, not {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    if different:
        raise ValueError(
            f"--out: {str(folder)!r} holds another run, with {'; '.join(different)}. "
            "Choose another folder, or ask for the same to go on with it"
        )


def check_new(folder: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ValueError: it does, or is a file.
    """
    if folder.is_dir():
        # A run that was killed as it began has left this.
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != f".{FILE}.new")
        if names:
            raise ValueError(
                f"--out: expected a new or empty folder, or that of a run, got {str(folder)!r} with {names[0]}"
            )
    elif folder.exists():
        raise ValueError(f"--out: expected a folder, got the file {str(folder)!r}")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other process works in a folder. The system knows of it: a process that is killed lets go.

    Raises:
        ValueError: another one does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"--out: expected a folder that no other run is at work in, got {str(folder)!r}") from None
    try:
        yield
    finally:
        os.close(descriptor)
