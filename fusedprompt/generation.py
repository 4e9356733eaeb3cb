"""`generate` with a prompt: the base model's own `generate` on spliced embeddings. Nothing is patched.

transformers takes `inputs_embeds` for the first step and `input_ids` for all that reads the text (processors, stopping
criteria, the returned sequences), which is what a soft prompt needs.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .base_model import cache_length
from .layout import Layout
from .mixed import Mixture, refuse_cache, splice_mixture
from .ops._backend import BackendUnavailable
from .placing import with_slots
from .prompt_cache import prompt_states
from .routes import SplicedInputs, Turn, choose_layout, place, splice_route
from .shared import PromptStates, prompt_first
from .sharing import SHARED, SPLICE, choose, why_not_length, why_not_model
from .tasks import Batch
from .template import Template

if TYPE_CHECKING:
    from .model import PromptModel


def generate(model: PromptModel, inputs: Tensor | None, route: str, **kwargs: Any) -> Any:
    """Generate with the active adapter's prompt; see `PromptModel.generate`."""
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise ValueError("inputs, input_ids: expected one of the two, got both")
    kwargs.pop("token_type_ids", None)
    slots, names = kwargs.pop("slots", None), kwargs.pop("adapter_names", None)
    if slots is not None and names is not None:
        raise ValueError("adapter_names: expected None with slots, got both")
    if slots is not None:
        return _placed(model, inputs, Layout.from_slots(slots, model.table_rows_count()), route, kwargs)
    if names is not None:
        _refuse_mixed(model, kwargs)
    with model.heads_for_rows(names):
        if model.facts.encoder_decoder:
            return _encoder_decoder(model, inputs, kwargs, names)
        return _decoder(model, inputs, route, kwargs, names)


def _refuse_mixed(model: PromptModel, kwargs: dict[str, Any]) -> None:
    """What cannot be done for rows of different adapters."""
    if kwargs.get("assistant_model") is not None or _option(model.base_model, kwargs, "prompt_lookup_num_tokens"):
        raise ValueError(
            "adapter_names: expected None with assisted decoding, which generates one row: use set_adapter"
        )
    if cache_length(kwargs.get("past_key_values")):
        refuse_cache(adapter_names=())


def _encoder_decoder(
    model: PromptModel, inputs: Tensor | None, kwargs: dict[str, Any], names: Sequence[str] | None
) -> Any:
    if kwargs.get("encoder_outputs") is not None:
        raise ValueError(
            "encoder_outputs: expected None, because the prompt goes through the encoder; pass input_ids instead"
        )
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    mask = kwargs.pop("attention_mask", None)
    if mask is None and ids is not None:
        mask = _infer_mask(model, ids, kwargs)
    embeds = kwargs.pop("inputs_embeds", None)
    mixture = None if names is None else Mixture.of(model, names, ids if ids is not None else embeds)
    spliced = _splice(model, ids, embeds, mask, mixture=mixture)
    return model.base_model.generate(**spliced.arguments, **kwargs)


def _decoder(
    model: PromptModel, inputs: Tensor | None, route: str, kwargs: dict[str, Any], names: Sequence[str] | None
) -> Any:
    base: Any = model.base_model
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    embeds = kwargs.pop("inputs_embeds", None)
    if ids is None and embeds is None:
        ids = _start_of_text(model, kwargs)
    mask = kwargs.pop("attention_mask", None)
    if mask is None and ids is not None:
        mask = _infer_mask(model, ids, kwargs)
    tokens = ids if ids is not None else embeds
    _count_new_tokens(base, tokens.shape[1], kwargs)
    rows = model.prompt_rows_count()
    mixture = None if names is None else Mixture.of(model, names, tokens)
    if mixture is None and ids is not None and mask is not None and mask.shape[1] != ids.shape[1]:
        # Only new tokens, after a cache that the mask covers: the prompt is in the cache.
        if mask.shape[1] != cache_length(kwargs.get("past_key_values")) - rows + ids.shape[1]:
            raise ValueError(
                f"attention_mask: expected shape (B, T) = {tuple(ids.shape)}, or the columns of the cached text too, "
                f"got {tuple(mask.shape)}"
            )
        layout = choose_layout(model.facts, rows, mask, mask, start=model.active_start)[0]
        if prompt_first(kwargs.get("past_key_values")):
            layout = Layout.prefix(rows)
        return base.generate(input_ids=ids, attention_mask=layout.fill(mask, 1), **kwargs)
    position_ids = kwargs.pop("position_ids", None)
    if embeds is not None and ids is not None and embeds.shape[1] != ids.shape[1]:
        raise ValueError(f"inputs_embeds: expected the length of input_ids, {ids.shape[1]}, got {embeds.shape[1]}")
    states = _share(model, tokens, route, kwargs, position_ids, mixture)
    in_front = states is not None or prompt_first(kwargs.get("past_key_values"))
    spliced = _splice(model, ids if embeds is None else None, embeds, mask, position_ids, in_front, mixture)
    if position_ids is None:
        spliced.arguments.pop("position_ids", None)  # transformers counts them from the mask, at every step
    return _run_decoder(model, ids, embeds, spliced, states, kwargs)


