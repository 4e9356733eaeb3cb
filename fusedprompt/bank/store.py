"""Prompts in a folder and in memory: their versions, and who may read and write them when."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import checkpoint
from ..methods.config import CONFIG_NAME
from . import sources
from .entry import Entry, check_name, dtype_name
from .folder import BankFolder, Contents, Sizes
from .resident import Resident, Rows

_CPU = torch.device("cpu")


class PromptStore:
    """The prompts of a bank, by name and by id: adding, reading and forgetting them. See `PromptBank`."""

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, base_model: Any = None, *, max_bytes: int = 1 << 30
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_bytes: expected an int >= 0, got {max_bytes!r}")
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fusedprompt-bank-")
            folder = self._temporary.name
        self._folder, self._lock = BankFolder(folder), threading.RLock()
        self._resident = Resident(max_bytes)
        self._by_id: tuple[list[int], list[Entry]] = ([], [])  # versions that answer, by their first ids
        if not self._folder.exists():
            if base_model is None:
                raise ValueError(f"base_model: expected a transformers model for a new bank in {folder}, got None")
            self._folder.create(_sizes_of(base_model))
        elif base_model is not None:
            self._check_base(base_model)
        self._load()

    def __repr__(self) -> str:
        return f"PromptBank({str(self.folder)!r}): {len(self)} prompts of width {self.width}"

    def __len__(self) -> int:
        return len(self._contents.by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._contents.by_name

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), max_bytes=self.max_bytes), (str(self.folder),)

    def __deepcopy__(self, memo: Any) -> PromptStore:
        return self  # of a model that is copied, too: it is a folder

    @property
    def folder(self) -> Path:
        """Where the prompts are."""
        return self._folder.path

    @property
    def vocabulary(self) -> int:
        """V: the tokens of the base model's input embedding, when the bank was made."""
        return self._contents.sizes.vocabulary

    @property
    def width(self) -> int:
        """D."""
        return self._contents.sizes.width

    @property
    def first_id(self) -> int:
        """The least id of a prompt's row. Some ids behind the vocabulary are left for tokens that are added later."""
        return self._contents.sizes.first

    @property
    def skipped(self) -> dict[str, str]:
        """Prompts that were left out when the folder was read, each with the reason."""
        return dict(self._contents.skipped)

    @property
    def max_bytes(self) -> int:
        """How much memory rows may take that are kept between uses; as it was given."""
        return self._resident.max_bytes

    def nbytes(self) -> int:
        """Bytes of rows that are in memory now."""
        return self._resident.nbytes

    @property
    def names(self) -> list[str]:
        """The prompts, in the order in which they were first added."""
        return [*self._contents.by_name]

    def rows(self, name: str) -> Tensor:
        """A prompt's rows, (P, D) on the CPU, in the dtype in which they were added; shared, and not to be changed.

        Raises:
            ValueError: there is no such prompt, or its file is not what was written.
        """
        return self._module(self._version(name), _CPU).weight.detach()

    def ids(self, name: str) -> list[int]:
        """The P ids of a prompt's rows, of its present version. They answer until `purge`, whatever is added later.

        Raises:
            ValueError: there is no such prompt.
        """
        entry = self._version(name)
        return [*range(entry.first, entry.first + entry.rows)]

    def prefetch(self, names: Iterable[str]) -> None:
        """Read prompts into memory, in this thread; another one's calls go on meanwhile."""
        for entry in [self._version(name) for name in names]:
            self._module(entry, _CPU)

    def add(self, name: str, source: Any, *, adapter_name: str | None = None, task_id: int | None = None) -> None:
        """Add a prompt, or a new version of it; calls that run keep the old one. Nothing changes if this raises.

        Args:
            name: 1 to 200 printable characters without < and >.
            source: rows (P, D) of a floating-point dtype, an adapter's folder, ours or PEFT's, or its name on the Hub,
                or a `PromptModel`.
            adapter_name: which of a `PromptModel`'s, the active one by default.
            task_id: which prompt of an adapter that has one for each task.

        Raises:
            TypeError, ValueError: the name or the source breaks its rule; prefixes, which are keys and values,
                templates, and adapters with modules of their own are refused.
            FileNotFoundError: the source is not there.
        """
        check_name(name)
        self._add({name: sources.rows_of(source, self.width, adapter_name, task_id)})

    def add_all(self, prompts: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, str]:
        """Add many at once, which is faster than one by one. One that cannot be read is left out.

        Args:
            prompts: names with their sources, or a folder of adapters' folders, whose names are theirs.

        Returns:
            Those that were left out, with the reason, which names file or argument. They are warned of, too.
        """
        if not isinstance(prompts, Mapping):
            root = Path(prompts)
            if not root.is_dir():
                raise FileNotFoundError(f"prompts: expected a folder of adapters, got {root}, which is none")
            prompts = {one.name: one for one in sorted(root.iterdir()) if (one / CONFIG_NAME).is_file()}
        rows, left_out = dict[str, Tensor](), dict[str, str]()
        for name, source in prompts.items():
            try:
                rows[check_name(name)] = sources.rows_of(source, self.width, None, None)
            except (ValueError, TypeError, OSError) as error:
                left_out[str(name)] = str(error)
        self._add(rows)
        _warn(left_out)
        return left_out

    def remove(self, name: str) -> None:
        """Remove a prompt; calls that run keep it, and its ids answer until `purge`.

        Raises:
            ValueError: there is no such prompt.
        """
        self._version(name)
        with self._writing() as contents:
            self._version(name)
            contents.end = self._folder.append([{"remove": name}], contents.end)
            self._state = self._folder.state()
            del contents.by_name[name]

    def purge(self) -> None:
        """Forget versions that were replaced or removed, and what was skipped, here and in the folder.

        Their ids answer no more: call it when nothing runs that was begun with them, in any process that has the folder
        open. Calls of a `PromptModel` that run keep what they have.
        """
        with self._writing() as contents:
            self._folder.compact(contents)
            gone = {entry.serial for entry in self._by_id[1]}
            self._load()
            self._resident.drop(gone - {entry.serial for entry in self._by_id[1]})

    def refresh(self) -> None:
        """See what other processes have written since."""
        with self._lock:
            if self._folder.state() != self._state:
                self._load(keep=True)

    # Within the package

    def _look_up(self, ids: Tensor, device: torch.device) -> Tensor:
        """(n, D): the rows of n ids, on a device.

        Raises:
            IndexError: an id is none of a row's.
        """
        distinct, place = torch.unique(ids.cpu(), return_inverse=True)
        values, entries, at = distinct.tolist(), list[Entry](), list[int]()
        count = 0
        for value in values:
            if not entries or value >= entries[-1].first + entries[-1].rows:
                count += entries[-1].rows if entries else 0
                entries.append(self._of_id(value))
            at.append(count + value - entries[-1].first)
        table = torch.cat([self._module(entry, device).weight for entry in entries])
        return table[torch.tensor(at, device="cpu")[place].to(device)]

    def _of_id(self, value: int) -> Entry:
        starts, entries = self._by_id
        index = bisect_right(starts, value) - 1
        if index < 0 or value >= entries[index].first + entries[index].rows:
            raise IndexError(f"input_ids: expected a token's id or a prompt row's, got {value}, which is neither")
        return entries[index]

    def _version(self, name: str) -> Entry:
        """The present version of a prompt."""
        entry = self._contents.by_name.get(name)
        if entry is not None:
            return entry
        reason = self._contents.skipped.get(name)
        if reason is not None:
            raise ValueError(f"name: expected a prompt of the bank that can be read, got {name!r}: {reason}")
        raise ValueError(f"name: expected one of the bank's {len(self)} prompts, got {name!r}")

    def _module(self, entry: Entry, device: torch.device) -> Rows:
        """A version's rows as a frozen module on a device."""
        return self._resident.get((entry.serial, device), lambda: self._folder.read_rows(entry, self.width).to(device))

    def _add(self, prompts: Mapping[str, Tensor]) -> None:
        with self._writing() as contents:
            entries, serial, first = list[Entry](), contents.serial, contents.next
            for name, rows in prompts.items():
                size, digest = self._folder.write_rows(serial, rows), checkpoint.fingerprint(rows)
                entries.append(Entry(name, serial, first, rows.shape[0], dtype_name(rows), size, digest))
                serial, first = serial + 1, first + rows.shape[0]
            contents.end = self._folder.append([entry.to_record() for entry in entries], contents.end)
            self._state = self._folder.state()
            starts, known = self._by_id
            for entry in entries:
                known.append(entry)  # before its id, which a reader looks for
                starts.append(entry.first)
                contents.skipped.pop(entry.name, None)
                contents.by_name[entry.name] = entry
            contents.serial, contents.next = serial, first

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Contents]:
        """Within the block nobody else writes, and what others wrote is known."""
        with self._lock, self._folder.locked():
            if self._folder.state() != self._state:
                self._load(keep=True)
            yield self._contents

    def _load(self, keep: bool = False) -> None:
        """Read the index. keep: ids of versions that are past go on answering."""
        contents = self._folder.read()
        entries = {entry.serial: entry for entry in self._by_id[1]} if keep else {}
        entries |= {entry.serial: entry for entry in contents.by_name.values()}
        known = sorted(entries.values(), key=lambda entry: entry.first)
        self._by_id = ([entry.first for entry in known], known)
        self._contents, self._state = contents, self._folder.state()
        _warn(contents.skipped)

    def _check_base(self, base_model: Any) -> None:
        """Refuse a base model that is not the bank's, by its input embedding; tokens may have been added to it."""
        sizes = self._folder.read_sizes()
        vocabulary, width = table_of(base_model).shape
        if width != sizes.width or not sizes.vocabulary <= vocabulary <= sizes.first:
            raise ValueError(
                f"base_model: expected the bank's, of width {sizes.width} and {sizes.vocabulary} tokens (up to "
                f"{sizes.first} if some were added), got one of width {width} and {vocabulary} tokens"
            )


def _sizes_of(base_model: Any) -> Sizes:
    table = table_of(base_model)
    vocabulary, width = table.shape
    # Above V even if that is a power of two: tokens that are added later get ids of their own.
    name = getattr(base_model, "name_or_path", None) or None
    return Sizes(name, int(vocabulary), int(width), 1 << int(vocabulary).bit_length())


def table_of(base_model: Any) -> Tensor:
    """The table (V, D) of a model's input embedding.

    Raises:
        TypeError: it is no transformers model, or its input embedding has no such table.
    """
    find = getattr(base_model, "get_input_embeddings", None)
    table = getattr(find() if find is not None else None, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2:
        kind = type(base_model).__name__
        raise TypeError(f"base_model: expected a transformers model with a table of input embeddings, got {kind}")
    return table


def _warn(left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        warnings.warn(f"{name!r} is left out: {reason}", stacklevel=4)
