"""A batch whose rows use different adapters: which prompt each row gets, and where it stands.

The prompts of the distinct adapters, each encoded once, are one table; a row's slots point at its own adapter's rows. A
shorter prompt makes up for its missing rows by padding: in front in a causal model, behind in an encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .base_model import BaseFacts, to_device
from .config import TaskType
from .layout import IGNORE_INDEX, Layout, count_padding, may_be_padded
from .routes import SplicedInputs, Turn, check_length, checked_tokens, place

if TYPE_CHECKING:
    from .model import PromptModel
    from .template import Template

BASE = "__base__"  # PEFT's name for rows without an adapter


@dataclass(frozen=True)
class Mixture:
    """The adapters of a batch, row by row.

    names: one per row, BASE for none. adapters: the distinct ones, in the order of their first row.
    counts, starts: each adapter's prompt rows, and the tokens that stay before them.
    templates: each adapter's template, or None.
    sizes: rows of each adapter's table: its prompt, and what its template adds. table_rows: R, of a batch's adapters.
    task: the adapters' task; the active adapter's if no row has one.
    rows: (4, B) int64: each row's adapter (0 without one), its number of prompt rows (0), the first of them in the
        table (0), and its start (0).
    """

    names: tuple[str, ...]
    adapters: tuple[str, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    templates: tuple[Template | None, ...]
    sizes: tuple[int, ...]
    table_rows: int
    task: TaskType
    rows: Tensor

    @classmethod
    def of(cls, model: PromptModel, names: Any, tokens: Tensor) -> Mixture:
        """Check `adapter_names` for a batch of tokens (B, ...), and look its adapters up.

        Raises:
            TypeError, ValueError: it is not one known name per row, or the adapters' tasks differ.
        """
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names: expected a list of one name per row, got {names!r}")
        if len(names) != tokens.shape[0]:
            raise ValueError(f"adapter_names: expected B = {tokens.shape[0]} names, one per row, got {len(names)}")
        adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        unknown = [name for name in adapters if name not in model.peft_config]
        if unknown:
            raise ValueError(f"adapter_names: expected names among {[*model.peft_config, BASE]}, got {unknown}")
        configs = [model.peft_config[name] for name in adapters or (model.active_adapter,) if name is not None]
        if not configs:
            raise ValueError("adapter_names: expected a model with adapters, but the last one was deleted")
        tasks = {name: TaskType(config.task_type).value for name, config in zip(adapters, configs)}
        if len(set(tasks.values())) > 1:
            raise ValueError(f"adapter_names: expected adapters of one task type, got {tasks}")
        counts = tuple(model.prompt_rows_count(name) for name in adapters)
        starts = tuple(model.prompt_start[name] for name in adapters)
        sizes = tuple(model.table_rows_count(name) for name in adapters)
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        of_adapter = {name: row for name, *row in zip(adapters, range(len(adapters)), counts, firsts, starts)}
        rows = torch.tensor([of_adapter.get(name, (0, 0, 0, 0)) for name in names], dtype=torch.int64)
        rows = rows.view(-1, 4).T.contiguous()
        task = TaskType(configs[0].task_type)
        templates = tuple(model.template_of(name) for name in adapters)
        device_rows = to_device(rows, tokens.device)
        return cls(tuple(names), adapters, counts, starts, templates, sizes, sum(sizes), task, device_rows)

    def part(self, rows: Sequence[int]) -> Mixture:
        """Some rows of the batch alone, with the same table."""
        names = tuple(self.names[row] for row in rows)
        kept = [index for index, name in enumerate(self.adapters) if name in names]
        return dataclasses.replace(
            self,
            names=names,
            adapters=tuple(self.adapters[index] for index in kept),
            counts=tuple(self.counts[index] for index in kept),
            starts=tuple(self.starts[index] for index in kept),
            templates=tuple(self.templates[index] for index in kept),
            sizes=tuple(self.sizes[index] for index in kept),
            rows=self.rows.index_select(1, to_device(torch.tensor(rows), self.rows.device)),
        )

    @property
    def which(self) -> Tensor:
        """(B,) int64: the row's adapter; 0 for one without."""
        return self.rows[0]

    @property
    def count(self) -> Tensor:
        """(B,) int64: the row's prompt rows."""
        return self.rows[1]

    @property
    def longest(self) -> int:
        """N: the most prompt rows of an adapter."""
        return max(self.counts, default=0)

    @property
    def even(self) -> bool:
        """Whether every row has N prompt rows."""
        return len(set(self.counts)) <= 1 and (BASE not in self.names or not self.counts)

    def encode(self, model: PromptModel) -> list[Tensor]:
        """Each adapter's table: its prompt (P, D), and what its template adds."""
        return [model.prompt_table(name) for name in self.adapters]

    def table(self, prompts: Sequence[Tensor], word_embeddings: Any) -> Tensor:
        """(R + 1, D): all prompts, one after another, and a row of zeros, which pads."""
        like = prompts[0] if prompts else word_embeddings.weight
        return torch.cat([*prompts, like.new_zeros(1, like.shape[1])])

    def stack(self, prompts: Sequence[Tensor]) -> Tensor:
        """(A, N, ...): all prompts, the shorter ones padded by zeros in front."""
        longest = self.longest
        padding = (0, 0) * (prompts[0].dim() - 1)
        return torch.stack([F.pad(rows, (*padding, longest - rows.shape[0], 0)) for rows in prompts])

    def unstack(self, stacked: Tensor) -> Tensor:
        """(A, N, X) as the rows of a table (R + 1, X)."""
        longest = self.longest
        return self.table([values[longest - n :] for values, n in zip(stacked, self.counts)], None)

    def stack_mask(self, device: torch.device) -> Tensor | None:
        """(A, N) int64: 1 at the prompt rows of a stack; None if there is nothing else."""
        if len(set(self.counts)) <= 1:
            return None
        mask = torch.tensor([[0] * (self.longest - count) + [1] * count for count in self.counts])
        return to_device(mask, device)

    def prompt_first_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """(B, N + T): the mask (B, T) of the text behind each row's own prompt in a stack; None if all counts."""
        if self.even:
            return None if mask is None else F.pad(mask, (self.longest, 0), value=1)
        columns = torch.arange(self.longest, device=self.rows.device)
        own = columns >= self.longest - self.count.unsqueeze(1)
        if mask is None:
            mask = torch.ones(len(self.names), length, dtype=torch.int64, device=self.rows.device)
        return torch.cat((own.to(mask.dtype), mask), dim=1)

    def take(self, values: Tensor, copies: int = 1) -> Tensor:
        """Each row's part of (A, ...) values, (B, ...), or (copies · B, ...) with the copies of a row together.

        Its backward adds in a fixed order: index_select's does on a CPU, indexing's on CUDA.
        """
        which = self.which if copies == 1 else self.which.repeat_interleave(copies)
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
        size, length = self.layout.slots.shape  # type: ignore[union-attr]
        position = torch.arange(length, device=self.layout.slots.device)  # type: ignore[union-attr]
        if self.lead is None:
            return position.expand(size, -1) + self.first_position
        return (position - self.lead.unsqueeze(1)).clamp(min=0) + self.first_position


