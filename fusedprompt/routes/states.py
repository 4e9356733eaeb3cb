"""What a base model makes of a prompt by itself, for the text of every row to read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layouts.layout import Layout
from ..layouts.mixture import Mixture
from .head import Withheld


@dataclass(frozen=True)
class PromptStates:
    """What the base model made of the prompt at batch 1, or of A prompts. Nothing in it is changed after it was made.

    cache: keys and values of every layer, (1, heads, P, head width) each.
    logits: (1, P, V), or (1, 1, V) of the last virtual token alone; (1, C) for sequence classification.
    hidden_states: (1, P, D) of every layer, if they were asked for.
    all_logits: gives (1, P, V), from the head or a second pass if need be.
    head: what will make the logits, and the (1, P, D) that it makes them of, if they wait for it.
    mixture: None for one prompt. Of several, shapes begin with A, and shorter prompts are padded in front.
    """

    cache: Any
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    all_logits: Callable[[], Tensor]
    mixture: Mixture | None = None
    head: Withheld | None = None

    def for_rows(self, size: int, attends: bool = False) -> Any:
        """A cache of its own for `size` rows of text; see `cache_for_rows`."""
        return cache_for_rows(self.cache, size, self.mixture, attends)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        tensors = [self.logits, *(part for layer in self.cache.layers for part in (layer.keys, layer.values))]
        return sum(tensor.nbytes for tensor in tensors)

    def last_logits(self, size: int) -> Tensor:
        """(size, V): logits of each row's last virtual token."""
        return of_rows(self.logits[:, -1], size, self.mixture)

    def table(self, values: Tensor) -> Tensor:
        """(R, X): values (A, P, X) of the prompts as a table for the slots of a layout."""
        return values[0] if self.mixture is None else self.mixture.unstack(values)

    def joined(self, layout: Layout, prompt: Tensor, text: Tensor) -> Tensor:
        """(A, P, X) of the prompts and (B, T, X) of the text as (B, P + T, X), in the order that splice gives them."""
        return ops.splice(self.table(prompt), layout, inputs_embeds=text)

    @classmethod
    def stacked(cls, states: Sequence[PromptStates], mixture: Mixture) -> PromptStates:
        """The states of each of a mixture's prompts, (1, ...), as one."""
        cache = copy.copy(states[0].cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for index, layer in enumerate(cache.layers):
            own = [one.cache.layers[index] for one in states]
            if hasattr(layer, "cumulative_length"):  # a layer with a window does not count by its tensors
                layer.cumulative_length = mixture.longest
            # Positions first: a stack pads its members' first dimension.
            layer.keys, layer.values = (
                mixture.stack([tensor[0].transpose(0, 1) for tensor in tensors]).transpose(1, 2)
                for tensors in ([each.keys for each in own], [each.values for each in own])
            )
        if states[0].logits.dim() == 2:
            logits = torch.cat([one.logits for one in states])
        else:
            logits = torch.cat([one.logits[:, -1:] for one in states])

        def all_logits() -> Tensor:
            return mixture.stack([one.all_logits()[0] for one in states])

        return cls(cache, logits, None, all_logits, mixture)


def of_rows(values: Tensor, size: int, mixture: Mixture | None) -> Tensor:
    """Each row's part of (A, ...) values, (size, ...)."""
    if mixture is None:
        return values.expand(size, *values.shape[1:])
    return mixture.take(values, size // len(mixture.sources))


def cache_for_rows(kept: Any, size: int, mixture: Mixture | None, attends: bool = False) -> Any:
    """A cache of its own for `size` rows of text, of one with a row for each of A prompts.

    attends: attention reads the prompts where they are. Otherwise tensors of one prompt are views, of which attention
    gets copies, joined with each row's own keys and values.
    """
    if attends and all(layer.keys is not None for layer in kept.layers):
        from ..base.prefixed_cache import prefixed_cache

        parts, which, mask = [(layer.keys, layer.values) for layer in kept.layers], None, None
        if mixture is not None:
            which, mask = mixture.which(size // len(mixture.sources)), mixture.stack_mask(parts[0][0].device)
            mask = None if mask is None else mask.bool()
        return prefixed_cache(parts, size, which, mask)
    cache = copy.copy(kept)
    cache.layers = [copy.copy(layer) for layer in kept.layers]
    for layer in cache.layers:
        if layer.keys is not None:  # some read those of an earlier layer
            layer.keys, layer.values = of_rows(layer.keys, size, mixture), of_rows(layer.values, size, mixture)
    cache.prompt_first = True
    return cache


def prompt_first(cache: Any) -> bool:
    """Whether a cache was begun by `PromptStates.for_rows`: prompt, padding, text in this order."""
    return getattr(cache, "prompt_first", False)


def fill(cache: Any, source: Any) -> None:
    """Put all keys and values of one cache into another, empty one.

    Raises:
        ValueError: a layer with a window holds but the last of them, and the other has none or another.
    """
    targets = [*cache.layers]
    for index, layer in enumerate(source.layers):
        if layer.keys is None:
            continue
        length = layer.keys.shape[-2]
        total = getattr(layer, "cumulative_length", length)
        target = targets[index] if index < len(targets) else None
        kind = type(layer), getattr(layer, "sliding_window", None)
        if total != length and kind != (type(target), getattr(target, "sliding_window", None)):
            raise ValueError(
                f"past_key_values: expected None, or a DynamicCache(config=...) of the base model, for {total} virtual "
                f"tokens, of which a layer with a window keeps {length}"
            )
        positions = torch.arange(layer.keys.shape[-2], device=layer.keys.device)
        cache.update(layer.keys, layer.values, index, {"cache_position": positions})
        if total != length:
            cache.layers[index].cumulative_length = total  # it counts what the window has let go, too
