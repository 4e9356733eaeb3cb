"""Prefixes: adapters that are keys and values themselves, which every row of text reads from the base model's cache.

It is route `shared` without the prompt's own pass. A step computes B·T tokens in each layer; the encoder runs once,
what it gives is seen as keys and values of every layer without a copy, and rows share them: attention reads them where
they are, or puts each row's own behind a copy (`attention.py`). Outputs, labels and losses are those of the text
alone, as PEFT's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.cache import cache_length, cache_taker, new_cache, reads_another, shortest_window, told_key_shapes
from ..base.facts import BaseFacts, device_of, transformers_model
from ..base.first_use import counts_columns, first_use, key_shapes, remembered
from ..base.layer_inputs import layer_inputs
from ..base.outputs import replaced
from ..base.own_forward import own_forward, replaced_forwards
from ..base.positions import numbered
from ..base.tasks import Task
from ..layouts.batch import Batch, check_length
from ..layouts.mixture import Mixture
from ..layouts.padding import count_padding, may_be_padded
from ..layouts.prompt import Prompt, Source
from .attention import in_place
from .call import SPLICE, Plan
from .choice import RouteUnavailable, is_kept
from .host import Host
from .loss import NextToken, PerToken
from .prefix_text import text_states
from .splice import embedded, with_loss
from .states import PromptStates, cache_for_rows, fill


@dataclass(frozen=True)
class PrefixStates:
    """Keys and values of A prefixes. Nothing in it is changed after it was made.

    parts: (2 L, A, heads, N, width), of layer l the keys at 2 l and the values at 2 l + 1.
    cache: a cache of A rows, whose tensors are views of the parts.
    mixture: None for one prefix.
    """

    parts: Tensor
    cache: Any
    mixture: Mixture | None = None

    def for_rows(self, size: int, attends: bool = False) -> Any:
        """A cache of its own for `size` rows of text; see `cache_for_rows`."""
        return cache_for_rows(self.cache, size, self.mixture, attends)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.parts.nbytes


def prefix_states(host: Host, prompts: Sequence[Prompt], mixture: Mixture | None = None) -> PrefixStates | PromptStates:
    """An adapter's prefix, or all of a mixture: kept ones where nothing is trained, else of this step's encoders. With
    text behind it that every row begins with, what the base model makes of that."""
    if any(prompt.shared is not None for prompt in prompts):
        return text_states(host, prompts, mixture, lambda own: prefix_states(host, (own,)).for_rows(1))
    of_source = {prompt.source: prompt for prompt in prompts}

    def make(source: Source) -> PrefixStates:
        parts = _parts(host, of_source[source], kept=keeps)
        return PrefixStates(parts, _cache(host, parts))

    keeps = is_kept(host, prompts)
    if not keeps:
        states = [make(source) for source in of_source]
    else:  # of the base model they depend on nothing but its dtype and where it is, as its embeddings
        encoders = {prompt.source: host.prompt_encoder[prompt.name] for prompt in prompts}
        states = host.prompt_cache.get(host.word_embeddings, encoders, False, make)
    if mixture is None:
        return states[0]
    # Positions first: a stack pads its members' first dimension.
    stacked = mixture.stack([one.parts[:, 0].movedim(2, 0) for one in states])
    parts = stacked.permute(2, 0, 3, 1, 4)
    return PrefixStates(parts, _cache(host, parts), mixture)


def _parts(host: Host, prompt: Prompt, kept: bool) -> Tensor:
    """An adapter's keys and values (2 L, 1, heads, N, width): a view of what its encoder gives, or, where that has
    another dtype or will be kept, one copy in the order in which attention reads."""
    config, rows = host.peft_config[prompt.name], host.table((prompt,))
    heads = int(config.num_attention_heads)
    parts = rows.view(rows.shape[0], -1, heads, int(config.token_dim) // heads).permute(1, 2, 0, 3)
    device, dtype = device_of(host.word_embeddings), host.base_model.dtype
    if (parts.device, parts.dtype) != (device, dtype):
        parts = parts.to(device, dtype, memory_format=torch.contiguous_format)
    elif kept:
        parts = parts.contiguous()
    return parts.unsqueeze(1)


def _cache(host: Host, parts: Tensor) -> Any:
    """A cache whose layers hold the parts."""
    cache, pieces = new_cache(host.base_model), parts.unbind(0)
    order = layer_order(len(pieces) // 2, host.facts.encoder_decoder, host.ties_layers)
    shapes = key_shapes(host.base_model, host.facts)
    for number, (layer, index) in enumerate(zip(cache.layers, order)):
        pair = pieces[2 * index : 2 * index + 2]
        if isinstance(shapes, tuple) and 2 * number < len(shapes):
            pair = tuple(cut for cut in map(cut_to, pair, shapes[2 * number :]) if cut is not None)
        if len(pair) < 2 or reads_another(layer):
            continue  # as PEFT, which leaves such a layer without a prefix
        keys, values = pair
        window = getattr(layer, "sliding_window", None)
        if window is not None:  # such a layer holds what the next token sees, and counts the rest
            layer.cumulative_length = keys.shape[-2]
            layer._sliding_window_tensor = getattr(layer, "_sliding_window_tensor", keys).to(keys.device)
            keys, values = (tensor[..., max(tensor.shape[-2] - window + 1, 0) :, :] for tensor in (keys, values))
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
    return cache


def cut_to(part: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """The first heads and columns of (A, heads, N, width), as many as a layer has; None if it has more."""
    heads, width = shape
    if heads > part.shape[1] or width > part.shape[3]:
        return None
    return part if part.shape[1::2] == shape else part[:, :heads, :, :width]


def largest(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(heads, width) that hold the keys and values of every layer."""
    return max((heads for heads, _ in shapes), default=0), max((width for _, width in shapes), default=0)


