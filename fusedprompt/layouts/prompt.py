"""A prompt, as far as layouts need to know it: an adapter's, or that of one of its tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..base.tasks import Task
from .pieces import table_ids
from .shared_text import SharedText
from .template import Template

Source = tuple[str, int | None]  # what a row's prompt comes from: an adapter, and one of its tasks if it has several


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place.

    name: of its adapter. method: of its adapter, in PEFT's terms.
    task: what its adapter is for.
    rows: P. start: tokens of each row that stay before it.
    template: where its rows stand, and what stands between them; None for all in front.
    in_cache: it is keys and values, in front of all text, and no rows among the text's.
    num_tasks: of an adapter that has a prompt for each of so many tasks; None for one prompt. task_id: which it is.
    kept: which rows of its module's product these are; None for the first P.
    shared: text beside it, of whose K tokens the embeddings are rows of it too; None for none.
    """

    name: str
    method: str
    task: Task
    rows: int
    start: int = 0
    template: Template | None = None
    in_cache: bool = False
    num_tasks: int | None = None
    task_id: int | None = None
    kept: tuple[int, ...] | None = None
    shared: SharedText | None = None

    def beside(self, text: SharedText) -> Prompt:
        """With text that stands beside it in every row."""
        return replace(self, rows=self.rows + len(text.ids), shared=text)

    @property
    def encoded_rows(self) -> int:
        """Those that its module makes."""
        return self.rows - (0 if self.shared is None else len(self.shared.ids))

    @property
    def source(self) -> Source:
        """What it comes from."""
        return self.name, self.task_id

    def encodes(self, row: int) -> bool:
        """Whether a row of its table is one that its module makes, and not of a constant token or of text beside it."""
        first = len(self.shared.ids) if self.shared is not None and self.shared.before else 0
        return first <= row < first + self.encoded_rows

    def __str__(self) -> str:
        return self.name if self.task_id is None else f"{self.name}, task {self.task_id}"

    def of_task(self, task_id: int) -> Prompt:
        """That of one of its adapter's tasks."""
        return replace(self, task_id=task_id)

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
