"""A batch whose rows use different prompts: which one each row gets, and where it stands.

A row's prompt is that of an adapter, or of one of its tasks. The distinct ones, each encoded once, are one table; a
row's slots point at the rows of its own. A shorter prompt makes up for its missing rows by padding: in front in a
causal model, behind in an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.facts import BaseFacts, to_device
from ..base.tasks import Task
from .layout import IGNORE_INDEX, Layout
from .padding import count_padding, may_be_padded
from .prompt import Prompt, Source

BASE = "__base__"  # PEFT's name for rows without an adapter


@dataclass(frozen=True)
class Mixture:
    """The prompts of a batch, row by row.

    sources: one per row, (BASE, None) for none. prompts: the distinct ones, by the adapters' first rows and task ids.
    table_rows: R, of the whole batch's prompts.
    task: the adapters' task; the active adapter's if no row has one.
    rows: (4, B) int64: each row's prompt (0 without one), its number of prompt rows (0), the first of them in the
        table (0), and its start (0).
    """

    sources: tuple[Source, ...]
    prompts: tuple[Prompt, ...]
    table_rows: int
    task: Task
    rows: Tensor

    @classmethod
    def of(
        cls, prompts: Mapping[str, Prompt], active: Prompt, names: Any, tokens: Tensor, task_ids: Any = None
    ) -> Mixture:
        """Check `adapter_names` and `task_ids` for a batch of tokens (B, ...), and look up each row's prompt.

        Raises:
            TypeError, ValueError: it is not one known name and task per row, or the adapters' task types differ.
        """
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names: expected a list of one name per row, got {names!r}")
        if len(names) != tokens.shape[0]:
            raise ValueError(f"adapter_names: expected B = {tokens.shape[0]} names, one per row, got {len(names)}")
        # BASE has a prompt where all rows begin with the same text.
        adapters = tuple(dict.fromkeys(name for name in names if name != BASE or BASE in prompts))
        unknown = [name for name in adapters if name not in prompts]
        if unknown:
            raise ValueError(f"adapter_names: expected names among {[*{**prompts, BASE: None}]}, got {unknown}")
        tasks = {name: prompts[name].task.name for name in adapters}
        if len(set(tasks.values())) > 1:
            raise ValueError(f"adapter_names: expected adapters of one task type, got {tasks}")
        if len({prompts[name].in_cache for name in adapters}) > 1:
            kinds = {name: prompts[name].method for name in adapters}
            raise ValueError(
                f"adapter_names: expected prompts of input embeddings, or prefixes of keys and values, got {kinds}"
            )
        found = prompts_of_rows(prompts, names, task_ids)
        distinct = {prompt.source: prompt for prompt in found if prompt is not None}
        own = tuple(sorted(distinct.values(), key=lambda one: (adapters.index(one.name), one.task_id or 0)))
        first, of_source = 0, {_NONE: (0, 0, 0, 0)}
        for index, prompt in enumerate(own):
            of_source[prompt.source] = (index, prompt.rows, first, prompt.start)
            first += prompt.table_rows
        sources = tuple(_NONE if prompt is None else prompt.source for prompt in found)
        columns = [[of_source[source][which] for source in sources] for which in range(4)]
        rows = torch.tensor(columns, dtype=torch.int64, device="cpu")
        task = own[0].task if own else active.task
        return cls(sources, own, first, task, to_device(rows, tokens.device))

    def part(self, rows: Sequence[int]) -> Mixture:
        """Some rows of the batch alone, with the same table."""
        sources = tuple(self.sources[row] for row in rows)
        index = to_device(torch.tensor(rows, device="cpu"), self.rows.device)
        prompts = tuple(prompt for prompt in self.prompts if prompt.source in sources)
        return replace(self, sources=sources, prompts=prompts, rows=self.rows.index_select(1, index))

    @property
    def names(self) -> tuple[str, ...]:
        """Each row's adapter, BASE for none."""
        return tuple(name for name, _ in self.sources)

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each prompt."""
        return tuple(prompt.rows for prompt in self.prompts)

    def moved(self, layout: Layout) -> Layout:
        """A layout (B, S) whose rows refer to their own prompt, in the table of all."""
        slots = layout.given_slots
        return Layout.from_slots(torch.where(slots < 0, slots - self.rows[2].unsqueeze(1), slots), self.table_rows)

    @property
    def has_patterns(self) -> bool:
        """Whether a prompt is not all in front of the text."""
        return any(prompt.pattern for prompt in self.prompts)

    @property
    def count(self) -> Tensor:
        """(B,) int64: the row's prompt rows."""
        return self.rows[1]

    @property
    def longest(self) -> int:
        """N: the most rows of a prompt."""
        return max(self.counts, default=0)

    @property
    def even(self) -> bool:
        """Whether every row has N prompt rows."""
        return len(set(self.counts)) <= 1 and (_NONE not in self.sources or not self.counts)

    @property
    def padded_rows(self) -> int:
        """R, and the row of zeros that pads where the prompts are uneven."""
        return self.table_rows + (not self.even)

    def prefix(self) -> Layout:
        """Prompts of N rows each, in front of the text."""
        assert self.table_rows == self.longest * len(self.prompts), "prompts of one length, and tables of nothing else"
        return Layout.prefixes(self.longest, self.rows[0], len(self.prompts))

    def stack(self, prompts: Sequence[Tensor]) -> Tensor:
        """(A, N, ...): all prompts, the shorter ones padded by zeros in front."""
        others = (0, 0) * (prompts[0].dim() - 1)
        return torch.stack([F.pad(rows, (*others, self.longest - rows.shape[0], 0)) for rows in prompts])

    def unstack(self, stacked: Tensor) -> Tensor:
        """(A, N, X) as the rows of a table (R, X), or (R + 1, X) if one of zeros must pad."""
        if self.even:
            return stacked.flatten(0, 1)
        own = [values[self.longest - count :] for values, count in zip(stacked, self.counts)]
        return torch.cat([*own, stacked.new_zeros(1, stacked.shape[2])])

    def stack_mask(self, device: torch.device) -> Tensor | None:
        """(A, N) int64: 1 at the prompt rows of a stack; None if there is nothing else."""
        if len(set(self.counts)) <= 1:
            return None
        mask = torch.tensor([[0] * (self.longest - count) + [1] * count for count in self.counts], device="cpu")
        return to_device(mask, device)

    def prompt_first_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """(B, N + T): the mask (B, T) of the text behind each row's own prompt in a stack; None if all counts."""
        if self.even:
            return None if mask is None else F.pad(mask, (self.longest, 0), value=1)
        columns = torch.arange(self.longest, device=self.rows.device)
        own = columns >= self.longest - self.count.unsqueeze(1)
        if mask is None:
            mask = torch.ones(len(self.sources), length, dtype=torch.int64, device=self.rows.device)
        return torch.cat((own.to(mask.dtype), mask), dim=1)

    def which(self, copies: int = 1) -> Tensor:
        """(copies · B,) int64: the prompt of each row in a stack, -1 for none."""
        rows = torch.where(self.count > 0, self.rows[0], -1)
        return rows if copies == 1 else rows.repeat_interleave(copies)

    def take(self, values: Tensor, copies: int = 1) -> Tensor:
        """Each row's part of (A, ...) values, (B, ...), or (copies · B, ...) with the copies of a row together.

        Its backward adds in a fixed order: index_select's does on a CPU, indexing's on CUDA.
        """
        which = self.rows[0] if copies == 1 else self.rows[0].repeat_interleave(copies)
        return values.index_select(0, which) if values.device.type == "cpu" else values[which]


