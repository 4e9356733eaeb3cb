"""`FusedPromptCallback`: transformers' Trainer trains a PEFT model on these ops and routes."""

from __future__ import annotations

import functools
import sys
from typing import Any

from ..ops._backend import AUTO, checked_name
from ..routes.choice import checked_route
from .patch import Patch
from .peft import apply_automatically, patch_of


class FusedPromptCallback:
    """A callback of transformers' Trainer that applies `fusedprompt.apply` to its PEFT model for the training.

        trainer = Trainer(model=peft_model, ..., callbacks=[FusedPromptCallback()])

    The model is patched when the trainer is made, because the patch belongs below whatever Trainer wraps a model in
    then, and given back at the end of training, with a report. Another `train()` patches it again. If training ends in
    an error the model stays patched, for the next try; `revert` gives it back. A model that was patched by hand stays
    as it is, before and after.

    Args:
        backend, route, fix: as of `apply`.
        report: print the report at the end of training, to stderr, in the main process.

    Attributes:
        patch: the latest `Patch`; None before the first, and where the model was patched by hand.

    Raises:
        TypeError, ValueError, RuntimeError, BackendUnavailable: as `apply`, when the trainer is made.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        kind: Any = cls
        return super().__new__(_trainer_callback(kind))

    def __init__(self, backend: str = AUTO, route: str = AUTO, fix: bool = False, report: bool = True) -> None:
        self.backend, self.route = checked_name("backend", backend), checked_route(route)
        self.fix, self.report = fix, report
        self.patch: Patch | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has patched nothing."""
        return FusedPromptCallback, (self.backend, self.route, self.fix, self.report)

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The trainer is made."""
        self._apply(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Another training, or one of a model that was made for it."""
        self._apply(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training is over."""
        if self.patch is not None and self.patch.active and self.report and state.is_world_process_zero:
            print(self.patch, file=sys.stderr, flush=True)
        self.revert()

    def revert(self) -> None:
        """Give the model back as it was."""
        if self.patch is not None:
            self.patch.revert()

    def _apply(self, wrapped: Any) -> None:
        if wrapped is None:
            return
        import peft

        model = next((one for one in wrapped.modules() if isinstance(one, peft.PeftModel)), wrapped)
        before = patch_of(model)
        if before is None or (before.automatic and before is not self.patch):
            self.patch = apply_automatically(model, self.backend, self.route, self.fix)


@functools.cache
def _trainer_callback(kind: Any) -> Any:
    """A subclass that is transformers' callback too. Made when it is used: to name it imports nothing."""
    from transformers import TrainerCallback

    if issubclass(kind, TrainerCallback):
        return kind
    return type(kind.__name__, (kind, TrainerCallback), {"__module__": kind.__module__, "__doc__": kind.__doc__})
