"""A program run in this process as if Python had been started with it."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import types
from collections.abc import Sequence
from types import CodeType, TracebackType
from typing import Any


class Enough(BaseException):
    """Ends a program early. No Exception: programs catch those."""


def run_script(path: str, arguments: Sequence[str]) -> None:
    """What `python path arguments...` does, its errors included."""
    absolute = os.path.abspath(path)
    _find_imports_in(os.path.dirname(os.path.realpath(path)))
    sys.argv = [path, *arguments]
    main = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", absolute)
    vars(main).update(__file__=absolute, __builtins__=builtins, __loader__=loader, __cached__=None)
    sys.modules["__main__"] = main
    _call(_run_file, absolute, vars(main))


def run_module(name: str, arguments: Sequence[str]) -> None:
    """What `python -m name arguments...` does, its errors included."""
    _find_imports_in(os.getcwd())
    sys.argv = [name, *arguments]
    _call(runpy.run_module, name, None, "__main__", True)


def _find_imports_in(folder: str) -> None:
    """The first place where a program's imports are looked for; until now it is that of `python -m` or of a command."""
    if not getattr(sys.flags, "safe_path", False):  # with it, Python puts none there
        sys.path[0] = folder


def _run_file(path: str, names: dict[str, Any]) -> None:
    with io.open_code(path) as file:
        source = file.read()
    code: CodeType = compile(source, path, "exec", dont_inherit=True)
    exec(code, names)


def _call(run: Any, *args: Any) -> None:
    """Call; the traceback of an error that leaves begins with the program's first line."""
    try:
        run(*args)
    except BaseException:
        hook = sys.excepthook

        def of_program(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            shown = _without_ours(trace)
            hook(kind, error.with_traceback(shown), shown)

        sys.excepthook = of_program
        raise


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """What is below the function that called the program."""
    below = trace
    while below is not None and below.tb_frame.f_code is not _call.__code__:
        below = below.tb_next
    if below is None:  # another error, of later
        return trace
    below = below.tb_next
    while below is not None and below.tb_frame.f_code.co_filename in _OURS:
        below = below.tb_next
    return below


_OURS = (__file__, runpy.__file__, "<frozen runpy>")
