"""What a prefix may begin with: a text's keys and values, a cache's, another adapter's; and cartridges joined.

Names, arguments and files are those of PEFT's utilities, where it has them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.cache import reads_another
from ..base.state import evaluating
from ..layouts.mixture import prompts_of_rows
from ..methods import CartridgeConfig, checkpoint, method_of
from ..methods.config import CONFIG_NAME, PromptLearningConfig
from ..methods.method import CACHE
from ..routes.choice import why_not_length, why_not_prompts
from ..routes.shared import run_prompt
from .prompt_model import PromptModel


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first N positions of a cache as a prefix, (N, 2 L D) in the cache's dtype.

    Args:
        past_key_values: a cache of transformers', or its layers' pairs of keys and values (1, heads, T, width), T >= N.

    Raises:
        TypeError: it is neither. ValueError: it has another shape, or its layers differ in theirs.
    """
    parts: list[Tensor] = []
    first: Tensor | None = None
    for index, tensor in enumerate(_tensors(past_key_values)):
        if tensor.dim() != 4 or tensor.shape[0] != 1:
            raise ValueError(
                f"past_key_values: expected tensors (1, heads, T, width), of one row, got {tuple(tensor.shape)}"
            )
        first = tensor if first is None else first
        if tensor.shape[1::2] != first.shape[1::2]:
            raise ValueError(
                f"past_key_values: expected layers with equal heads, {tuple(first.shape[1::2])}, "
                f"got {tuple(tensor.shape[1::2])} in layer {index // 2}"
            )
        if tensor.shape[2] < num_virtual_tokens:
            raise ValueError(
                f"past_key_values: expected at least num_virtual_tokens = {num_virtual_tokens} positions, "
                f"got {tensor.shape[2]} in layer {index // 2}"
            )
        parts.append(tensor[0, :, :num_virtual_tokens].transpose(0, 1))
    if not parts:
        raise ValueError("past_key_values: expected a cache that holds keys and values, got an empty one")
    return torch.stack(parts, 1).flatten(1)


def _tensors(past_key_values: Any) -> Iterator[Tensor]:
    """Keys and values of each layer in turn."""
    layers = getattr(past_key_values, "layers", past_key_values)
    if not isinstance(layers, (list, tuple)):
        got = type(past_key_values).__name__
        raise TypeError(f"past_key_values: expected a cache, or pairs of keys and values, got {got}")
    for layer in layers:
        pair = (layer.keys, layer.values) if hasattr(layer, "keys") else layer[:2]
        for tensor in pair:
            if not isinstance(tensor, Tensor):
                raise ValueError("past_key_values: expected a cache that holds keys and values, got an empty layer")
            yield tensor


def _fitted(model: PromptModel, name: str, past_key_values: Any, rows: int) -> Any:
    """A cache's layers in the shape of an adapter's: zeros stand in heads and columns that a layer has not, in layers
    that read another's, and for what a layer with a window has let go, which nobody sees behind it.

    Raises:
        ValueError: a layer with a window has let go of the first of `rows` positions and holds later ones.
    """
    layers, config = getattr(past_key_values, "layers", None), model.peft_config[name]
    if layers is None:
        return past_key_values
    heads, count = int(config.num_attention_heads or 0), int(config.num_layers or 0)
    width, pairs = int(config.token_dim or 0) // heads, list[tuple[Tensor, ...] | None]()
    for index, layer in enumerate(layers):
        if reads_another(layer) or not isinstance(layer.keys, Tensor):
            pairs.append(None)
            continue
        held = layer.keys.shape[-2]
        total = int(getattr(layer, "cumulative_length", held))
        if total not in (held, rows):
            raise ValueError(
                f"past_key_values: expected layers that hold the first {rows} positions, got layer {index} with a "
                f"window, which holds the last {held} of {total}"
            )
        pairs.append(
            tuple(
                F.pad(part, (0, max(width - part.shape[-1], 0), total - held, 0, 0, max(heads - part.shape[-3], 0)))
                for part in (layer.keys, layer.values)
            )
        )
    like = next((pair for pair in pairs if pair is not None), None)
    if like is None:
        return past_key_values
    pairs += [None] * (count - len(pairs))
    return [tuple(map(torch.zeros_like, like)) if pair is None else pair for pair in pairs]


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PromptModel, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Set a prefix to the first positions of a cache.

    Args:
        adapter_name: of prefix tuning without projection, or of a cartridge; by default the active one.
        num_virtual_tokens: the adapter's, which is the default.

    Returns:
        What the adapter was given, (N, 2 L D).

    Raises:
        ValueError: the adapter is of another method, has a projection, or another shape.
    """
    name = _prefix_of(model, adapter_name)
    rows = model.prompts[name].rows if num_virtual_tokens is None else num_virtual_tokens
    prompt = prompt_embeddings_from_past_key_values(
        _fitted(model, name, past_key_values, rows), num_virtual_tokens=rows
    )
    encoder: Any = model.prompt_encoder[name]
    encoder.load_prompt_embeddings(prompt)
    return prompt


def initialize_kv_prefix_from_text(
    model: PromptModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Set a prefix to the first keys and values that the base model makes of a text, by itself and in evaluation mode.

    Args:
        use_chat_template: the text is a system message in the tokenizer's chat template, if that has one.
        max_length: the most tokens that are read.

    Returns, Raises: as `initialize_kv_prefix_from_past_key_values`.
    """
    name = _prefix_of(model, adapter_name)
    ids = _ids(tokenizer, text, use_chat_template, max_length).to(model.prompt_device)
    from transformers import DynamicCache

    cache = DynamicCache()  # whose layers let go of nothing, windows or not
    with torch.no_grad(), evaluating(model.base_model), model.disable_adapter():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    """(1, T), as PEFT tokenizes it."""
    ids: Tensor
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}],
                tokenize=True,
                add_generation_prompt=False,
                return_dict=False,
                return_tensors="pt",
            )
            return ids[:, :max_length]
        except (TypeError, ValueError):  # without a template, or with one that takes no system message
            pass
    ids = tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]
    return ids


