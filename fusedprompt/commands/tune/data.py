"""Rows of a file to learn from: JSON lines or CSV. Whatever is wrong with one is told with file and line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (".jsonl", ".csv", ".txt")


@dataclass(frozen=True)
class Row:
    """One example. place: "file, line 3", where it came from; fields: its texts by column."""

    place: str
    fields: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A file's text. sha256: of its bytes, so that a run does not go on with other data."""

    path: Path
    text: str
    sha256: str

    @classmethod
    def read(cls, path: Path, argument: str = "--data") -> Source:
        """Read a whole file.

        Raises:
            ValueError: its name ends in none of `KINDS`, or it is empty, or no UTF-8; a byte order mark is allowed.
        """
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"{argument}: expected a file that ends in {', '.join(KINDS)}, got {str(path)!r}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{argument}: expected a file, got {str(path)!r}: {error.strerror}") from error
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"{path}, line {line}: expected UTF-8 text, got byte 0x{content[error.start]:02x}"
            ) from None
        if not text.strip():
            raise ValueError(f"{argument}: expected text in {str(path)!r}, got an empty file")
        return cls(path, text, hashlib.sha256(content).hexdigest())

    @property
    def is_plain_text(self) -> bool:
        """Whether it is a text, and not rows."""
        return self.path.suffix.lower() == ".txt"

    def rows(self, needed: Sequence[str]) -> list[Row]:
        """All rows, with the columns that are needed.

        Raises:
            ValueError: there is no row, or one cannot be read, lacks a column or has no text there.
        """
        read = self._csv if self.path.suffix.lower() == ".csv" else self._json_lines
        rows = [Row(place, {name: _text(place, name, values, needed) for name in needed}) for place, values in read()]
        if not rows:
            raise ValueError(f"{self.path}: expected rows, got the names of columns alone")
        return rows

    def _json_lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(self.text.split("\n"), 1):
            place = f"{self.path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: expected a JSON object, but it cannot be read: {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{place}: expected a JSON object, got {line.strip()[:40]!r}")
            yield place, values

    def _csv(self) -> Iterator[tuple[str, dict[str, Any]]]:
        reader = csv.reader(io.StringIO(self.text, newline=""), strict=True)
        try:
            names = next(reader)
            for values in reader:
                place = f"{self.path}, line {reader.line_num}"
                if not values:
                    continue
                if len(values) != len(names):
                    raise ValueError(f"{place}: expected {len(names)} columns, as in the first line, got {len(values)}")
                yield place, dict(zip(names, values))
        except csv.Error as error:
            raise ValueError(
                f"{self.path}, line {reader.line_num}: expected CSV, but it cannot be read: {error}"
            ) from None


def _text(place: str, name: str, values: dict[str, Any], needed: Sequence[str]) -> str:
    if name not in values:
        wanted, present = (", ".join(map(repr, names)) for names in (needed, values))
        raise ValueError(f"{place}: expected the columns {wanted} of the template, got {present}")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{place}: column {name!r}: expected a text or a number, got {json.dumps(value)[:40]}")
    if not str(value).strip():
        raise ValueError(f"{place}: column {name!r}: expected a text, got none")
    return str(value)
