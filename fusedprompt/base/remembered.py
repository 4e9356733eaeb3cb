"""What is remembered of a module as long as it lives."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import nn

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """A value for each module. By its id and not in a `WeakKeyDictionary`: torch.compile would look at all its keys,
    compile again for each module that joins them, and fail where one goes while it compiles."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}

    def get(self, module: nn.Module) -> Value | None:
        return self._values.get(id(module))

    def put(self, module: nn.Module, value: Value) -> None:
        if id(module) not in self._values:
            weakref.finalize(module, self._values.pop, id(module), None).atexit = False
        self._values[id(module)] = value

    def clear(self) -> None:
        self._values.clear()
