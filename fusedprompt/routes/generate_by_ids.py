"""`generate` where prompt rows must occupy columns of the ids.

Speculative decoding counts cached positions by the ids; some families' `generate` takes no embeddings (Bamba, CTRL,
XLNet), others' layers read ids beside them (Gemma 3n and 4). The prompt's columns repeat the row's first token, are
embedded as the prompt whenever the base model is given them (a forward hook, for this call only) or, if its states are
known, put into the cache there, and are cut out of the result.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..base.cache import cache_length
from ..base.layer_inputs import layer_inputs
from ..base.virtual_ids import answered, check_known, vocabulary
from ..layouts.layout import Layout
from .call import Plan
from .host import Host
from .prefix import PrefixStates
from .states import PromptStates, fill


def generate_by_ids(
    host: Host, plan: Plan, states: PromptStates | PrefixStates | None, others: Mapping[str, Any]
) -> Any:
    """What the base model's `generate` gives, without the prompt's columns."""
    if plan.fields.input_ids is None:
        raise ValueError("input_ids: expected ids, because the prompt must occupy columns of them here, got embeddings")
    wide, base = _Wide(host, plan, states), host.base_model
    others = dict(others)
    if others.get("streamer") is not None:
        others["streamer"] = _Narrow(others["streamer"], wide.ids.shape[1], plan.fields.input_ids)
    if plan.fields.position_ids is not None:
        others["position_ids"] = plan.fields.position_ids
    hook = base.register_forward_pre_hook(wide.embed_prompt, with_kwargs=True)
    try:
        with wide.answers():
            output = wide.reader(base).generate(input_ids=wide.ids, attention_mask=wide.mask, **others)
    finally:
        hook.remove()
    sequences = output if isinstance(output, Tensor) else output.sequences
    ids = plan.fields.input_ids.to(sequences.device)
    ids = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], 0)
    narrow = torch.cat((ids, sequences[:, wide.ids.shape[1] :]), dim=1)
    if isinstance(output, Tensor):
        return narrow
    output.sequences = narrow
    return output


class _Wide:
    """Ids with columns for the prompt, and what the base model gets for them.

    ids, mask, slots: (B, S). columns: (B, T), where each token of the text stands.
    """

    def __init__(self, host: Host, plan: Plan, states: PromptStates | PrefixStates | None) -> None:
        ids, layout, mask = plan.fields.input_ids, plan.layout, plan.fields.attention_mask
        assert ids is not None and layout is not None
        self.host, self.states, self.thread = host, states, threading.get_ident()
        self.num_prompt_rows = layout.num_prompt_rows
        if plan.carries or mask is None:
            mask = layout.fill(torch.ones_like(ids) if mask is None else mask, 1)
        self.mask: Tensor = mask
        columns = torch.arange(mask.shape[1], device=ids.device).expand(ids.shape[0], -1)
        # Slots over the wide ids: every column is itself, but for the prompt's.
        given = layout.spelled(ids.shape[1]).slots
        prompt_slots = ~columns if given is None else given
        self.slots = torch.where(layout.fill(torch.zeros_like(ids), 1) > 0, prompt_slots, columns)
        wide = layout.fill(ids, 0)
        first = wide.gather(1, ((mask != 0) & (self.slots >= 0)).to(torch.int8).argmax(1, keepdim=True))
        self.ids = torch.where(self.slots < 0, first, wide)
        size, length = ids.shape
        self.columns = layout.token_positions(size, length, ids.device, None if layout.slots is None else mask)
        check_known(ids, host.word_embeddings)
        self.rows = host.table(plan.table, plan.is_padded).to(ids.device) if states is None else None

    def answers(self) -> contextlib.AbstractContextManager[None]:
        """Within it the word embeddings know the prompt's rows by ids, for base models that must see ids."""
        if self.rows is None or self.host.facts.placeholder is not None:
            return contextlib.nullcontext()
        return answered(self.host.base_model, self.host.word_embeddings, self.rows)

    def reader(self, base: Any) -> Any:
        """A view of the base model, of the same parts, whose logits processors read the text alone: no n-gram, length
        or penalty counts the prompt's columns."""
        view, narrow, extra = copy.copy(base), self.narrow, self.ids.shape[1] - self.columns.shape[1]
        make = getattr(base, "_get_logits_processor", None)
        if make is None:
            return base

        def processors(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            config = copy.copy(generation_config)
            for limit in ("max_length", "min_length"):
                if getattr(config, limit, None):
                    setattr(config, limit, max(getattr(config, limit) - extra, 0))
            if kwargs.get("input_ids_seq_length") is not None:
                kwargs["input_ids_seq_length"] -= extra
            if isinstance(kwargs.get("encoder_input_ids"), Tensor):
                kwargs["encoder_input_ids"] = narrow(kwargs["encoder_input_ids"])
            return _of_text(narrow, make(config, *args, **kwargs))

        view.__dict__["_get_logits_processor"] = processors
        return view

    def narrow(self, ids: Tensor) -> Tensor:
        """Ids of the text and of what was generated behind it, of wide ones."""
        columns = self.columns.repeat_interleave(ids.shape[0] // self.columns.shape[0], 0).to(ids.device)
        return torch.cat((ids.gather(1, columns), ids[:, self.ids.shape[1] :]), 1)

    def embed_prompt(self, _: Any, args: tuple[Any, ...], call: dict[str, Any] | None = None) -> Any:
        """A hook before the base model's forward: the prompt's columns become its rows, or its states."""
        if call is None:  # another thread met the hook before torch had marked it as one that takes keywords
            return None
        given, cache = call.get("input_ids"), call.get("past_key_values")
        if threading.get_ident() != self.thread or given is None or given.shape[1] < self.ids.shape[1]:
            return args, call
        if cache is not None and cache_length(cache):
            return args, call  # candidates of speculative decoding
        return args, (self._behind if self.states is not None else self._embedded)(given, dict(call))

    def _behind(self, given: Tensor, call: dict[str, Any]) -> dict[str, Any]:
        """The prompt's states in the cache, and the columns behind them."""
        assert self.states is not None
        cache: Any = call["past_key_values"]
        fill(cache, self.states.for_rows(given.shape[0]))
        cache.prompt_first = True
        for name in ("input_ids", "position_ids", "cache_position"):
            if call.get(name) is not None:
                call[name] = call[name][..., self.num_prompt_rows :]
        return call

    def _embedded(self, given: Tensor, call: dict[str, Any]) -> dict[str, Any]:
        """Embeddings, or ids that are answered, of the wide ids and what was generated behind them."""
        host, rows = self.host, self.rows
        assert rows is not None
        more = torch.arange(self.ids.shape[1], given.shape[1], device=given.device).expand(given.shape[0], -1)
        slots = torch.cat((self.slots.repeat_interleave(given.shape[0] // self.slots.shape[0], 0), more), dim=1)
        # Without a mask they tell padding by the ids (XLM).
        if host.facts.needs_ids or (call.get("attention_mask") is None and host.facts.placeholder is None):
            return {**call, "input_ids": torch.where(slots < 0, ~slots + vocabulary(host.word_embeddings), given)}
        embeds = host.word_embeddings(given)
        call["inputs_embeds"] = ops.splice(rows, Layout.from_slots(slots, rows.shape[0]), inputs_embeds=embeds)
        if host.facts.placeholder is not None:
            ids = torch.where(slots < 0, host.facts.placeholder, given)
            call["per_layer_inputs"] = layer_inputs(host.base_model, ids)
        call["input_ids"] = None
        return call


def _of_text(narrow: Callable[[Tensor], Tensor], processors: Any) -> Any:
    """Logits processors, called with narrowed ids."""
    from transformers import LogitsProcessorList

    class OfText(LogitsProcessorList):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
            return super().__call__(narrow(input_ids), scores, **kwargs)

    return OfText(processors)


class _Narrow:
    """A streamer that is not shown the prompt's columns."""

    def __init__(self, streamer: Any, width: int, ids: Tensor) -> None:
        self._streamer, self._width, self._ids = streamer, width, ids

    def put(self, value: Tensor) -> None:
        self._streamer.put(self._ids.cpu() if value.dim() == 2 and value.shape[1] == self._width else value)

    def end(self) -> None:
        self._streamer.end()
