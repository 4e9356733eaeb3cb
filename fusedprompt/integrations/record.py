"""What a patch on a PEFT model is made of, and what it remembers."""

from __future__ import annotations

from typing import Any

from .calls import PeftTask
from .host import PeftHost

PATCH = "_fusedprompt_patch"


class Record:
    """The attributes of a `Patch`. host: its model, as routes see it. task: what its model's forward does.

    automatic: nobody asked for it for this model.
    """

    automatic = False

    def __init__(
        self, model: Any, backend: str, route: str, fix: bool, task: PeftTask | None, left_alone: dict[str, str]
    ) -> None:
        self.model, self.backend, self.route, self.fix = model, backend, route, fix
        self.task, self.left_alone = task, left_alone
        self.host = PeftHost(model, backend, route, None if task is None else task.task)
        self.replaced: dict[str, Any] = {}
        self.refused: set[str] = set()
        self.spliced: set[str] = set()
        self.generated_alone: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether the model is patched still."""
        return record_on(self.model) is self


def record_on(model: Any) -> Any:
    """The patch on a PEFT model, or None."""
    return vars(model).get(PATCH)
