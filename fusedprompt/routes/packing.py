"""Several examples in one row, each behind its own prompt, so that no row is padded to the longest.

    P P P t t t t P P P t t P P P t t t          position ids  0 1 2 3 4 5 6 0 1 2 3 4 0 1 2 3 4 5

Positions begin anew with every example. transformers reads that as the borders of attention where it is given no mask;
where a model does not, a block-diagonal mask (B, 1, S, S) says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.facts import device_of
from ..base.state import evaluating
from ..layouts.layout import IGNORE_INDEX, Layout
from ..layouts.mixture import BASE, prompts_of, prompts_of_rows
from ..layouts.prompt import Prompt
from ..methods import find_method
from .call import Call
from .host import Host

_FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def pack(
    model: Host,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    pad_token_id: int = 0,
    adapter_names: Sequence[str] | None = None,
    task_ids: Sequence[int | None] | None = None,
) -> dict[str, Any]:
    """Pack examples into rows, in their order: arguments for a causal language model's forward, `model(**packed)`.

    Args:
        examples: each with `input_ids` (T,) and, optionally, `labels` (T,), as sequences or tensors, unpadded.
        max_length: the most columns of a row, prompts included; None puts everything into one row.
        pad_token_id: what fills rows that are shorter than the longest.
        adapter_names: the adapter of each example, "__base__" for none; by default the active one for all.
        task_ids: the task of each example, for adapters with several; None for the rest.

    Returns:
        input_ids (B, T), slots, position_ids and labels (B, S) int64; the lengths of all examples one after another, as
        transformers names them for variable-length attention: cu_seq_lens_q and cu_seq_lens_k (examples + 1,) int32
        over the B·S columns, max_length_q and max_length_k; use_cache, which must be off; and, where they are needed,
        adapter_names and task_ids of the prompts that slots refer to, and attention_mask (B, 1, S, S).

    Raises:
        ValueError: an example is empty, or too long, or has other labels than tokens; or the model cannot keep examples
            apart.
    """
    return PackingCollator.of(model, max_length=max_length, pad_token_id=pad_token_id)(
        examples, adapter_names, task_ids
    )


@dataclass(frozen=True)
class PackingCollator:
    """`pack` for transformers' Trainer and data loaders: `data_collator=PackingCollator.of(model)`.

    Attributes:
        prompt_rows: number of prompt rows of each adapter. adapter: the one of examples that name none.
        max_length, pad_token_id: as for `pack`.
        first_position: position id of a sequence's first token.
        mask_dtype: of the block-diagonal mask, or None without one.
    """

    prompt_rows: Mapping[str, int]
    adapter: str
    max_length: int | None = None
    pad_token_id: int = 0
    first_position: int = 0
    mask_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, model: Host, max_length: int | None = None, pad_token_id: int = 0) -> PackingCollator:
        """For a model and its adapters as they are now. Finds out, by two short rows, how it keeps examples apart.

        Raises:
            ValueError: it does not, or the active adapter's task is not language modelling.
        """
        if model.in_use is None:
            raise ValueError("model: expected a prompt to pack examples behind, but it has none, or it is disabled")
        task = model.prompts[model.in_use].task
        if not task.predicts_next or not model.facts.causal:
            raise ValueError(f"model: expected a causal language model to pack examples for, got task {task.name}")
        needs_mask = why_not_apart(model, None)
        dtype = None if needs_mask is None else next(model.base_model.parameters()).dtype
        reason = None if dtype is None else why_not_apart(model, dtype)
        if reason is not None:
            raise ValueError(f"model: expected one that can keep packed examples apart, but {reason}")
        rows = {name: prompt.rows for name, prompt in model.prompts.items() if _packs(prompt)}
        return cls(rows, model.in_use, max_length, pad_token_id, model.facts.first_position, dtype)

    def __call__(
        self,
        examples: Sequence[Mapping[str, Any]],
        adapter_names: Sequence[str] | None = None,
        task_ids: Sequence[int | None] | None = None,
    ) -> dict[str, Any]:
        """See `pack`. Examples may also name adapter and task themselves, as `adapter_name` and `task_id`."""
        if not examples:
            raise ValueError("examples: expected at least one, got none")
        names = adapter_names or [example.get("adapter_name", self.adapter) for example in examples]
        if len(names) != len(examples):
            raise ValueError(f"adapter_names: expected {len(examples)} names, one per example, got {len(names)}")
        known = {**self.prompt_rows, BASE: 0}
        for name in names:
            if name not in known:
                raise ValueError(f"adapter_names: expected names of prompts in front, {[*known]}, got {name!r}")
        tasks = [example.get("task_id") for example in examples] if task_ids is None else task_ids
        if len(tasks) != len(examples):
            raise ValueError(f"task_ids: expected {len(examples)} ids, one per example, got {len(tasks)}")
        sources = [(name, None if task is None else int(task)) for name, task in zip(names, tasks)]
        table = [source for source in dict.fromkeys(sources) if source[0] != BASE]
        first, total = dict.fromkeys(sources, 0), 0
        for source in table:
            first[source], total = total, total + known[source[0]]
        pieces = [
            self._piece(at, one, known[source[0]], first[source])
            for at, (one, source) in enumerate(zip(examples, sources))
        ]
        packed = self._join(self._rows(pieces))
        if table != [(self.adapter, None)]:
            packed["adapter_names"] = [name for name, _ in table]
        if any(task is not None for _, task in table):
            packed["task_ids"] = [task for _, task in table]
        return packed

    def _piece(self, index: int, example: Mapping[str, Any], rows: int, first: int) -> _Piece:
        ids = torch.as_tensor(example["input_ids"], dtype=torch.int64, device="cpu")
        labels = example.get("labels")
        labels = ids if labels is None else torch.as_tensor(labels, dtype=torch.int64, device="cpu")
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"examples[{index}]['input_ids']: expected shape (T,), T >= 1, got {tuple(ids.shape)}")
        if labels.shape != ids.shape:
            raise ValueError(
                f"examples[{index}]['labels']: expected shape {tuple(ids.shape)}, got {tuple(labels.shape)}"
            )
        if self.max_length is not None and rows + len(ids) > self.max_length:
            raise ValueError(
                f"examples[{index}]: expected at most max_length = {self.max_length} columns, "
                f"got {rows} prompt rows + {len(ids)} tokens"
            )
        if not rows:
            labels = labels.clone()
            labels[0] = IGNORE_INDEX  # nothing stands before it
        return _Piece(rows, first, ids, labels)

    def _rows(self, pieces: Sequence[_Piece]) -> list[list[_Piece]]:
        """As many in a row as fit, in order."""
        rows: list[list[_Piece]] = [[]]
        for piece in pieces:
            if self.max_length is not None and _columns(rows[-1]) + piece.columns > self.max_length:
                rows.append([])
            rows[-1].append(piece)
        return rows

    def _join(self, rows: Sequence[list[_Piece]]) -> dict[str, Any]:
        columns = max(map(_columns, rows))
        fields: dict[str, list[Tensor]] = {"input_ids": [], "slots": [], "position_ids": [], "labels": []}
        lengths: list[int] = []
        for row in rows:
            if missing := columns - _columns(row):
                # What fills a row is an example of its own, which nobody reads.
                filler = torch.full((missing,), self.pad_token_id, device="cpu")
                row = [*row, _Piece(0, 0, filler, torch.full_like(filler, IGNORE_INDEX))]
            before = itertools.accumulate((len(piece.ids) for piece in row), initial=0)
            fields["input_ids"].append(torch.cat([piece.ids for piece in row]))
            fields["slots"].append(torch.cat([piece.slots(count) for piece, count in zip(row, before)]))
            fields["position_ids"].append(torch.cat([torch.arange(piece.columns, device="cpu") for piece in row]))
            fields["labels"].append(torch.cat([F.pad(p.labels, (p.rows, 0), value=IGNORE_INDEX) for p in row]))
            lengths += [piece.columns for piece in row]
        # Rows with fewer tokens have more prompts: no slot refers to what is added here.
        packed: dict[str, Any] = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=self.pad_token_id)
            for name, values in fields.items()
        }
        packed["position_ids"] += self.first_position
        ends = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
        packed.update(zip(_FLASH, (ends, ends, max(lengths), max(lengths))))
        packed["use_cache"] = False
        if self.mask_dtype is not None:
            packed["attention_mask"] = block_mask(packed["position_ids"], self.mask_dtype)
        return packed


def _packs(prompt: Prompt) -> bool:
    """Whether a prompt can stand in front of each of several examples in a row, whose loss is the base model's."""
    method = find_method(prompt.method)
    return not (prompt.start or prompt.pattern) and (method is None or method.targets is None)


