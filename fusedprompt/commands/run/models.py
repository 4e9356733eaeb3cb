"""What becomes of the models that a program makes, and the report of it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .program import Enough


@dataclass
class _Made:
    """A model with prompt learning. text: the report as it was made; whether it is one of a patch; what calls told."""

    model: weakref.ref[Any]
    text: str
    is_patched: bool
    calls: dict[str, set[str]] = field(default_factory=dict)


class Models:
    """Patches models as they are made; nothing that goes wrong there reaches the program.

    It keeps no model: programs make many, one after another.
    """

    def __init__(self, backend: str, route: str, fix: bool, dry_run: bool) -> None:
        self.asked, self.dry_run = (backend, route, fix), dry_run
        self.made: list[_Made] = []
        self.others = Counter[str]()
        self.failure: str | None = None
        self._process = os.getpid()

    def watch(self) -> None:
        """Begin as soon as PEFT is imported. Not before: programs set variables that libraries read then."""
        _when_imported("peft", self._begin)

    def _begin(self) -> None:
        try:
            from ...integrations.creation import watch

            watch(self._serve)
        except Exception as error:  # the program knows nothing of this package
            self.failure = _of(error)

    def _serve(self, model: Any) -> None:
        try:
            self._patch(model)
        except Exception as error:  # likewise
            name = type(model).__name__
            self.made.append(_Made(weakref.ref(model), f"{name} is as PEFT made it: {_of(error)}", False))

    def _patch(self, model: Any) -> None:
        from ...integrations import peft as integration

        if not integration.learns_prompts(model):
            self.others[str(model.peft_config[model.active_adapter].peft_type.value)] += 1
            return
        if integration.patch_of(model) is not None:
            return
        patch = integration.apply_automatically(model, *self.asked)
        calls = {
            "calls that went to PEFT": patch.refused,
            "calls of generate without a shared prompt": patch.generated_alone,
            "calls that were spliced": patch.spliced,
        }
        self.made.append(_Made(weakref.ref(model), patch.report(), True, calls))
        if self.dry_run:
            patch.revert()
            for module in (model, model.base_model):  # PEFT's `generate` calls the latter alone
                module.register_forward_pre_hook(_stop)

    def report(self) -> str:
        """What was done with all of them, in words; those of which the same is to be said together."""
        if self.failure is not None:
            return f"fusedprompt run: nothing is patched: {self.failure}"
        told = Counter(map(self._describe, self.made))
        patched = sum(one.is_patched for one in self.made)
        verb = "would be patched" if self.dry_run else "patched"
        head = f"fusedprompt run: {patched} model{'s' * (patched != 1)} with prompt learning {verb}"
        if self.others:
            kinds = ", ".join(f"{number} of {kind}" for kind, number in self.others.items())
            head += f"; left as they are: {kinds}"
        if "peft" not in sys.modules:
            head += "; PEFT was not imported"
        return "\n".join([head, *(text if n == 1 else f"{n} times: {text}" for text, n in told.items())])

    def _describe(self, one: _Made) -> str:
        model = one.model()
        if not one.is_patched or self.dry_run:
            return one.text
        if model is None:
            later = [f"  {what}: {reason}" for what, reasons in one.calls.items() for reason in sorted(reasons)]
            return "\n".join([one.text, *later, "  (as it was when the model was made, which is gone)"])
        from ...integrations.peft import patch_of

        patch = patch_of(model)  # the program may have put another in its place
        return f"{type(model).__name__}: the program reverted the patch" if patch is None else str(patch)

    def print_report(self) -> None:
        """To stderr, once of all processes."""
        if os.getpid() != self._process or _rank() != 0:
            return
        try:
            sys.stdout.flush()  # of a program whose output goes into one file, it comes last
            print(self.report(), file=sys.stderr, flush=True)
        except Exception as error:  # the program's end is more important
            print(f"fusedprompt run: no report: {_of(error)}", file=sys.__stderr__)


def _of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _stop(*args: Any) -> None:
    raise Enough


def _rank() -> int:
    """This process's number among those of a launcher."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _when_imported(name: str, then: Callable[[], None]) -> None:
    """Call a function when a package has been imported."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one package as the others do, and calls a function behind its code, the first time."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then, self.is_asking = name, then, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_asking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