def layer_order(count: int, encoder_decoder: bool, ties: bool = False) -> list[int]:
    """Which pair of keys and values each of `count` layers reads.

    In an encoder-decoder PEFT reads them twice over, with two pairs a layer: layer l has number 2 l modulo their count.
    Where that is odd each has its own, and the order is PEFT's. Where it is even, PEFT gives layers l and l + count / 2
    the same; here the second half has the pairs that nobody reads there. ties: it is as in PEFT.
    """
    if not encoder_decoder:
        return list(range(count))
    apart = count % 2 == 0 and not ties
    return [2 * index % count + (apart and 2 * index >= count) for index in range(count)]


# Deciding


def check_served(host: Host, prompts: Sequence[Prompt], route: str, as_peft: bool = False) -> None:
    """Refuse what no text can be run behind: now, whatever the batch. as_peft: layers may be without a prefix.

    Raises:
        RouteUnavailable: it was asked to be spliced.
        ValueError: layers are recomputed, or the base model's keys have another shape.
    """
    method = next(prompt.method for prompt in prompts if prompt.method)
    if route == SPLICE:
        raise RouteUnavailable(f"{method} is keys and values of every layer, and no rows among the text's", SPLICE)
    if host.state.findings().checkpoints:
        raise ValueError(
            f"gradient checkpointing: expected it to be off with {method}, because it runs layers without the cache, "
            "which is where the prefix is: base_model.gradient_checkpointing_disable()"
        )
    for prompt in prompts:
        if prompt.encoded_rows:  # none in rows of text alone
            check_keys(host, prompt.name, host.peft_config[prompt.name], method, as_peft)


