"""What a base model does with padding and with a prompt in its cache, found out by running it on a few tokens.

What one can read off a class (causal attention, position ids, kinds of cached layers) does not tell how it measures
distances: ALiBi and local windows may count columns of the cache, positions may be counted by themselves, and code may
refuse a cache. So the first layers of a base model run once on four tokens behind three others: by themselves, padded,
and behind a cache. That takes a few milliseconds, and is remembered for all models of a class and configuration.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .cache import keeps_all, new_cache, reads_another, told_key_shapes, why_no_prefix
from .facts import BaseFacts, device_of, transformers_model
from .own_forward import has_own_forward
from .positions import count_positions, numbered
from .reading import NotRead
from .remembered import Remembered
from .shortened import bare, first_of_kind, shortened
from .state import configs_of

_PROMPT, _TEXT, _PADDING = 3, 4, 4


@dataclass(frozen=True)
class Found:
    """What a base model was seen to do.

    sharing: why text behind a prompt in the cache is not what it is behind the prompt itself, or None.
    gap: why padding between the prompt in the cache and a row's text changes the row, or None.
    lead: why padding before prompt and text changes the row, or None.
    writes: it writes into the embeddings that it is given (CTRL scales them).
    milliseconds: that it took; None if nothing was run.
    """

    sharing: str | None = None
    gap: str | None = None
    lead: str | None = None
    writes: bool = False
    milliseconds: float | None = None

    def __str__(self) -> str:
        if self.milliseconds is None:
            return "not run"
        said = [f"{name}: {why}" for name, why in vars(self).items() if isinstance(why, str)]
        return f"{'; '.join(said) or 'rows are as they are alone'} ({self.milliseconds:.0f} ms)"


UNKNOWN = Found()
_lock = threading.Lock()
_of_kind: dict[Any, Any] = {}
_of_model: Remembered[dict[str, tuple[Any, Any]]] = Remembered()


def remembered(base: nn.Module) -> Found:
    """What is known of a base model."""
    model = transformers_model(base)
    held = (None if model is None else _of_model.get(model)) or {}
    found = [held[name][1] for name in ("sharing", "padding") if name in held]
    return found[0] if found else UNKNOWN


def first_use(base: nn.Module, facts: BaseFacts, shares: bool) -> Found:
    """What a decoder does; `UNKNOWN` where it cannot be run apart from a call: in a trace, where processes hold shards
    of it, or with FUSEDPROMPT_FIRST_USE=0 in the environment.

    shares: a prompt in a cache is tried too.
    """

    def find(model: Any) -> Found | None:
        begin = time.perf_counter()
        found = _Trial(model, facts).findings(shares)
        took = 1e3 * (time.perf_counter() - begin)
        return None if found is None else replace(found, milliseconds=took)

    found: Found = _found(base, "sharing" if shares else "padding", find, UNKNOWN)
    return found


def is_loss_of_logits(base: nn.Module, facts: BaseFacts) -> bool:
    """Whether a decoder's loss is what its `loss_function` makes of its logits. Yes where it cannot be run."""
    answer: bool = _found(base, "loss", lambda model: _Trial(model, facts, head=True).makes_loss_of_logits(), True)
    return answer


