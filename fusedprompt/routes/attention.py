"""Attention of all rows to one prefix, in the base model's own layers: whether a call uses it, and how it gets there.

transformers' attentions ask its registry for the function that computes them. For the duration of a call the base
model's configuration names one of ours, which gives layers of a `PrefixedLayer` to `ops.prefix_attention` and all else
to the function that was named before. The base model's code is not touched, and calls of other threads meet nothing but
the detour.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..base.facts import transformers_model
from ..base.first_use import why_prefix_unread
from ..base.reading import NotRead, reader, reading
from .host import Host

# The attention of transformers that it stands in for: both compute the same. Others have kernels of their own.
_STANDS_FOR = {"sdpa": "fusedprompt_sdpa", "eager": "fusedprompt_eager"}
# Arguments of an attention that change nothing of what is computed here: the window is longer than all text.
_UNDERSTOOD = {"sliding_window", "position_ids", "use_cache", "output_attentions", "cache_position", "past_key_values"}

CHEAP = "copies of so few positions cost less than another attention"

_lock = threading.Lock()
_in_use: dict[int, tuple[Any, str, int]] = {}  # by a configuration's id: it, what it said, and how many calls run


@contextlib.contextmanager
def attending(configs: Sequence[Any], cache: Any = None) -> Iterator[None]:
    """Within the block the modules of some configurations read the prefix of a cache; see `base.prefixed_cache`.

    Raises:
        NotRead: they did not.
    """
    _register()
    ours = [config for config in configs if implementation(config) in _STANDS_FOR]
    with _named(ours), reading(cache):
        yield


def in_place(host: Host, cache: Any) -> contextlib.AbstractContextManager[None]:
    """Within the block the base model's attention reads the prefix of a cache where it is, if the cache has one."""
    has_prefix = any(getattr(layer, "prefix", None) is not None for layer in getattr(cache, "layers", ()))
    # Another attention may have been chosen since the cache was begun: the cache joins prefix and text for it.
    if not has_prefix or implementation(transformers_model(host.base_model).config) not in _STANDS_FOR:
        return contextlib.nullcontext()
    return attending(host.state.configs(), cache)


def in_place_later(host: Host) -> contextlib.AbstractContextManager[None]:
    """As `in_place`, of a cache that the block makes with `cache_to_read`."""
    return contextlib.nullcontext() if why_not_attend(host, None) is not None else attending(host.state.configs())


def cache_to_read(host: Host, states: Any, rows: int, size: int) -> Any:
    """A cache for `size` rows, of states of N prompt rows. In a block of `in_place_later` its prefix is read in place,
    where that pays."""
    now = reader()
    if now is None or now.cache is not None or cost_rule(rows, size) is not None:
        return states.for_rows(size)
    whole = all(layer.keys is not None for layer in states.cache.layers)
    cache = states.for_rows(size, attends=whole)
    now.cache = cache if whole else None
    return cache


@contextlib.contextmanager
def _named(configs: Sequence[Any]) -> Iterator[None]:
    """Within the block configurations name our attention, however many calls run."""
    with _lock:
        for config in configs:
            _, before, calls = _in_use.get(id(config), (config, config._attn_implementation, 0))
            _in_use[id(config)] = (config, before, calls + 1)
            if not calls:
                config._attn_implementation = {"": _STANDS_FOR[before]}  # of this configuration alone, not of its parts
    try:
        yield
    finally:
        with _lock:
            for config in configs:
                _, before, calls = _in_use.pop(id(config))
                if calls > 1:
                    _in_use[id(config)] = (config, before, calls - 1)
                else:
                    config._attn_implementation = {"": before}


def implementation(config: Any) -> str | None:
    """The attention that a configuration names, whether calls run or not."""
    with _lock:
        found = _in_use.get(id(config))
    named: str | None = getattr(config, "_attn_implementation", None) if found is None else found[1]
    return named


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for original, name in _STANDS_FOR.items():
        AttentionInterface.register(name, functools.partial(_attention, original))
        AttentionMaskInterface.register(name, functools.partial(_mask, original))