@dataclass(frozen=True)
class _Piece:
    """An example: its prompt's rows in the table, its tokens and labels."""

    rows: int
    first: int
    ids: Tensor
    labels: Tensor

    @property
    def columns(self) -> int:
        return self.rows + len(self.ids)

    def slots(self, tokens_before: int) -> Tensor:
        prompt = ~torch.arange(self.first, self.first + self.rows, device="cpu")
        return torch.cat((prompt, torch.arange(tokens_before, tokens_before + len(self.ids), device="cpu")))


def _columns(row: Sequence[_Piece]) -> int:
    return sum(piece.columns for piece in row)


def block_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, S), to be added to attention scores: 0 where a position sees another of its own example, not behind it.

    position_ids: (B, S); an example begins where they do not go on by one.
    """
    begins = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    example = begins.cumsum(1)
    column = torch.arange(position_ids.shape[1], device=position_ids.device)
    sees = (example.unsqueeze(2) == example.unsqueeze(1)) & (column.unsqueeze(1) >= column)
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)


def slots_of(host: Host, active: Prompt, call: Call) -> tuple[Call, Layout, tuple[Prompt, ...]]:
    """The layout that a caller says, and the prompts to whose tables its slots refer: the active one, or several.

    Raises:
        ValueError: unknown adapters, or such whose heads cannot be told apart within a row; or `task_ids` that do not
            fit.
    """
    prompts = host.prompts
    assert call.slots is not None
    if call.adapter_names is not None:
        names = tuple(call.adapter_names)
        for name in names:
            if name not in prompts:
                raise ValueError(f"adapter_names: expected names among {[*prompts]} with slots, got {name!r}")
            if host.peft_config[name].modules_to_save and names != (active.name,):
                raise ValueError(f"adapter_names: expected adapters without modules_to_save with slots, got {name!r}")
        table = tuple(one for one in prompts_of_rows(prompts, names, call.task_ids) if one is not None)
        layout = Layout.from_slots(call.slots, sum(prompt.table_rows for prompt in table))
    else:
        layout, table = slots_of_one(host, active, call)
    batch, others, mask = call.batch, dict(call.others), call.batch.attention_mask
    if mask is not None and mask.dim() == 4:  # block-diagonal: it is the base model's own business
        others["attention_mask"], batch = mask, replace(batch, attention_mask=None)
    flash_arguments(host.base_model, others)
    return replace(call, batch=batch, others=others), layout, table


def slots_of_one(host: Host, active: Prompt, call: Call) -> tuple[Layout, tuple[Prompt, ...]]:
    """The layout whose slots refer to the active adapter's prompt, each row's to that of its own task."""
    assert call.slots is not None
    layout = Layout.from_slots(call.slots, active.table_rows)
    active, mixture = prompts_of(host.prompts, active, None, call.task_ids, call.rows)
    return (layout, (active,)) if mixture is None else (mixture.moved(layout), mixture.prompts)


def flash_arguments(base: Any, others: dict[str, Any]) -> None:
    """Take the lengths of packed examples out of a base model's arguments, unless its attention asks for them."""
    if "flash" not in str(getattr(base.config, "_attn_implementation", None)):
        for name in _FLASH:
            others.pop(name, None)


