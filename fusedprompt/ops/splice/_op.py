"""What the backends of splice share: the schemas, the fakes, the gradients, and the meaning of their arguments."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layouts.layout import Layout
from .._library import below_autograd, define, is_traced, not_leaf

CHECK_IDS = os.environ.get("FUSEDPROMPT_CHECK", "0") == "1"

# A fill of POSITIONS + n makes a field position ids: prompt row r gets n + r, a token its own value + R.
POSITIONS = 1 << 40


def out_of_range(ids: Tensor, table: Tensor) -> IndexError:
    outside = ids[(ids < 0) | (ids >= table.shape[0])]
    return IndexError(f"input_ids: expected ids in [0, {table.shape[0]}), got {int(outside[0])}")


class Arguments(NamedTuple):
    """What a backend is called with: see `register`."""

    prompt: Tensor
    slots: Tensor | None
    input_ids: Tensor | None
    table: Tensor | None
    inputs_embeds: Tensor | None
    fields: Sequence[Tensor]
    fills: Sequence[int]
    which: Tensor | None = None
    num_prompts: int = 1

    @property
    def layout(self) -> Layout:
        """Where each row comes from; the prompt table may be that of several prefixes."""
        return Layout(self.prompt.shape[0] // self.num_prompts, self.slots, self.which, self.num_prompts)

    def sources(self) -> tuple[Tensor, Tensor]:
        """The tokens, and what their rows come from: ids and their table, or the embeddings, which are both."""
        embeds = self.inputs_embeds
        tokens, rows = (self.input_ids, self.table) if embeds is None else (embeds, embeds)
        assert tokens is not None and rows is not None
        return tokens, rows


def _splice_fake(*args: Any) -> tuple[Tensor, Tensor]:
    given = Arguments(*args)
    (tokens, rows), slots = given.sources(), given.slots
    in_front = given.prompt.shape[0] // given.num_prompts
    batch, length = tokens.shape[0], in_front + tokens.shape[1] if slots is None else slots.shape[1]
    embeds = rows.new_empty(batch, length, given.prompt.shape[1])
    return embeds, tokens.new_empty((len(given.fields), batch, length), dtype=filled_dtype(given.input_ids))


def filled_dtype(input_ids: Tensor | None) -> torch.dtype:
    """The dtype of the fields that travel with the tokens: that of the ids."""
    return torch.int64 if input_ids is None else input_ids.dtype


def _splice_backward_fake(
    d_out: Tensor, slots: Tensor | None, num_prompt_rows: int, num_tokens: int, prompt: bool, tokens: bool, *of: Any
) -> tuple[Tensor, Tensor]:
    batch, _, width = d_out.shape
    accumulate = torch.promote_types(d_out.dtype, torch.float32)
    d_prompt = d_out.new_empty((num_prompt_rows, width) if prompt else (0,), dtype=accumulate)
    return d_prompt, d_out.new_empty((batch, num_tokens, width) if tokens else (0,))


def register(
    suffix: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor]],
    table_gradient: Callable[[Tensor, Tensor, int], Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register one backend's ops, `splice` + suffix and `splice_backward` + suffix; returns the differentiable splice.

    forward: `Arguments`, one by one -> (embeds, filled). `fields` are integer tensors (B, T) in
        `filled_dtype`, with the fill of each at prompt rows; they come back as (k, B, S).
    backward: (d_out, slots, R, T, prompt, tokens, which, num_prompts) -> (d_prompt, d_tokens): each prompt row's
        gradients summed over its uses, (R, D) in fp32 (fp64 for fp64), and each token's, (B, T, D) in d_out's dtype;
        empty if not asked for.
    table_gradient: (d_tokens, input_ids, V) -> (V, D), of anything that torch can trace.
    """

    class Splice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[Tensor, Tensor]:
            given = Arguments(*args)
            ctx.save_for_backward(given.slots, given.input_ids, given.which)
            ctx.num_prompts = given.num_prompts
            ctx.num_prompt_rows, ctx.num_tokens = given.prompt.shape[0], given.sources()[0].shape[1]
            ctx.prompt_dtype = given.prompt.dtype
            ctx.table_rows = 0 if given.table is None else given.table.shape[0]
            embeds, filled = run(*args)
            ctx.mark_non_differentiable(filled)
            return embeds, filled

        @staticmethod
        def backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
            slots, input_ids, which = ctx.saved_tensors
            needs_prompt = ctx.needs_input_grad[1]
            needs_table, needs_embeds = ctx.needs_input_grad[4:6]
            run = backward_operator if is_traced(d_out) else backward
            given = (slots, ctx.num_prompt_rows, ctx.num_tokens, needs_prompt, needs_table or needs_embeds)
            of_prompt, of_tokens = run(d_out, *given, which, ctx.num_prompts)
            d_prompt = of_prompt.to(ctx.prompt_dtype) if needs_prompt else None
            d_table = table_gradient(of_tokens, input_ids, ctx.table_rows) if needs_table else None
            return None, d_prompt, None, None, d_table, of_tokens if needs_embeds else None, *[None] * 4

    def apply(run: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> Any:
        function: Any = Splice.apply
        return function(run, *Arguments(*args))

    define(
        f"splice_backward{suffix}(Tensor d_out, Tensor? slots, SymInt num_prompt_rows, SymInt num_tokens, bool prompt, "
        "bool tokens, Tensor? which=None, SymInt num_prompts=1) -> (Tensor, Tensor)",
        backward,
        _splice_backward_fake,
    )
    define(
        f"splice{suffix}(Tensor prompt, Tensor? slots, Tensor? input_ids, Tensor? table, Tensor? inputs_embeds, "
        "Tensor[] fields, int[] fills, Tensor? which=None, SymInt num_prompts=1) -> (Tensor, Tensor)",
        forward,
        _splice_fake,
        lambda *args: apply(functools.partial(below_autograd, f"splice{suffix}"), *args),
    )
    operator: Callable[..., tuple[Tensor, Tensor]] = getattr(torch.ops.fusedprompt, f"splice{suffix}")
    backward_operator: Callable[..., tuple[Tensor, Tensor]] = getattr(torch.ops.fusedprompt, f"splice_backward{suffix}")

    def splice(prompt: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return operator(prompt, *args) if is_traced(prompt) else apply(forward, not_leaf(prompt), *args)

    return splice