def arrange(
    mixture: Mixture, facts: BaseFacts, tokens: Tensor, attention_mask: Tensor | None, pool_last: bool = False
) -> Arrangement:
    """Arrange prompt, text and padding of (B, T) tokens so that padding changes nothing.

    A causal model gets padding, prompt, text; with `pool_last` the padding at the right moves to the left too. An
    encoder gets prompt, text, padding: what was at the left moves to the right.
    """
    length, longest, device = tokens.shape[1], mixture.longest, tokens.device
    _, count, first, start = (row.unsqueeze(1) for row in mixture.rows)
    padding = shift = None
    if attention_mask is not None:
        right = pool_last and facts.causal and may_be_padded(attention_mask, -1)
        if right or may_be_padded(attention_mask, 0):
            at_left, at_right = count_padding(attention_mask)
            shift = (-at_right if right else None) if facts.causal else at_left
            padding = (at_left + at_right if right else at_left) if facts.causal else None
    position = torch.arange(longest + length, device=device)
    # `text` counts the row's text as it stands: padding tokens of its own, then tokens, and the prompt among them.
    filler_in_front = facts.causal and not mixture.even
    text = position - (longest - count) if filler_in_front else position.expand(tokens.shape[0], -1)
    begin = start if padding is None else start + padding.unsqueeze(1)
    prompt_row = text - begin
    is_prompt = (prompt_row >= 0) & (prompt_row < count)
    token = torch.where(prompt_row < 0, text, text - count)
    is_filler = None
    if not mixture.even:
        is_filler = text < 0 if facts.causal else text >= count + length
        token = token.clamp(0, max(length - 1, 0))
    if shift is not None and length:
        token = (token + shift.unsqueeze(1)).remainder(length)
    slots = torch.where(is_prompt, ~(prompt_row + first), token)
    table_rows = mixture.table_rows + 1
    if is_filler is not None:
        slots = slots.masked_fill(is_filler, -table_rows)
    lead = None
    if facts.causal:
        lead = longest - mixture.count if padding is None else longest - mixture.count + padding
    return Arrangement(Layout.from_slots(slots, table_rows), padding, lead, is_filler, facts.first_position)