def _run_decoder(
    model: PromptModel,
    ids: Tensor | None,
    embeds: Tensor | None,
    spliced: SplicedInputs,
    states: PromptStates | None,
    kwargs: dict[str, Any],
) -> Any:
    """The base model's `generate` on a batch whose prompt is in its place, or in `states`."""
    base: Any = model.base_model
    if kwargs.get("assistant_model") is not None or _option(base, kwargs, "prompt_lookup_num_tokens"):
        return _assisted(model, ids if embeds is None else None, spliced, states, kwargs)
    if kwargs.get("use_cache") is False:
        warnings.warn(
            "use_cache=False is ignored: transformers generates from embeddings only with a cache. The result is the "
            "same.",
            stacklevel=5,
        )
        kwargs["use_cache"] = True
    if states is not None:
        # transformers skips as many of the embeddings as the cache holds: the prompt's.
        copies = max(int(_option(base, kwargs, name) or 1) for name in ("num_beams", "num_return_sequences"))
        size, length = spliced.arguments["inputs_embeds"].shape[:2]
        kwargs["past_key_values"] = _filled_cache(
            base, states, size * copies, length + _most_new_tokens(base, kwargs), kwargs
        )
    return base.generate(input_ids=ids, **spliced.arguments, **kwargs)


def place_template(
    model: PromptModel, template: Template, inputs: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `generate` with the slots that the active adapter's template gives them."""
    if cache_length(kwargs.get("past_key_values")):
        raise ValueError(
            f"past_key_values: expected an empty cache with the template {str(template)!r}: what follows a cache is "
            "not put into the template again"
        )
    kwargs = dict(kwargs)
    fields = kwargs.pop("fields", None)
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    tensors: dict[str, Any] = {name: kwargs.pop(name, None) for name in names}
    if inputs is not None:
        tensors["input_ids"] = inputs
    if tensors["input_ids"] is None and tensors["inputs_embeds"] is None and fields is None:
        raise ValueError(f"input_ids: expected input_ids, inputs_embeds or fields for the template {str(template)!r}")
    if tensors["attention_mask"] is None and tensors["input_ids"] is not None:
        tensors["attention_mask"] = _infer_mask(model, tensors["input_ids"], kwargs)
    batch = Batch(**tensors)
    with_slots(model, template, batch, fields)
    assert batch.layout is not None
    placed = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    return {**kwargs, **placed, "slots": batch.layout.slots}


def _placed(model: PromptModel, inputs: Tensor | None, layout: Layout, route: str, kwargs: dict[str, Any]) -> Any:
    """Generate behind rows whose layout is given. Padding at the right is moved to the left, as decoders need it."""
    choose(route, "the slots say where each prompt row goes" if route == SHARED else None, None)
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    embeds, mask = kwargs.pop("inputs_embeds", None), kwargs.pop("attention_mask", None)
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds with slots, got neither")
    decoder = not model.facts.encoder_decoder
    assert layout.slots is not None
    if cache_length(kwargs.get("past_key_values")):
        raise ValueError("slots: expected None for tokens that follow a cache, in which the prompt stands already")
    position_ids = kwargs.pop("position_ids", None)
    if mask is None:
        mask = torch.ones_like(layout.slots)
    spliced = place(
        model.facts,
        model.word_embeddings,
        model.prompt_table(),
        layout,
        input_ids=ids if embeds is None else None,
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids,
        turn=Turn.LAST_TO_END if decoder else None,
    )
    if not decoder:
        return model.base_model.generate(**spliced.arguments, **kwargs)
    _count_new_tokens(model.base_model, tokens.shape[1], kwargs)
    if position_ids is None:
        spliced.arguments.pop("position_ids", None)  # transformers counts them from the mask, at every step
    return _run_decoder(model, ids, embeds, spliced, None, kwargs)


def _share(
    model: PromptModel,
    tokens: Tensor,
    route: str,
    kwargs: dict[str, Any],
    position_ids: Tensor | None,
    mixture: Mixture | None,
) -> PromptStates | None:
    """The prompt's states, if this call prefills the text alone; else None."""
    cache = kwargs.get("past_key_values")
    if route == SPLICE or cache_length(cache):
        return None
    assert model.active_adapter is not None
    objection = why_not_model(model, *((model.active_adapter,) if mixture is None else mixture.adapters))
    if objection is None:
        objection = _why_not_generate(model, tokens, kwargs, position_ids)
    if objection is None:
        rows = model.prompt_rows_count() if mixture is None else mixture.longest
        objection = why_not_length(model, rows + tokens.shape[1] + _most_new_tokens(model.base_model, kwargs))
    if not choose(route, objection, None):
        return None
    try:
        return prompt_states(model, all_logits=False, mixture=mixture)
    except BackendUnavailable:
        if route == SHARED:
            raise
        return None


def _why_not_generate(
    model: PromptModel, tokens: Tensor, kwargs: dict[str, Any], position_ids: Tensor | None
) -> str | None:
    base = model.base_model
    if not tokens.shape[0] or not tokens.shape[1]:
        return "there are no tokens"
    if position_ids is not None:
        return "transformers counts position_ids of a cached prompt by itself"
    if kwargs.get("past_key_values") is not None:
        return "the caller's own cache is to be filled"
    kind, own = _option(base, kwargs, "cache_implementation"), base.generation_config.cache_implementation
    if kind not in (None, "dynamic", "static") or (own is not None and kwargs.get("generation_config") is None):
        return f"transformers makes the cache of kind '{kind}' by itself"
    for option in ("output_attentions", "output_hidden_states", "prefill_chunk_size"):
        if _option(base, kwargs, option):
            return f"{option} covers the virtual tokens"
    return None


def _most_new_tokens(base: Any, kwargs: dict[str, Any]) -> int:
    """The most tokens that are generated; transformers' default is 20."""
    return int(_option(base, kwargs, "max_new_tokens") or 20)


def _filled_cache(base: Any, states: PromptStates, size: int, length: int, kwargs: dict[str, Any]) -> Any:
    """A cache that holds the prompt for `size` rows: one that grows, or a static one of `length` positions."""
    kind = _option(base, kwargs, "cache_implementation")
    kwargs.pop("cache_implementation", None)
    if getattr(kwargs.get("generation_config"), "cache_implementation", None) is not None:
        config = kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
        config.cache_implementation = None
    cache = states.for_rows(size)
    if kind != "static":
        return cache
    from transformers import StaticCache

    static = StaticCache(config=base.config, max_cache_len=length)
    static.prompt_first = True
    fill(static, cache)
    return static


def fill(cache: Any, source: Any) -> None:
    """Put all keys and values of one cache into another, empty one."""
    for index, layer in enumerate(source.layers):
        positions = torch.arange(layer.keys.shape[-2], device=layer.keys.device)
        cache.update(layer.keys, layer.values, index, {"cache_position": positions})


def _splice(
    model: PromptModel,
    ids: Tensor | None,
    embeds: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None = None,
    in_front: bool = False,
    mixture: Mixture | None = None,
) -> SplicedInputs:
    """in_front: the prompt goes before the padding, as it stands in a cache."""
    if mixture is not None and in_front:
        if embeds is None:
            embeds = model.word_embeddings(ids)
        arguments = {"inputs_embeds": F.pad(embeds, (0, 0, mixture.longest, 0))}  # the prompts are in the cache
        wide_mask = mixture.prompt_first_mask(mask, embeds.shape[1])
        if wide_mask is not None:
            arguments["attention_mask"] = wide_mask
        return SplicedInputs(embeds[0, :0], Layout.prefix(mixture.longest), arguments)
    if mixture is not None:
        return splice_mixture(
            model,
            mixture,
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            pool_last=model.facts.causal,
        )
    rows = model.prompt_rows()
    spliced = splice_route(
        model.facts,
        model.word_embeddings,
        rows,
        input_ids=ids,
        inputs_embeds=embeds,
        attention_mask=None if in_front else mask,
        position_ids=positions,
        start=model.active_start,
    )
    if in_front and mask is not None:
        spliced.arguments["attention_mask"] = spliced.layout.fill(mask, 1)
    return spliced


def _assisted(
    model: PromptModel,
    ids: Tensor | None,
    spliced: SplicedInputs,
    states: PromptStates | None,
    kwargs: dict[str, Any],
) -> Any:
    """Speculative decoding counts cached positions by the ids, so here the prompt occupies columns of the ids.

    Those columns repeat the row's first token, are embedded as the prompt in the first step (a forward hook, for this
    call only) or, if its states are known, put into the cache there, and are cut out of the result.
    """
    if ids is None:
        raise ValueError("input_ids: expected ids for assisted decoding, got only inputs_embeds")
    base: Any = model.base_model
    rows, thread = spliced.prompt, threading.get_ident()
    layout, wide_mask = spliced.layout, spliced.arguments.get("attention_mask")
    if wide_mask is None:
        wide_mask = layout.fill(torch.ones_like(ids), 1)
    columns = torch.arange(wide_mask.shape[1], device=ids.device).expand(ids.shape[0], -1)
    # Slots over the wide ids: every column is itself, but for the prompt's.
    prompt_slots = layout.slots if layout.slots is not None else ~columns
    slots = torch.where(layout.fill(torch.zeros_like(ids), 1) > 0, prompt_slots, columns)
    wide_ids = layout.fill(ids, 0)
    first = wide_ids.gather(1, ((wide_mask != 0) & (slots >= 0)).to(torch.int8).argmax(1, keepdim=True))
    wide_ids = torch.where(slots < 0, first, wide_ids)

    def embed_prompt(_: Any, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache: Any = call.get("past_key_values")
        if threading.get_ident() != thread or call.get("input_ids") is None or cache_length(cache):
            return args, call
        given = call.pop("input_ids")  # the wide ids, and candidates behind them
        if states is not None:
            fill(cache, states.for_rows(given.shape[0]))
            counted = {name: call[name] for name in ("position_ids", "cache_position") if call.get(name) is not None}
            cut = {name: value[..., rows.shape[0] :] for name, value in {**counted, "input_ids": given}.items()}
            cache.prompt_first = True
            return args, {**call, **cut}
        more = torch.arange(wide_ids.shape[1], given.shape[1], device=given.device).expand(given.shape[0], -1)
        layout = Layout.from_slots(torch.cat((slots, more), dim=1), rows.shape[0])
        return args, {**call, "inputs_embeds": ops.splice(rows, layout, inputs_embeds=model.word_embeddings(given))}

    hook = base.register_forward_pre_hook(embed_prompt, with_kwargs=True)
    try:
        output = base.generate(input_ids=wide_ids, attention_mask=wide_mask, **kwargs)
    finally:
        hook.remove()
    sequences = output if isinstance(output, Tensor) else output.sequences
    narrow = torch.cat((ids.to(sequences.device), sequences[:, wide_ids.shape[1] :]), dim=1)
    if isinstance(output, Tensor):
        return narrow
    output.sequences = narrow
    return output


def _option(base: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A generation option: from the call, else from its generation_config, else from the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    config = kwargs.get("generation_config")
    value = getattr(config, name, None) if config is not None else None
    return value if value is not None else getattr(base.generation_config, name, None)


def _start_of_text(model: PromptModel, kwargs: dict[str, Any]) -> Tensor:
    """As transformers: without any input, one row that starts with the BOS token."""
    bos = _option(model.base_model, kwargs, "bos_token_id")
    if bos is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds, because the model has no bos_token_id")
    return torch.full((1, 1), int(bos), dtype=torch.int64, device=model.prompt_device)


def _infer_mask(model: PromptModel, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """As transformers: padding is told from text by the pad token, if that is not also an end-of-text token."""
    pad = _option(model.base_model, kwargs, "pad_token_id")
    eos = _option(model.base_model, kwargs, "eos_token_id")
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    mask: Tensor = (ids != pad).to(ids.dtype)
    return mask


def _count_new_tokens(base: Any, length: int, kwargs: dict[str, Any]) -> None:
    """Turn limits on the whole sequence into limits on new tokens.

    With embeddings and ids of different lengths transformers subtracts the embeddings' length from max_length, and so
    would count the prompt as text.
    """
    config = kwargs.get("generation_config")
    for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = kwargs.pop(whole, None)
        if limit is None and kwargs.get(new) is None and getattr(config, new, None) is None:
            source = config if config is not None else base.generation_config
            limit = getattr(source, whole, None)
            if limit and config is not None:
                config = kwargs["generation_config"] = copy.copy(config)
                setattr(config, whole, None)
        if not limit or kwargs.get(new) is not None:
            continue
        if whole == "max_length" and limit <= length:
            raise ValueError(f"max_length: expected more than the {length} tokens of the input, got {limit}")
        kwargs[new] = max(int(limit) - length, 0)
