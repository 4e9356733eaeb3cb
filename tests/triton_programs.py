"""Triton's interpreter, less kind: programs run in shuffled order, and every launch accounts for what it stored.

A GPU promises no order of programs; the interpreter runs them one after another. And where two programs store the same
element, or none does, the result may look right: the last store wins, and memory may hold what an earlier call left.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch


class StoresWrong(AssertionError):
    """A launch left an element of an output unwritten, wrote it more than once, or stored elsewhere."""


class _Launch:
    def __init__(self, kernel: str, number: int) -> None:
        self.kernel = kernel
        self.random = np.random.default_rng(number)
        self.order: list[tuple[int, int, int]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.stored: list[np.ndarray] = [np.zeros(0, np.uint64)]

    def check(self) -> None:
        """Every tensor that is stored to at all is an output: each of its elements was stored once."""
        stored = np.concatenate(self.stored).astype(np.int64)
        accounted = np.zeros(len(stored), bool)
        for name, tensor in self.tensors.items():
            at = stored - tensor.data_ptr()
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            inside = (at >= 0) & (at < span * tensor.element_size())
            accounted |= inside
            if not inside.any():
                continue
            times = np.bincount(at[inside] // tensor.element_size(), minlength=span)
            elements = torch.arange(span).as_strided(tensor.shape, tensor.stride()).flatten().numpy()
            wrong = elements[times[elements] != 1]
            if len(wrong) or times.sum() != len(elements):
                first = f"element {wrong[0]} {times[wrong[0]]} times" if len(wrong) else "what lies between its rows"
                raise StoresWrong(f"{self.kernel} stored {first} in {name}, {len(wrong)} of {len(elements)} not once")
        if not accounted.all():
            raise StoresWrong(f"{self.kernel} stored {int((~accounted).sum())} elements outside its arguments")


@contextlib.contextmanager
def shuffled_and_accounted_for() -> Iterator[None]:
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    numbers, launches = itertools.count(), []

    def around(method: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            changed = before(self, *args)
            return method(self, *(args if changed is None else changed), **kwargs)

        return wrapped

    def set_grid_dim(self: Any, *grid: int) -> None:
        order = list(itertools.product(*map(range, grid)))
        launches[-1].order = [order[index] for index in launches[-1].random.permutation(len(order))]

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> tuple[int, int, int]:
        _, height, depth = self.grid_dim
        return launches[-1].order[(x * height + y) * depth + z]

    def store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        launches[-1].stored.append(pointers.data[mask.data])

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(_Launch(self.fn.__name__, next(numbers)))
        try:
            run(self, *args, **kwargs)
            launches[-1].check()
        finally:
            launches.pop()

    def host_arguments(self: Any, *args: Any) -> Any:
        positional, named = to_host(self, *args)
        given = {**dict(zip(self.arg_names, positional)), **named}
        launches[-1].tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        return positional, named

    run, to_host = executor.__call__, executor._init_args_hst
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", around(builder.set_grid_dim, set_grid_dim))
        patch.setattr(builder, "set_grid_idx", around(builder.set_grid_idx, set_grid_idx))
        patch.setattr(builder, "create_masked_store", around(builder.create_masked_store, store))
        patch.setattr(executor, "__call__", call)
        patch.setattr(executor, "_init_args_hst", host_arguments)
        yield
