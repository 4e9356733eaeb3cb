"""A bank's folder: an index that is only ever appended to, and one safetensors file for each version of a prompt.

    index.jsonl       a line of the bank's sizes, then a line for each prompt that is added or removed
    rows/17.safetensors
    lock              held by the one process that is writing

A version's rows are written under another name, flushed and renamed before its line is appended, so that a line always
has its file. A writer that dies leaves at most a file without a line, which the next one writes over, and a line
without its end, which readers leave out and the next writer cuts off. No name of a prompt is part of a path.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..methods import checkpoint
from .entry import Entry

INDEX, ROWS, LOCK, KEY = "index.jsonl", "rows", "lock", "rows"
VERSION = 1


@dataclass(frozen=True)
class Sizes:
    """What all prompts of a bank share.

    base: the base model's name, or None. vocabulary: V, the tokens of its input embedding. width: D.
    first: the first id of a prompt's row, above V. serial, next: of the next version, and its first id, at least.
    """

    base: str | None
    vocabulary: int
    width: int
    first: int
    serial: int = 1
    next: int = 0

    def __post_init__(self) -> None:
        for name, least in (("vocabulary", 1), ("width", 1), ("first", self.vocabulary), ("serial", 1), ("next", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


@dataclass
class Contents:
    """What an index says.

    by_name: the present version of each prompt. serial, next: of the next version, and its first id.
    skipped: prompts (or lines) that were left out, with the reason. end: bytes of its whole lines. lines: how many.
    """

    sizes: Sizes
    by_name: dict[str, Entry] = field(default_factory=dict)
    serial: int = 1
    next: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    end: int = 0
    lines: int = 0

    def take(self, record: dict[str, Any]) -> Entry | None:
        """Do what a line says.

        Raises:
            ValueError: it says nothing that is known.
        """
        if "add" in record:
            entry = Entry.of_record(record["add"])
            self.by_name[entry.name] = entry
            self.serial, self.next = max(self.serial, entry.serial + 1), max(self.next, entry.first + entry.rows)
            return entry
        if "remove" in record:
            self.by_name.pop(str(record["remove"]), None)
            return None
        raise ValueError(f"expected 'add' or 'remove', got {sorted(record)}")


class BankFolder:
    """The files of a bank."""

    def __init__(self, path: checkpoint.PathLike) -> None:
        self.path = Path(path)
        self.index = self.path / INDEX

    def exists(self) -> bool:
        """Whether there is a bank."""
        return self.index.is_file()

    def create(self, sizes: Sizes) -> None:
        """Make an empty bank, unless another process has just made one."""
        if self.path.is_file():
            raise NotADirectoryError(f"folder: expected a folder, got the file {self.path}")
        (self.path / ROWS).mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not self.exists():
                self._replace(sizes, ())

    def read(self) -> Contents:
        """What the index says now.

        Raises:
            ValueError: its first line is not that of a bank.
        """
        data = self.index.read_bytes()
        end = data.rfind(b"\n") + 1
        head, *lines = data[:end].split(b"\n")[:-1] or [b""]
        contents = Contents(self._sizes(head), end=end, lines=len(lines))
        contents.serial, contents.next = contents.sizes.serial, max(contents.sizes.next, contents.sizes.first)
        for number, line in enumerate(lines, 2):
            try:
                contents.take(json.loads(line))
            except (ValueError, TypeError) as error:  # json's are ValueErrors too
                contents.skipped[f"line {number} of {INDEX}"] = str(error)
        self._leave_out(contents)
        return contents

    def read_sizes(self) -> Sizes:
        """What the first line of the index says."""
        with open(self.index, "rb") as file:
            return self._sizes(file.readline())

    def _sizes(self, head: bytes) -> Sizes:
        try:
            fields = json.loads(head)
            if fields.pop("fusedprompt_bank") != VERSION:
                raise ValueError(f"expected version {VERSION}")
            return Sizes(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.index}: expected a bank's index, but line 1 cannot be read: {error}") from None

    def _leave_out(self, contents: Contents) -> None:
        """Prompts whose files are not as long as they were: known without reading one of them."""
        with os.scandir(self.path / ROWS) as files:
            found = {file.name: file.stat().st_size for file in files}
        for name, entry in [*contents.by_name.items()]:
            size = found.get(self.file(entry).name)
            if size != entry.size:
                has = "is not there" if size is None else f"has {size} bytes"
                contents.skipped[name] = f"{self.file(entry)}: expected {entry.size} bytes, but it {has}"
                del contents.by_name[name]

    def state(self) -> tuple[int, int, int]:
        """Which file the index is, how long, and of when: it has changed when this has."""
        found = self.index.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def file(self, entry: Entry) -> Path:
        """A version's rows."""
        return self.path / ROWS / f"{entry.serial}.safetensors"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other process, or other bank of this one, writes."""
        import fcntl  # of Linux and macOS: models are imported elsewhere too

        with open(self.path / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file gives it back
            yield

    def write_rows(self, serial: int, rows: Tensor) -> int:
        """Write a version's rows; how many bytes the file has."""
        partial, final = (self.path / ROWS / f"{serial}.{end}" for end in ("partial", "safetensors"))
        checkpoint.write_tensors(partial, {KEY: rows})
        checkpoint.flush(partial)
        os.replace(partial, final)
        return final.stat().st_size

    def append(self, records: Iterable[dict[str, Any]], end: int) -> int:
        """Append lines behind the first `end` bytes, the whole lines; returns how many bytes these then are."""
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        checkpoint.flush(self.path / ROWS)
        with open(self.index, "r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return end + len(text)

    def compact(self, contents: Contents) -> None:
        """Write the index anew without what is past, and delete files that it does not name."""
        sizes = Sizes(**{**asdict(contents.sizes), "serial": contents.serial, "next": contents.next})
        self._replace(sizes, (entry.to_record() for entry in contents.by_name.values()))
        kept = {self.file(entry).name for entry in contents.by_name.values()}
        for file in (self.path / ROWS).iterdir():
            if file.name not in kept:
                file.unlink(missing_ok=True)

    def _replace(self, sizes: Sizes, records: Iterable[dict[str, Any]]) -> None:
        lines = [{"fusedprompt_bank": VERSION, **asdict(sizes)}, *records]
        partial = self.path / f"{INDEX}.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        checkpoint.flush(partial)
        os.replace(partial, self.index)
        checkpoint.flush(self.path)

    def read_rows(self, entry: Entry, width: int) -> Tensor:
        """A version's rows (P, D) in memory of their own: a file that changes later cannot change them.

        Raises:
            ValueError: the file is gone, or holds anything else; the prompt and the file are named.
        """
        file = self.file(entry)
        try:
            tensors, _ = checkpoint.read_tensors(file)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{entry}: {error}") from None
        rows = tensors.get(KEY)
        if rows is None or rows.shape != (entry.rows, width) or checkpoint.fingerprint(rows) != entry.digest:
            raise ValueError(f"{entry}: expected {file} to hold its {entry.rows} rows, but it holds something else")
        return rows.clone()
