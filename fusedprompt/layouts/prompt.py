"""One adapter's prompt, as far as layouts need to know it."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.tasks import Task
from .pieces import table_ids
from .template import Template


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place.

    name: of its adapter. method: of its adapter, in PEFT's terms.
    task: what its adapter is for.
    rows: P. start: tokens of each row that stay before it.
    template: where its rows stand, and what stands between them; None for all in front.
    in_cache: it is keys and values, in front of all text, and no rows among the text's.
    """

    name: str
    method: str
    task: Task
    rows: int
    start: int = 0
    template: Template | None = None
    in_cache: bool = False

    @property
    def pattern(self) -> Template | None:
        """The template, unless that is the plain prefix."""
        return None if self.template is None or self.template.is_plain_prefix else self.template

    @property
    def constants(self) -> list[int]:
        """Ids of the template's constant tokens, whose embeddings stand behind the prompt in its table."""
        return [] if self.pattern is None else table_ids(self.pattern)

    @property
    def table_rows(self) -> int:
        """R: rows of its table."""
        return self.rows + len(self.constants)