def _mask(original: str, *args: Any, **given: Any) -> Any:
    """The mask of the text's own keys: (B, S) bool, False at padding, or None; attention looks to the left anyway.

    For keys that do not begin behind a prefix, the mask that `original` needs.
    """
    from transformers.masking_utils import AttentionMaskInterface

    now, begin, count = reader(), given.get("kv_offset", 0), given.get("kv_length")
    if now is None or not begin:
        return AttentionMaskInterface()[original](*args, **given)
    if given.get("use_vmap"):
        raise NotRead("its mask is of a kind of its own")
    mask: Tensor | None = given.get("attention_mask")
    if mask is None:
        return None
    mask = mask[:, begin : begin + count].bool()
    # Looking makes the host wait for a device.
    return None if mask.device.type == "cpu" and bool(mask.all()) else mask


def _attention(
    original: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """What transformers calls: the (B, T, heads, width) that `query` (B, heads, T, width) finds."""
    now = reader()
    layer = None if now is None else now.layer_of(key, getattr(module, "layer_idx", None))
    if layer is None or layer.prefix is None:
        if attention_mask is not None and attention_mask.dim() == 2:
            raise NotRead("the mask of its prefix is given to another attention")
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap}
        given = {name: option for name, option in given.items() if option is not None}
        found: tuple[Tensor, Any] = _function(original, module)(
            module, query, key, value, attention_mask, **given, **others
        )
        return found
    odd = [name for name, option in others.items() if isinstance(option, Tensor) and name not in _UNDERSTOOD]
    looks_right = is_causal is False or getattr(module, "is_causal", True) is False
    if odd or dropout or looks_right or layer.own_values is not value:
        raise NotRead(f"its attention has {', '.join(odd) or 'dropout, no order, or values of its own'}")
    keys, values = (part.to(query.dtype) for part in layer.prefix)  # they differ under autocast
    output = ops.prefix_attention(
        query,
        keys,
        values,
        key,
        value,
        index=layer.index,
        prefix_mask=layer.mask,
        mask=attention_mask,
        scale=scaling,
        softcap=softcap,
    )
    return output.transpose(1, 2).contiguous(), None


def _function(original: str, module: Any) -> Callable[..., Any]:
    """The attention that a module would have called. Each file of transformers has an eager one of its own."""
    from transformers import AttentionInterface

    if original == "eager":
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    return AttentionInterface()[original]  # type: ignore[no-any-return]


# Deciding


def why_not_attend(host: Host, total: int | None) -> str | None:
    """Why the keys of a prefix cannot be read in place, and are joined with the text's in each row; or None.

    total: the most positions of a row, prefix included; None if that is not known.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces transformers' own attention"
    model = transformers_model(host.base_model)
    if model is None or host.facts.encoder_decoder or not host.facts.causal:
        return "it is for decoders"
    named = implementation(model.config)
    if named not in _STANDS_FOR:
        return f"the base model's attention is '{named}'"
    if host.state.findings().noise is not None:
        return "the base model is in training mode with dropout"
    window = host.sharing.window
    if window is not None and (total is None or total > window):
        count = "positions may be" if total is None else f"{total} positions are"
        return f"{count} more than the window of {window}"
    return why_prefix_unread(host.base_model, host.facts, attending)


def cost_rule(rows: int, size: int) -> str | None:
    """Why joining the keys of N positions with the text's in each of B rows costs no more, or None.

    Training steps of a 6-layer Llama (D=512) on two threads of an Intel Xeon, joined / one prefix, of B, N, T: 1.02 at
    4, 200, 210; 1.07 at 16, 200, 100; 1.23 at 8, 2000, 100. Few positions for many rows: 1.01 at 16, 64, 100; 0.92 at
    32, 50, 64, of a prefix (`make bench-prefix`).
    """
    return CHEAP if rows < 64 or size * rows < 800 else None