def splice_mixture(
    model: PromptModel,
    mixture: Mixture,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    pool_last: bool = False,
) -> SplicedInputs:
    """`routes.splice_route` for rows of different adapters. Fields are those of the tokens, (B, T)."""
    tokens = checked_tokens(input_ids, inputs_embeds, attention_mask)
    size, length = tokens.shape[:2]
    if position_ids is not None and (any(mixture.starts) or any(mixture.templates)):
        raise ValueError(f"position_ids: expected None with prompts inside of text, got {tuple(position_ids.shape)}")
    next_token = mixture.task is TaskType.CAUSAL_LM
    given = Fields(tokens, attention_mask, labels, token_type_ids)
    layout, mask, filled, token_types, counted = lay_out_mixture(model, mixture, given, next_token, pool_last)
    if position_ids is not None:
        moved = position_ids.expand(size, length) + mixture.count.unsqueeze(1)
        firsts = torch.cat([torch.arange(count, device=tokens.device) for count in (*mixture.counts, 1)])
        counted = layout.fill_rows(moved, (firsts + model.facts.first_position).to(moved.dtype))
    turn = None
    if any(mixture.templates):
        turn = (Turn.LAST_TO_END if pool_last else None) if model.facts.causal else Turn.FIRST_TO_START
    return place(
        model.facts,
        model.word_embeddings,
        mixture.table(mixture.encode(model), model.word_embeddings),
        layout,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        labels=filled,
        position_ids=counted,
        token_type_ids=token_types,
        turn=turn,
    )


def lay_out_mixture(
    model: PromptModel, mixture: Mixture, given: Fields, next_token: bool, pool_last: bool
) -> tuple[Layout, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The layout of a mixed batch, and its mask, labels, token types and (where padding needs them) position ids."""
    if any(mixture.templates):
        from .mixed_templates import arrange_templates

        layout, fields = arrange_templates(model, mixture, given, next_token)
        return layout, fields.attention_mask, fields.labels, fields.token_type_ids, None
    tokens, mask, labels, token_types = given
    check_length(model.facts, mixture.longest, tokens.shape[1])
    arranged = arrange(mixture, model.facts, tokens, mask, pool_last)
    layout, wide_mask = arranged.layout, arranged.mask(mask, tokens)
    return (
        layout,
        wide_mask,
        None if labels is None else arranged.labels(labels, next_token),
        None if token_types is None else layout.fill(token_types, 0),
        arranged.position_ids() if wide_mask is not None and model.facts.takes_position_ids else None,
    )


class Fields(NamedTuple):
    """What goes with the tokens of a batch: (B, T), or (B, S) where prompts are in their places."""

    tokens: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    token_type_ids: Tensor | None


def is_context_aware(model: PromptModel, adapter_name: str) -> bool:
    """Whether an adapter is CPT's, whose loss is its own."""
    method = model.peft_config[adapter_name].peft_type
    return bool(getattr(method, "value", method) == "CPT")


def refuse_cache(adapter_names: Sequence[str] | None) -> None:
    """For a call with a cache that is not empty."""
    if adapter_names is not None:
        raise ValueError(
            "adapter_names: expected None for tokens that follow a cache, in which the prompts stand already; call the "
            "base model with the mask of all columns"
        )
