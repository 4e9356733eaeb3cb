"""Modules of the base model that are trained and saved in full beside a prompt: one copy per adapter.

The names in memory are those of PEFT's `ModulesToSaveWrapper`: `<path>.original_module` and
`<path>.modules_to_save.<adapter>`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .facts import to_device
from .own_forward import replaced_forwards


class SavedModule(nn.Module):
    """Stands in for a module of the base model; calls the active adapter's copy of it, or the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None

    @property
    def current(self) -> nn.Module:
        """The module in use."""
        if self.active is not None and self.active in self.modules_to_save:
            return self.modules_to_save[self.active]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # transformers reads attributes of its heads, such as `weight` or `out_features`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "active"):
                raise
            return getattr(self.current, name)


def for_rows(stand_ins: Iterable[nn.Module], names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
    """Within it, and in its context alone, each row goes through the copies of its own adapter, by `names`.

    A name without a copy, such as `__base__`, has the original. A batch of k times as many rows has each k times, as
    beam search does. None: as outside.

    Args:
        stand_ins: `SavedModule`s, or PEFT's `ModulesToSaveWrapper`s.
    """
    if names is None:
        return contextlib.nullcontext()
    return replaced_forwards({one: functools.partial(_call_by_rows, one, tuple(names)) for one in stand_ins})


def _call_by_rows(stand_in: Any, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Call each adapter's copy on its own rows of the arguments, and put the rows together again."""
    copies_of = dict(stand_in.modules_to_save.items())
    rows_of: dict[nn.Module, list[int]] = {}
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    size, device = first.shape[0], first.device
    copies = size // max(len(names), 1)
    for row in range(size):
        rows_of.setdefault(copies_of.get(names[row // copies], stand_in.original_module), []).append(row)
    if len(rows_of) == 1:
        return next(iter(rows_of))(*args, **kwargs)

    def part(value: Any, rows: Tensor) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    order = [row for rows in rows_of.values() for row in rows]
    back = to_device(torch.tensor(order, device="cpu").argsort(), device)
    results = []
    for module, numbers in rows_of.items():
        rows = to_device(torch.tensor(numbers, device="cpu"), device)
        results.append(module(*(part(v, rows) for v in args), **{k: part(v, rows) for k, v in kwargs.items()}))
    if isinstance(results[0], Tensor):
        return torch.cat(results)[back]
    return tuple(torch.cat(parts)[back] if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*results))


def saved_modules(base: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """The stand-ins in a base model, with their paths."""
    for path, module in base.named_modules():
        if isinstance(module, SavedModule):
            yield path, module


def matching(base: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The base model's modules whose path ends with one of `names`, as PEFT matches them; a parent hides its parts."""
    known = dict(saved_modules(base))
    found: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        hidden = path.startswith(tuple(f"{parent}." for parent in (*known, *found)))
        if path and not hidden and path.endswith(tuple(names)):
            found[path] = known[path].original_module if path in known else module
    return found


def add_copies(base: nn.Module, adapter: str, names: Sequence[str], required: Sequence[str]) -> None:
    """Give an adapter its own copy of every module that `names` match.

    Raises:
        ValueError: one of `required` matches no module.
    """
    found = matching(base, names)
    for name in required:
        if not any(path.endswith(name) for path in found):
            raise ValueError(f"modules_to_save: expected the name of a module of the base model, got {name!r}")
    known = dict(saved_modules(base))
    for path, original in found.items():
        if path not in known:
            known[path] = SavedModule(original)
            _replace(base, path, known[path])
        known[path].modules_to_save[adapter] = copy.deepcopy(original)


def tensors(base: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's copies under the names that PEFT's files give them."""
    copies = ((path, stand_in.modules_to_save) for path, stand_in in saved_modules(base))
    return _named((path, of_path[adapter]) for path, of_path in copies if adapter in of_path)


def expected_tensors(base: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors, by name, that a file must hold for an adapter with these `modules_to_save`."""
    return _named(matching(base, names).items())


def _named(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    return {f"base_model.{path}.{key}": tensor for path, one in modules for key, tensor in one.state_dict().items()}


def remove_copies(base: nn.Module, adapter: str) -> None:
    """Take an adapter's copies away; a stand-in without copies gives way to the original."""
    for path, stand_in in list(saved_modules(base)):
        if adapter in stand_in.modules_to_save:
            del stand_in.modules_to_save[adapter]
        if not stand_in.modules_to_save:
            _replace(base, path, stand_in.original_module)


def _replace(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)