def _found(base: nn.Module, name: str, find: Callable[[Any], Any], unknown: Any) -> Any:
    """What `find(model)` finds, for the first model of a class and configuration; `unknown` where it finds None."""
    model = transformers_model(base)
    if model is None:
        return unknown
    held = (_of_model.get(model) or {}).get(name)
    if torch.compiler.is_compiling():
        return unknown if held is None else held[1]
    # A loss may have terms that are for training alone.
    # While a call of another thread runs it is another name of the same.
    attention = str(model.config._attn_implementation).removeprefix("fusedprompt_")
    now = (attention, *((model.loss_function, model.training) if name == "loss" else ()))
    if held is None or held[0] != now:
        table = next(model.get_input_embeddings().parameters(), None)
        plain = type(table) is nn.Parameter and table.numel() > 0 and table.device.type != "meta"
        if table is None or not plain or os.environ.get("FUSEDPROMPT_FIRST_USE") == "0":
            return unknown
        key = (name, type(model), str(model.config), table.dtype, table.device, *now)
        with _lock:
            answer = _of_kind.get(key)
            own = any(has_own_forward(part) for part in model.modules())
            if answer is None or own:
                with torch.inference_mode(False), torch.no_grad(), torch.autocast(table.device.type, enabled=False):
                    answer = find(model)
                # What was put into an instance, or cannot be told of its weights, is no other's.
                if not own and answer is not None:
                    _of_kind[key] = answer
            held = (now, unknown if answer is None else answer)
            _of_model.put(model, {**(_of_model.get(model) or {}), name: held})
    return held[1]


def key_shapes(base: nn.Module, facts: BaseFacts) -> tuple[tuple[int, int], ...] | str | None:
    """(heads, width) of the keys and of the values that each layer of a base model puts into a cache; or why none of
    ours can be read there. None where it cannot be run."""
    found: tuple[tuple[int, int], ...] | str | None
    found = _found(base, "keys", lambda model: _key_shapes(model, facts), None)
    return found


def _key_shapes(model: Any, facts: BaseFacts) -> tuple[tuple[int, int], ...] | str | None:
    told = why_no_prefix(model, facts) or told_key_shapes(model)
    if told is not None:
        return told
    shapes, like = _Trial(model, facts).key_shapes(), first_of_kind(model)
    if not isinstance(shapes, tuple) or like is None or len(shapes) <= 2 * max(like):
        return shapes
    return tuple(shape for index in like for shape in shapes[2 * index : 2 * index + 2])


def counts_columns(base: nn.Module, facts: BaseFacts) -> bool:
    """Whether an encoder-decoder's decoder counts columns of its cache that are masked. No where it cannot be run."""
    counts: bool = _found(base, "columns", lambda model: _Trial(model, facts).counts_columns(), False)
    return counts


def why_prefix_unread(
    base: nn.Module,
    facts: BaseFacts,
    attending: Callable[[Sequence[Any], Any], contextlib.AbstractContextManager[None]],
) -> str | None:
    """Why text behind a prefix that rows share without copies is not what it is behind copies of it, or None.

    attending: lets the modules of some configurations read a cache's prefix; see `routes.attention`.
    """
    found: str = _found(
        base, "attention", lambda model: _Trial(model, facts).why_prefix_unread(attending), "it was not tried"
    )
    return found or None


def remember_unread(base: nn.Module, why: str) -> None:
    """A call of a base model did not read a prefix that rows share: no later one will try."""
    model = transformers_model(base)
    held = None if model is None else _of_model.get(model)
    if held is not None and "attention" in held:
        _of_model.put(model, {**held, "attention": (held["attention"][0], why)})


def why_not_embeddings(base: nn.Module, facts: BaseFacts) -> str | None:
    """Why a base model cannot run on embeddings alone, padded or not, in the words of its error; or None."""
    model = transformers_model(base)
    if model is None or facts.needs_ids:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return _Trial(model, facts).why_not_embeddings()