def check_keys(host: Host, name: str, config: Any, method: str, as_peft: bool = False) -> None:
    """Refuse an adapter whose keys do not fit those of the base model; see `check_served`."""
    shapes = key_shapes(host.base_model, host.facts)
    if isinstance(shapes, str):
        raise ValueError(f"base_model: expected one that reads a prefix of {method}, but {shapes}")
    if shapes is None:
        return
    heads, width = int(config.num_attention_heads), int(config.token_dim)
    fits = (heads, width // heads) == largest(shapes)
    if as_peft and told_key_shapes(host.base_model) is not None:
        fits = any(one <= heads and each <= width // heads for one, each in shapes)
    if not fits:
        found = ", ".join(f"{one} heads of width {each}" for one, each in dict.fromkeys(shapes))
        raise ValueError(
            f"token_dim, num_attention_heads: expected those of the base model's keys, {found}, "
            f"got {width} for {heads} heads in adapter {name!r}"
        )


def check_padding(
    host: Host, mask: Tensor | None, rows: int, length: int, uneven: bool = False, pools: bool = False
) -> None:
    """Refuse padding between a prefix and a row's text where it changes the row. pools: all padding goes there.

    Raises:
        ValueError: with the reason.
    """
    if host.facts.encoder_decoder:
        return
    found = first_use(host.base_model, host.facts, shares=host.facts.causal)
    if found.sharing is not None:
        raise ValueError(f"base_model: expected one that reads a prefix, but {found.sharing}")
    # Looking makes the host wait for a device; most base models have no such reason.
    window, reason = shortest_window(host.base_model) if host.facts.causal else None, found.gap
    if window is not None and rows + length > window:
        reason = f"{rows + length} positions are more than its window of {window}, in which padding counts"
    sides = (0,) if not pools else (0, -1) if host.facts.pools_last else ()
    padded = (may_be_padded(mask, side) and bool((mask[:, side] == 0).any()) for side in sides)
    if reason is not None and (uneven or any(padded)):
        where = "padding" if pools else "padding at the left"
        where = "prefixes of several lengths, or a static cache's empty columns" if uneven else where
        raise ValueError(f"attention_mask: expected rows without {where}, because of the base model: {reason}")


def behind_prefix(
    facts: BaseFacts, batch: Batch, rows: int, mixture: Mixture | None, pools: bool, as_peft: bool
) -> tuple[Batch, bool]:
    """A batch of text as it stands behind a prefix of `rows` in the cache: its mask covers both, its positions begin
    behind the prefix, and padding does not count. And whether ids must become embeddings, because the mask says what
    is padding to a base model that would look for it by its id."""
    mask, positions = batch.attention_mask, batch.position_ids
    if as_peft:
        wide = None if mask is None else F.pad(mask, (rows, 0), value=1)
        return replace(batch, attention_mask=wide, position_ids=None if positions is None else positions + rows), False
    check_length(facts, rows, batch.shape[1])
    size, length = batch.shape
    looks_up = pools and facts.pools_last and mask is not None
    padding: Tensor | None = None
    if mask is not None and pools and may_be_padded(mask, -1 if facts.pools_last else 0):
        batch = turned(batch, mask, facts.pools_last)
        mask, positions = batch.attention_mask, batch.position_ids
    if may_be_padded(mask, 0):
        padding = count_padding(mask)[0]
    behind: int | Tensor = rows if mixture is None else mixture.count.unsqueeze(1)
    if mixture is None:
        wide = None if mask is None else F.pad(mask, (rows, 0), value=1)
    else:
        wide = mixture.prompt_first_mask(mask, length)
    if positions is not None:
        positions = positions.expand(size, length) + behind
    elif facts.places_position_ids and (padding is not None or not isinstance(behind, int) or facts.first_position):
        text = torch.arange(length, device=batch.tokens.device).unsqueeze(0)
        text = text if padding is None else text - padding.unsqueeze(1)
        positions = text.clamp(min=0) + (behind + facts.first_position)
    return replace(batch, attention_mask=wide, position_ids=positions), looks_up


# Running


@contextlib.contextmanager
def _given(base: Any, cache: Any, uses_cache: bool) -> Iterator[dict[str, Any]]:
    """The arguments by which a base model gets a cache; or, within the block, the stack under its head gets it."""
    taker = cache_taker(base)
    if taker is None or cache is None:
        yield {}
        return
    arguments = {"past_key_values": cache, **({"use_cache": True} if uses_cache else {})}
    if taker is transformers_model(base):
        yield arguments
        return
    own = own_forward(taker)
    with replaced_forwards({taker: lambda *args, **kwargs: own(*args, **{**kwargs, **arguments})}):
        yield {}


def run_prefix(host: Host, plan: Plan) -> Any:
    """The base model's output on text behind its prefix."""
    base, facts, loss = host.base_model, host.facts, plan.loss
    others, arguments = dict(plan.others), plan.fields.given()
    size = batch_size(plan)
    if plan.looks_up and "input_ids" in arguments:
        ids = arguments.pop("input_ids")
        arguments["inputs_embeds"] = embedded(host, ids)
        if facts.placeholder is not None:
            arguments["per_layer_inputs"] = layer_inputs(base, ids)
    elif "inputs_embeds" in arguments and remembered(base).writes:
        arguments["inputs_embeds"] = arguments["inputs_embeds"].clone()
    cache = own = others.pop("past_key_values", None)
    before: Tensor | None = None  # what predicts each row's first token
    if plan.table:  # some row has a prefix
        states = prefix_states(host, plan.table, plan.mixture)
        cache = filled(host, states.for_rows(size, plan.joined is None), own)
        if isinstance(states, PromptStates) and isinstance(loss, NextToken):
            before = states.last_logits(size)
    as_dict, use_cache = others.pop("return_dict", None), others.pop("use_cache", None)
    wants_cache = getattr(base.config, "use_cache", True) if use_cache is None else use_cache
    if isinstance(loss, NextToken) and loss.labels is None:
        loss = replace(loss, labels=arguments.pop("labels"))
    if loss is not None:
        assert isinstance(loss, (NextToken, PerToken))
        others.pop("num_items_in_batch", None)
    with (
        in_place(host, cache),
        _given(base, cache, facts.causal) as given,
        numbered(base, arguments, facts.takes_position_ids),
    ):

        def call() -> Any:
            output = base(**arguments, **others, **given, return_dict=True)
            drops = not wants_cache and "past_key_values" in output
            return replaced(output, past_key_values=None) if drops else output

        if loss is None:
            output = call()
        else:
            loss_of = functools.partial(loss.of, from_prompt=before) if isinstance(loss, NextToken) else loss.of
            output = with_loss(host, call, loss_of, plan.waits)
    if plan.reads:
        output = host.text_head.told_of(output, dict)
    return output.to_tuple() if as_dict is False else output


def filled(host: Host, cache: Any, own: Any = None) -> Any:
    """A cache that holds a prefix, as the base model takes it; the caller's own, if there is one."""
    if own is not None:
        if not cache_length(own):
            fill(getattr(own, "self_attention_cache", own), cache)
            own.prompt_first = True
        return own
    if not host.facts.encoder_decoder:
        return cache
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(cache, new_cache(host.base_model))


def batch_size(plan: Plan) -> int:
    """B; of a call with an encoder's output, by that."""
    encoded = plan.others.get("encoder_outputs")
    return plan.fields.shape[0] if encoded is None else int(encoded[0].shape[0])


def widened(
    host: Host, others: Mapping[str, Any], rows: int, mixture: Mixture | None = None, length: int = 1
) -> dict[str, Any]:
    """Arguments of an encoder-decoder whose decoder has a prefix of `rows`. length: of the decoder's text, if the
    arguments do not tell: what it makes of the encoder's, or the one token with which it begins."""
    given = dict(others)
    mask = given.get("decoder_attention_mask")
    own = next((given[name] for name in _OF_DECODER if given.get(name) is not None), None)
    length = length if own is None else own.shape[1]
    check_length(host.facts, rows, length)
    if mixture is not None and not mixture.even:
        if counts_columns(host.base_model, host.facts):
            lengths = {prompt.name: prompt.rows for prompt in mixture.prompts}
            raise ValueError(
                f"adapter_names: expected prefixes of one length in every row, got {lengths}, because the base model's "
                "decoder counts positions from the end of the longest"
            )
        given["decoder_attention_mask"] = mixture.prompt_first_mask(mask, length)
    elif isinstance(mask, Tensor):
        given["decoder_attention_mask"] = F.pad(mask, (rows, 0), value=1)
    if isinstance(given.get("decoder_position_ids"), Tensor):
        given["decoder_position_ids"] = given["decoder_position_ids"] + rows
    return given


# What tells the length of a decoder's text.
_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def padding_behind(batch: Batch, others: Mapping[str, Any], task: Task | None = None) -> Batch:
    """An encoder's batch with its padding behind the text: of the order of its columns nobody behind a decoder knows.

    Raises:
        ValueError: padding at the left would be in the outputs that a task reads of a decoder of the same ids.
    """
    mask = batch.attention_mask
    if others.get("encoder_outputs") is not None or not may_be_padded(mask, 0):
        return batch
    if task is not None and task.token_outputs and not any(others.get(name) is not None for name in _OF_DECODER):
        if bool((mask[:, 0] == 0).any()):
            raise ValueError(
                "attention_mask: expected rows without padding at the left, because the decoder reads the same ids"
            )
        return batch
    return turned(batch, mask, to_left=False)


def turned(batch: Batch, mask: Tensor, to_left: bool) -> Batch:
    """Padding at the right of each row moved to its left, or the other way."""
    (size, length), (left, right) = batch.shape, count_padding(mask)
    shift = -right if to_left else left
    column = torch.arange(length, device=mask.device)
    columns = (column + shift.unsqueeze(1)).remainder(max(length, 1))
    found: dict[str, Tensor] = {}
    for name, field in batch.given().items():
        if name == "inputs_embeds":
            found[name] = field.gather(1, columns.unsqueeze(-1).expand_as(field))
        elif isinstance(field, Tensor):
            found[name] = field.expand(size, length).gather(1, columns)
    return replace(batch, **found)