@dataclass(frozen=True)
class Arrangement:
    """Where prompt, text and padding of a mixed batch stand.

    layout: (B, N + T) slots into a mixture's table.
    padding: (B,) int64: padding tokens of the text before each row's own; None if there are none.
    lead: (B,) int64: padding positions before the row, those of the prompt included, in a causal model; else None.
    is_filler: (B, N + T): padding that is no token; None without.
    """

    layout: Layout
    padding: Tensor | None
    lead: Tensor | None
    is_filler: Tensor | None
    first_position: int

    def mask(self, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """The attention mask (B, N + T) of tokens with a mask (B, T), or None where everything counts."""
        if mask is None and self.is_filler is None:
            return None
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        filled = self.layout.fill(mask, 1)
        return filled if self.is_filler is None else filled.masked_fill(self.is_filler, 0)

    def labels(self, labels: Tensor, next_token: bool) -> Tensor:
        """Labels (B, N + T) of labels per token (B, T).

        next_token: each position predicts the label behind it; then nothing predicts a row's first position.
        """
        filled = self.layout.fill(labels, IGNORE_INDEX)
        if not next_token or self.lead is None or not filled.shape[1]:
            return filled
        return filled.scatter(1, self.lead.clamp(max=filled.shape[1] - 1).unsqueeze(1), IGNORE_INDEX)

    def position_ids(self) -> Tensor:
        """Position ids (B, N + T) that do not count padding in front."""
        slots = self.layout.given_slots
        position = torch.arange(slots.shape[1], device=slots.device)
        if self.lead is None:
            return position.expand_as(slots) + self.first_position
        return (position - self.lead.unsqueeze(1)).clamp(min=0) + self.first_position


def arrange(
    mixture: Mixture, facts: BaseFacts, tokens: Tensor, attention_mask: Tensor | None, pool_last: bool = False
) -> Arrangement:
    """Arrange prompt, text and padding of (B, T) tokens so that padding changes nothing.

    A causal model gets padding, prompt, text; with `pool_last` the padding at the right moves to the left too. An
    encoder gets prompt, text, padding: what was at the left moves to the right.
    """
    length, longest, device = tokens.shape[1], mixture.longest, tokens.device
    table_rows = mixture.padded_rows
    _, count, first, start = (row.unsqueeze(1) for row in mixture.rows)
    padding = shift = None
    first_in_row = facts.padding_first(pool_last)
    if attention_mask is not None:
        right = pool_last and first_in_row and may_be_padded(attention_mask, -1)
        if right or may_be_padded(attention_mask, 0):
            at_left, at_right = count_padding(attention_mask)
            shift = (-at_right if right else None) if first_in_row else at_left
            padding = (at_left + at_right if right else at_left) if first_in_row else None
    if is_plain(mixture, facts, attention_mask, pool_last):
        return Arrangement(mixture.prefix().spelled(length), None, None, None, facts.first_position)
    position = torch.arange(longest + length, device=device)
    # `text` counts the row's text as it stands: padding tokens of its own, then tokens, and the prompt among them.
    filler_in_front = first_in_row and not mixture.even
    text = position - (longest - count) if filler_in_front else position.expand(tokens.shape[0], -1)
    begin = start if padding is None else (start + padding.unsqueeze(1)).clamp(max=length)
    prompt_row = text - begin
    is_prompt = (prompt_row >= 0) & (prompt_row < count)
    token = torch.where(prompt_row < 0, text, text - count)
    is_filler = None
    if not mixture.even:
        is_filler = text < 0 if first_in_row else text >= count + length
        token = token.clamp(0, max(length - 1, 0))
    if shift is not None and length:
        token = (token + shift.unsqueeze(1)).remainder(length)
    slots = torch.where(is_prompt, ~(prompt_row + first), token)
    if is_filler is not None:
        slots = slots.masked_fill(is_filler, -table_rows)
    lead = None
    if first_in_row:
        lead = longest - mixture.count if padding is None else longest - mixture.count + padding
    return Arrangement(Layout.from_slots(slots, table_rows), padding, lead, is_filler, facts.first_position)


def is_plain(mixture: Mixture, facts: BaseFacts, attention_mask: Tensor | None, pool_last: bool = False) -> bool:
    """Whether prompts of one length stand in front of rows without padding that had to move."""
    if not mixture.prompts or not mixture.even or any(prompt.start or prompt.pattern for prompt in mixture.prompts):
        return False
    right = pool_last and facts.padding_first(pool_last) and may_be_padded(attention_mask, -1)
    return not right and not may_be_padded(attention_mask, 0)


def prompts_of_rows(prompts: Mapping[str, Prompt], names: Sequence[str], task_ids: Any) -> list[Prompt | None]:
    """Each row's prompt, by its adapter and, where that has one for each task, by its task; None for BASE.

    task_ids: (B,) ids, as a tensor or a list; None, or -1 in a tensor, for rows whose adapter has one prompt for all.

    Raises:
        TypeError, ValueError: it is not one id per row, or not of a task that the row's adapter has.
    """
    ids = task_ids.tolist() if isinstance(task_ids, Tensor) else task_ids
    if ids is None:
        ids = [None] * len(names)
    if not isinstance(ids, (list, tuple)) or any(isinstance(one, bool) or not isinstance(one, _ID) for one in ids):
        raise TypeError(f"task_ids: expected a tensor or list of one int per row, got {task_ids!r}")
    if len(ids) != len(names):
        raise ValueError(f"task_ids: expected B = {len(names)} ids, one per row, got {len(ids)}")
    return [_prompt_of_row(prompts.get(name), task_id, row) for row, (name, task_id) in enumerate(zip(names, ids))]


def _prompt_of_row(prompt: Prompt | None, task_id: int | None, row: int) -> Prompt | None:
    if prompt is None or prompt.num_tasks is None:
        if task_id not in (None, -1):
            whose = "which has no prompt" if prompt is None else f"whose {prompt.method} is the same for all tasks"
            raise ValueError(f"task_ids: expected None for row {row}, {whose}, got {task_id}")
        return prompt
    if task_id is None or not 0 <= task_id < prompt.num_tasks:
        raise ValueError(
            f"task_ids: expected one in [0, {prompt.num_tasks}) for row {row}, a task of the adapter {prompt.name!r} "
            f"({prompt.method}), got {task_id}"
        )
    return prompt.of_task(task_id)


def prompts_of(
    prompts: Mapping[str, Prompt], active: Prompt, names: Any, task_ids: Any, tokens: Tensor
) -> tuple[Prompt, Mixture | None]:
    """The prompt of all rows of (B, ...) tokens, or a mixture where each has its own: by `adapter_names`, or by
    `task_ids` of the active adapter that are not all the same.

    Raises:
        TypeError, ValueError: see `Mixture.of`.
    """
    if names is not None:
        return active, Mixture.of(prompts, active, names, tokens, task_ids)
    if task_ids is None and active.num_tasks is None:
        return active, None
    names = [active.name] * tokens.shape[0]
    found = [prompt for prompt in prompts_of_rows(prompts, names, task_ids) if prompt is not None]
    if len({prompt.source for prompt in found}) > 1:
        return active, Mixture.of(prompts, active, names, tokens, task_ids)
    return (found[0] if found else active.of_task(0)), None


_ID = (int, type(None))
_NONE: Source = (BASE, None)


def refuse_cache(adapter_names: Sequence[str] | None, task_ids: Any = None) -> None:
    """For a call with a cache that is not empty."""
    for name, value in (("adapter_names", adapter_names), ("task_ids", task_ids)):
        if value is not None:
            raise ValueError(
                f"{name}: expected None for tokens that follow a cache, in which the prompts stand already; call the "
                "base model with the mask of all columns"
            )