@torch.no_grad()
def initialize_kv_prefix_from_adapter(
    model: PromptModel, *, source: str, adapter_name: str | None = None, task_id: int | None = None
) -> Tensor:
    """Set a prefix to what another adapter of the same model is to the text: a prompt's rows go through the base model
    once, and what they leave in its cache is the prefix; a prefix is taken as it is.

    Args:
        source: an adapter with as many virtual tokens. task_id: which of its prompts, if it has one for each task.

    Returns, Raises: as `initialize_kv_prefix_from_past_key_values`.
    """
    name = _prefix_of(model, adapter_name)
    model._check_known(source)
    own, other = model.prompts[name], prompts_of_rows(model.prompts, [source], [task_id])[0] or model.prompts[source]
    if own.rows != other.rows:
        raise ValueError(f"source: expected an adapter of {own.rows} virtual tokens, got {source!r} of {other.rows}")
    with evaluating(model.base_model), evaluating(model.prompt_encoder[source]):
        if other.in_cache:
            prompt = model.table((other,)).clone()
        else:
            objection = why_not_prompts(model, (other,)) or why_not_length(model, own.rows)
            if objection is not None:
                raise ValueError(
                    f"source: expected an adapter whose text can read its keys and values, but {objection}"
                )
            cache = run_prompt(model, (other,), all_logits=False).cache
            prompt = prompt_embeddings_from_past_key_values(
                _fitted(model, name, cache, own.rows), num_virtual_tokens=own.rows
            )
    encoder: Any = model.prompt_encoder[name]
    encoder.load_prompt_embeddings(prompt)
    return prompt


def _prefix_of(model: PromptModel, adapter_name: str | None) -> str:
    """The name of an adapter that can be set to keys and values."""
    name = model._prompt().name if adapter_name is None else adapter_name
    model._check_known(name)
    method = method_of(model.peft_config[name])
    if method.product != CACHE:
        raise ValueError(f"adapter_name: expected a prefix of keys and values, got {name!r} of {method.name}")
    if getattr(model.prompt_encoder[name], "prefix_projection", False):
        raise ValueError(f"adapter_name: expected an adapter without prefix_projection, got {name!r} with it")
    if model.facts.encoder_decoder:
        raise ValueError(
            "model: expected a decoder, whose text has keys and values as a prefix has, got an encoder-decoder"
        )
    return name


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Join saved cartridges, one behind another, to one. It has as many frozen tokens as the first.

    Raises:
        ValueError: there are fewer than two, one is no cartridge, or they are of models of other shapes.
        FileNotFoundError: a folder has no adapter.
    """
    if len(adapter_paths) < 2:
        raise ValueError(f"adapter_paths: expected at least 2 folders, got {len(adapter_paths)}")
    if not safe_serialization:
        raise ValueError("safe_serialization: expected True, got False: adapters are safetensors files")
    configs: list[CartridgeConfig] = []
    tables: list[Tensor] = []
    for path in adapter_paths:
        config = PromptLearningConfig.from_pretrained(path)
        if not isinstance(config, CartridgeConfig):
            raise ValueError(f"adapter_paths: expected cartridges, got {os.fspath(path)!r} of {method_of(config).name}")
        for field in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if configs and getattr(config, field) != getattr(configs[0], field):
                raise ValueError(
                    f"adapter_paths: expected cartridges of one {field}, {getattr(configs[0], field)}, "
                    f"got {getattr(config, field)} in {os.fspath(path)!r}"
                )
        configs.append(config)
        tensors, _ = checkpoint.read_tensors(checkpoint.stored(path, checkpoint.ADAPTER_NAME))
        tables.append(tensors[checkpoint.PROMPT_KEY])
    joined = torch.cat(tables)
    config = dataclasses.replace(configs[0], num_virtual_tokens=joined.shape[0])
    from safetensors.torch import save_file

    with checkpoint.atomic_writes(Path(output_path)) as stage:
        (stage / CONFIG_NAME).write_text(config.to_json())
        # Without metadata, as PEFT writes it here.
        save_file({checkpoint.PROMPT_KEY: joined}, str(stage / checkpoint.ADAPTER_NAME))
