"""How prompt rows reach the base model: the layout of a batch, and the arguments the base model is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .base_model import BaseFacts, fusable_table
from .layout import Layout, count_padding, may_be_padded


@dataclass
class SplicedInputs:
    """A batch with its prompt in place.

    layout: where every row came from. arguments: keyword arguments for the base model.
    """

    layout: Layout
    arguments: dict[str, Any]


def splice_route(
    facts: BaseFacts,
    word_embeddings: nn.Module,
    prompt: Tensor,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    pool_last: bool = False,
    start: int = 0,
) -> SplicedInputs:
    """Put prompt rows (P, D) into a batch of tokens.

    Args:
        labels: (B, T) labels per token, or None.
        pool_last: the base model reads its answer at the last position, so padding must not be there.
        start: tokens of each row that stay before the prompt.

    Returns:
        The layout, and inputs_embeds, attention_mask, labels, position_ids and token_type_ids for the base model; a
        mask, labels and ids that were not given are not made up, except position ids that padding makes necessary.
    """
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("You have to provide either input_ids or inputs_embeds, and not both")
    batch, length = tokens.shape[:2]
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask: expected shape (B, T) = {(batch, length)}, got {tuple(attention_mask.shape)}"
        )
    check_length(facts, prompt.shape[0], length)
    if start > length:
        raise ValueError(f"input_ids: expected at least prompt_start = {start} tokens, got {length}")
    if start and position_ids is not None:
        raise ValueError(f"position_ids: expected None with prompt_start = {start}, got {tuple(position_ids.shape)}")
    layout, padding = choose_layout(facts, prompt.shape[0], tokens, attention_mask, pool_last, start)
    table = fusable_table(word_embeddings) if input_ids is not None else None
    if input_ids is not None and table is None:
        inputs_embeds = word_embeddings(input_ids)
    spliced = ops.splice_batch(
        prompt.to(tokens.device),
        layout,
        input_ids=None if table is None else input_ids,
        table=table,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
    )
    arguments: dict[str, Any] = {"inputs_embeds": spliced.inputs_embeds}
    if attention_mask is not None:
        arguments["attention_mask"] = spliced.attention_mask
    if labels is not None:
        arguments["labels"] = spliced.labels
    if position_ids is not None:
        _require(facts.takes_position_ids, "position_ids")
        arguments["position_ids"] = layout.position_ids(position_ids.expand(batch, length), facts.first_position)
    elif padding is not None and facts.takes_position_ids:
        arguments["position_ids"] = padding_positions(layout, padding, length, facts.first_position)
    if token_type_ids is not None:
        _require(facts.takes_token_type_ids, "token_type_ids")
        arguments["token_type_ids"] = layout.fill(token_type_ids, 0)
    return SplicedInputs(layout, arguments)


def check_length(facts: BaseFacts, num_prompt_rows: int, length: int) -> None:
    """Refuse a prompt and text that are longer than a learned position table."""
    total = num_prompt_rows + length
    if facts.position_limit is not None and total > facts.position_limit:
        raise ValueError(
            f"num_virtual_tokens + tokens: expected at most the base model's {facts.position_limit} positions, "
            f"got {num_prompt_rows} + {length} = {total}"
        )


def _require(taken: bool, argument: str) -> None:
    if not taken:
        raise ValueError(f"{argument}: expected None, because the base model's forward takes no {argument}")


def choose_layout(
    facts: BaseFacts,
    num_prompt_rows: int,
    tokens: Tensor,
    attention_mask: Tensor | None,
    pool_last: bool = False,
    start: int = 0,
) -> tuple[Layout, Tensor | None]:
    """Arrange prompt, text and padding of (B, T) tokens so that padding changes nothing.

    A causal model gets padding, prompt, text: the prompt stays next to the text, as without padding. An encoder gets
    prompt, padding, text, with position ids that skip the padding, because per-token outputs and pooled first rows stay
    where PEFT has them; an encoder without position ids, or with tokens before the prompt, gets its padding last.

    Returns:
        The layout and, where a row may be padded at its left in the output, the number of such tokens, (B,) int64.
    """
    length = tokens.shape[1]
    left, right = may_be_padded(attention_mask, 0), pool_last and may_be_padded(attention_mask, -1)
    if attention_mask is None or not (left or (right and facts.causal)):
        if not start:
            return Layout.prefix(num_prompt_rows), None
        first = torch.full((tokens.shape[0],), start, device=tokens.device)
        return Layout.insert(num_prompt_rows, length, first), None
    at_left, at_right = count_padding(attention_mask)
    if facts.causal:
        padding = at_left + at_right if pool_last else at_left
        shift = -at_right if pool_last else None
        return Layout.insert(num_prompt_rows, length, padding + start, shift), padding
    if facts.takes_position_ids and not start:
        return Layout.prefix(num_prompt_rows), at_left
    return Layout.insert(num_prompt_rows, length, torch.full_like(at_left, start), at_left), None


def padding_positions(layout: Layout, padding: Tensor, length: int, first: int) -> Tensor:
    """Position ids (B, S) that count prompt and text but not the padding at the left of each row."""
    if layout.slots is None:
        text = torch.arange(length, device=padding.device) - padding.unsqueeze(1)
        return layout.position_ids(text.clamp(min=0) + first, first)
    position = torch.arange(layout.slots.shape[1], device=padding.device) - padding.unsqueeze(1)
    return position.clamp(min=0) + first
