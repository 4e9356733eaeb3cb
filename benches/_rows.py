"""Lines of JSON in a file that a killed process leaves whole: each is one write to the end of it, made at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, value: Any) -> None:
    """Add one line. Several processes may add to the same file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(value).encode() + b"\n")
    finally:
        os.close(file)


def read(path: Path) -> list[Any]:
    """All values, without a last line that has no end."""
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