class _Trial:
    """Two rows of text behind one prompt, through a model's first layers."""

    def __init__(self, model: Any, facts: BaseFacts, head: bool = False) -> None:
        """head: that runs too."""
        self.facts, self.writes, table = facts, False, model.get_input_embeddings()
        inner = model if head else model.base_model
        self.model = shortened(inner if any(part is table for part in inner.modules()) else model)
        if head and self.model is not model:
            vars(self.model)["training"] = model.training  # of the head's module alone: parts draw no random numbers
        self.device = device_of(table)
        # Distinct ids, from the middle of the table: not padding, and no other special ones.
        size = int(getattr(table, "num_embeddings", 0)) or model.config.get_text_config(decoder=True).vocab_size
        ids = (size // 2 + torch.arange(_PROMPT + 2 * _TEXT, device=self.device)) % size
        embeds: Any = None if isinstance(table, nn.ModuleList) else bare(table)(ids)  # MusicGen adds several up
        # I-BERT's are a tuple, which no call can use; of equal ones nothing can be learnt.
        self.embeds = isinstance(embeds, Tensor) and bool((embeds[1:] != embeds[:1]).any())
        self.prompt_ids, self.text_ids = ids[:_PROMPT].unsqueeze(0), ids[_PROMPT : _PROMPT + _TEXT].unsqueeze(0)
        if self.embeds:
            self.prompt, self.text = embeds[:_PROMPT].unsqueeze(0), embeds[_PROMPT:].view(2, _TEXT, -1)

    def findings(self, shares: bool) -> Found | None:
        """What sharing, padding behind a shared prompt, and padding before a prompt change; None: it cannot be told."""
        if not self.embeds:
            return None
        together = torch.cat((self.prompt.expand(2, -1, -1), self.text), 1)
        right = self._run(inputs_embeds=together)
        if isinstance(right, str):
            return None  # the call itself will say why
        right = right[:, _PROMPT:]
        if not right.isfinite().all() or torch.equal(right[0], right[1]):
            return None  # weights that are no numbers, or zeros: nothing can be learnt of them
        if not self.facts.causal:
            gap = self._why_not_padded(_PROMPT, right[:1], "it counts padding between prompt and text")
            return Found(None, gap, None, self.writes)
        padded, mask = self._padded()
        # With position ids it does as it is told, but for a state.
        told = self.facts.places_position_ids and not self.facts.stateful
        lead = None if told else self._why_not_padded(0, right[:1], "it counts padding at the left of a row")
        cache = self._cache() if shares else "it was not tried"
        if isinstance(cache, str):
            return Found(cache, None, lead, self.writes)
        wide = torch.cat((mask.new_ones(2, _PROMPT), mask), 1)
        positions = count_positions(mask, _PROMPT + self.facts.first_position)
        given = cache()
        kept = [tensor for layer in _held(given) for tensor in (layer.keys, layer.values)]
        before = [tensor.clone() for tensor in kept]
        found = self._run(inputs_embeds=padded, past_key_values=given, attention_mask=wide, position_ids=positions)
        if not isinstance(found, str) and not all(map(torch.equal, kept, before)):
            found = "the base model writes into the keys and values that it is given"
        if isinstance(found, str):
            return Found(found, None, lead, self.writes)
        sharing = self._differs(
            found[1:, :_TEXT], right[1:], "text behind the prompt's keys and values differs from that behind it"
        )
        gap = self._differs(
            found[:1, _PADDING:], right[:1], "it counts padding that stands between a cached prompt and the text"
        )
        return Found(sharing, gap, lead, self.writes)

    def _padded(self) -> tuple[Tensor, Tensor]:
        """Both rows (2, T, D) and their mask (2, T). Row 0 has padding in front, row 1 behind, where a causal model
        does not see it."""
        padding = self.text.flip(1)
        padded = torch.stack((torch.cat((padding[0], self.text[0])), torch.cat((self.text[1], padding[1]))))
        mask = torch.ones(2, _PADDING + _TEXT, dtype=torch.int64, device=self.device)
        mask[0, :_PADDING], mask[1, _TEXT:] = 0, 0
        return padded, mask

    def makes_loss_of_logits(self) -> bool | None:
        """With labels, of rows of different lengths; None where it cannot be told."""
        if not self.embeds:
            return None
        embeds = self.text
        labels = torch.arange(_TEXT, device=self.device).repeat(2, 1)
        labels[0, :2] = -100
        try:
            output = self.model(inputs_embeds=embeds, labels=labels, use_cache=False, return_dict=True)
            logits = output.logits
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        except Exception:
            return None  # the call itself will say why
        return bool(torch.allclose(loss.float(), output.loss.float(), rtol=1e-3, atol=1e-5))

    def key_shapes(self) -> tuple[tuple[int, int], ...] | str | None:
        """Of the first layers; see the function of this name."""
        cache, run = self._empty(), self._decoded if self.facts.encoder_decoder else self._read
        first = run(self.prompt_ids, cache)
        if isinstance(first, str):  # without a cache the call itself will say why
            return None if isinstance(run(self.prompt_ids), str) else first
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        filled = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        if not filled or any(tensor.dim() != 4 for tensor in filled):
            return "the base model does not fill the cache that it is given"
        shapes = tuple((tensor.shape[1], tensor.shape[3]) for tensor in filled)
        found = run(self.text_ids, cache)
        if self.facts.encoder_decoder and not isinstance(found, str):
            whole = self._decoded(torch.cat((self.prompt_ids, self.text_ids), 1))[:, _PROMPT:]
            found = self._differs(found, whole, "text behind its decoder's cache is not what it is without one")
        return found if isinstance(found, str) else shapes

    def counts_columns(self) -> bool | None:
        """See the function of this name: text of a decoder behind three columns, with three masked ones in front."""
        first = self._empty()
        if isinstance(self._decoded(self.prompt_ids, first), str):
            return None
        wide = self._empty()
        for index, layer in enumerate(first.layers):
            wide.update(*(torch.cat((part.flip(2), part), 2) for part in (layer.keys, layer.values)), index)
        mask = torch.ones(1, 2 * _PROMPT + _TEXT, dtype=torch.int64, device=self.device)
        mask[:, :_PROMPT] = 0
        right = self._decoded(self.text_ids, first, mask[:, _PROMPT:])
        found = self._decoded(self.text_ids, wide, mask)
        return None if isinstance(right, str) else self._differs(found, right, "it counts") is not None

    def _empty(self) -> Any:
        return new_cache(self.model)

    def _decoded(self, ids: Tensor, cache: Any = None, mask: Tensor | None = None) -> Any:
        """A decoder's text behind a cache, if there is one; its encoder has read the prompt."""
        from transformers.cache_utils import EncoderDecoderCache

        given = {} if cache is None else {"past_key_values": EncoderDecoderCache(cache, self._empty())}
        return self._run(input_ids=self.prompt_ids, decoder_input_ids=ids, decoder_attention_mask=mask, **given)

    def _read(self, ids: Tensor, cache: Any = None) -> Any:
        """Text behind a cache, if there is one."""
        return self._run(input_ids=ids, **({} if cache is None else {"past_key_values": cache}))

    def why_prefix_unread(self, attending: Callable[..., Any]) -> str | None:
        """See the function of this name; "" for no reason."""
        from .prefixed_cache import prefixed_cache

        copied = self._cache() if self.embeds else "it cannot be run"
        if isinstance(copied, str):
            return copied
        padded, mask = self._padded()
        wide = torch.cat((mask.new_ones(2, _PROMPT), mask), 1)
        positions = count_positions(mask, _PROMPT + self.facts.first_position)
        copies = copied()
        if any(map(reads_another, copies.layers)):
            return "some of its layers read the keys of earlier ones"
        cache = prefixed_cache([(layer.keys[:1], layer.values[:1]) for layer in copies.layers], 2)
        configs = configs_of(self.model)
        for begin, end in ((0, -1), (-1, None)):  # a text, and a token behind it
            columns = slice(begin, end)
            given = {
                "inputs_embeds": padded[:, columns],
                "attention_mask": wide[:, :end],
                "position_ids": positions[:, columns],
            }
            right = self._run(past_key_values=copies, **given)
            try:
                with attending(configs, cache):
                    found = self._run(past_key_values=cache, **given)
            except NotRead as error:
                return str(error)
            if isinstance(right, str):
                return right
            real = mask[:, columns].bool()
            if not isinstance(found, str):
                found = found[real].unsqueeze(1)
            said = "its attention gives other values with a prefix that is not copied"
            if (objection := self._differs(found, right[real].unsqueeze(1), said)) is not None:
                return objection
        return ""

    def why_not_embeddings(self) -> str | None:
        """The error of a padded row, or None."""
        if not self.embeds:
            return None
        row = torch.cat((self.prompt[0], self.text[0])).unsqueeze(0)
        positions = torch.arange(row.shape[1], device=self.device).unsqueeze(0) + self.facts.first_position
        mask = torch.ones_like(positions)
        mask[:, :1] = 0
        said = [self._run(inputs_embeds=row), self._run(inputs_embeds=row, attention_mask=mask, position_ids=positions)]
        return next((one for one in said if isinstance(one, str)), None)

    def _why_not_padded(self, at: int, right: Tensor, said: str) -> str | None:
        """An objection to padding before column `at` of row 0's prompt and text."""
        row = torch.cat((self.prompt[0], self.text[0])).unsqueeze(0)
        row = torch.cat((row[:, :at], self.text[:1].flip(1), row[:, at:]), 1)
        mask = torch.ones(1, row.shape[1], dtype=torch.int64, device=self.device)
        mask[:, at : at + _PADDING] = 0
        positions = count_positions(mask, self.facts.first_position)
        found = self._run(inputs_embeds=row, attention_mask=mask, position_ids=positions)
        return self._differs(found if isinstance(found, str) else found[:, -_TEXT:], right, said)

    def _cache(self) -> Any:
        """A function that gives the prompt's keys and values for two rows; or why there is none."""

        def fill() -> Any:
            cache = self._empty()
            said = self._run(inputs_embeds=self.prompt, past_key_values=cache)
            return said if isinstance(said, str) else cache

        first = fill()
        if isinstance(first, str):
            return first
        size, layers = (1, _PROMPT), _held(first)
        if not layers or not all(
            keeps_all(layer) and getattr(layer.keys, "shape", ())[::2] == size for layer in layers
        ):
            return "the base model does not fill the cache that it is given"

        def copied() -> Any:
            cache = self._empty()
            for index, layer in enumerate(first.layers):
                if not reads_another(layer):
                    cache.update(layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1), index)
            return cache

        return copied

    def _run(self, position_ids: Tensor | None = None, **arguments: Any) -> Any:
        """Hidden states (B, S, D), or the error in words: whatever a base model's code raises, it is a reason."""
        if self.facts.places_position_ids and position_ids is not None:
            arguments["position_ids"] = position_ids
        if not self.facts.encoder_decoder:  # some hand it on to their encoder
            arguments["use_cache"] = "past_key_values" in arguments
        given = arguments.get("inputs_embeds", self.prompt_ids)
        embeds = given.clone()
        arguments.update({"inputs_embeds": embeds} if "inputs_embeds" in arguments else {})
        try:
            with numbered(self.model, arguments, self.facts.takes_position_ids):
                output = self.model(**arguments, return_dict=True)
        except Exception as error:
            return f"{type(self.model).__name__} says {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self.writes = self.writes or not torch.equal(given, embeds)
        return output[0]

    def _differs(self, found: Any, right: Tensor, said: str) -> str | None:
        if isinstance(found, str):
            return found
        each = (found.float() - right.float()).abs().amax(-1) / right.float().abs().amax().clamp(min=1e-30)
        exact = found.dtype in (torch.float32, torch.float64) and found.device.type == "cpu"
        # In low precision an expert's choice may flip for a token; of a wrong order all tokens are wrong.
        error, most = (each.max(), 2e-5) if exact else (each.median(), max(4 * torch.finfo(found.dtype).eps, 2e-3))
        return None if error <= most else said


def _held(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys of their own."""
    return [layer for layer in cache.layers if not reads_another(layer)]