def why_not_apart(model: Host, mask_dtype: torch.dtype | None) -> str | None:
    """Why a base model's second example of a row sees the first, or None: looked at with two examples of two tokens."""
    facts, base = model.facts, model.base_model
    kind = type(base).__name__
    if not facts.takes_position_ids:
        return f"{kind} takes no position_ids"
    device = device_of(model.word_embeddings)
    positions = torch.tensor([[0, 1, 0, 1]], device=device) + facts.first_position
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 2, 3]], device=device)
    arguments: dict[str, Any] = {"position_ids": positions.expand(2, -1), "use_cache": False}
    if mask_dtype is not None:
        arguments["attention_mask"] = block_mask(positions, mask_dtype).expand(2, -1, -1, -1)
    lengths = torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32, device=ids.device)
    arguments.update(zip(_FLASH, (lengths, lengths, 2, 2)))
    flash_arguments(base, arguments)
    try:
        with torch.no_grad(), evaluating(base):
            logits = base(inputs_embeds=model.word_embeddings(ids), **arguments, return_dict=True).logits
    except (ValueError, RuntimeError) as error:
        return f"{kind} refuses a block-diagonal mask: {error}"
    one, other = logits[:, 2:].float()
    close = torch.allclose(one, other, rtol=1e-2, atol=1e-3 * float(one.abs().max()))
    return None if close else f"in {kind} the second of two examples sees the first"
