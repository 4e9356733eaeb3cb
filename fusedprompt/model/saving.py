"""From a model's adapter to files, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import saved_modules
from ..base.state import evaluating
from ..layouts.template import Template
from ..methods import PromptModule, checkpoint, method_of
from ..methods.config import CONFIG_NAME, PromptLearningConfig, format_json
from ..methods.method import CACHE
from .adapters import PromptAdapters


def save(
    model: PromptAdapters, adapter_name: str, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write one adapter of a model into a folder: configuration, PEFT's tensors, the encoder's own parameters if it is
    to be trained on, and the template if it has one.

    state_dict: values of the model's parameters instead of its own.
    """
    config, place = copy.copy(model.peft_config[adapter_name]), model.prompts[adapter_name]
    saves_encoder = not config.inference_mode and method_of(config).keeps_encoder(config)
    config.inference_mode = True  # PEFT's files always say so
    fields = config.to_dict()
    if place.start:
        fields[checkpoint.PROMPT_START_KEY] = place.start
    if place.pattern is not None:
        fields[checkpoint.PEFT_TYPE_KEY] = fields["peft_type"]
        fields["peft_type"] = (
            f"a fusedprompt adapter with the template {place.pattern}, while PEFT only puts prompts in front of a text"
        )
    elif _is_tied_by_peft(model, config):
        fields[checkpoint.PEFT_TYPE_KEY] = fields["peft_type"]
        fields["peft_type"] = (
            f"a fusedprompt adapter whose decoder has keys and values of its own in each of {config.num_layers} "
            "layers, while PEFT gives those of the first half to the second"
        )
    encoder, prompt, copies = _values(model, adapter_name, state_dict or {})
    tensors = {checkpoint.PROMPT_KEY: prompt, **{name: encoder[name] for name in method_of(config).in_file}, **copies}
    with checkpoint.atomic_writes(folder) as stage:
        (stage / CONFIG_NAME).write_text(format_json(fields))
        checkpoint.write_tensors(stage / checkpoint.ADAPTER_NAME, tensors)
        if place.template is not None:
            (stage / checkpoint.TEMPLATE_NAME).write_text(place.template.to_json())
        if saves_encoder:
            belongs_to = checkpoint.fingerprint(prompt)
            checkpoint.write_tensors(stage / checkpoint.ENCODER_NAME, encoder, prompt_sha256=belongs_to)
        written = {file.name for file in stage.iterdir()}
    for name in {checkpoint.ENCODER_NAME, checkpoint.TEMPLATE_NAME} - written:
        (folder / name).unlink(missing_ok=True)  # belongs to an adapter that this one replaced


def _is_tied_by_peft(model: PromptAdapters, config: PromptLearningConfig) -> bool:
    """Whether PEFT would read half of a prefix's keys and values in all layers; see `routes.prefix.layer_order`."""
    of_decoder = method_of(config).product == CACHE and model.facts.encoder_decoder
    return of_decoder and (config.num_layers or 0) % 2 == 0


def _values(
    model: PromptAdapters, adapter_name: str, given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """An adapter's encoder, prompt and copies of modules; by the values that are given, where there are such."""
    encoder: Any = model.prompt_encoder[adapter_name]
    prefix = f"prompt_encoder.{adapter_name}."
    own = {name: given.get(prefix + name, value) for name, value in encoder.state_dict().items()}
    if any(prefix + name in given for name in own):
        with torch.no_grad(), evaluating(encoder):
            rows = torch.func.functional_call(encoder, own, ())
        prompt = rows.detach().cpu()
    else:
        prompt = model.get_prompt_embedding_to_save(adapter_name)
    infix = f".modules_to_save.{adapter_name}"
    of_file = {name.replace(infix, "", 1): value for name, value in given.items() if infix + "." in name}
    copies = saved_modules.tensors(model.base_model, adapter_name)
    return own, prompt, {name: of_file.get(name, value) for name, value in copies.items()}


def load(model: PromptAdapters, adapter_name: str, folder: Path, is_trainable: bool) -> None:
    """Read an adapter from a folder, check every tensor against a model, and only then put it into the model."""
    fields = checkpoint.read_json(folder / CONFIG_NAME)
    prompt_start = int(fields.pop(checkpoint.PROMPT_START_KEY, 0))
    peft_type = fields.pop(checkpoint.PEFT_TYPE_KEY, None)
    if peft_type is not None:
        fields["peft_type"] = peft_type
    config = model._resolve(PromptLearningConfig.from_dict(fields, origin=str(folder / CONFIG_NAME)))
    config.inference_mode = not is_trainable
    own_order = _is_tied_by_peft(model, config)
    in_template = peft_type is not None and not own_order
    template = _load_template(model, folder, config, prompt_start, required=in_template)
    file = checkpoint.stored(folder, checkpoint.ADAPTER_NAME)
    tensors, _ = checkpoint.read_tensors(file)
    encoder = method_of(config).module(config.blank(), model.word_embeddings)
    expected = {
        checkpoint.PROMPT_KEY: torch.empty(encoder.total_virtual_tokens, encoder.product_width, device="meta"),
        **{name: encoder.get_parameter(name) for name in method_of(config).in_file},
        **saved_modules.expected_tensors(model.base_model, config.modules_to_save or []),
    }
    checkpoint.check_tensors(file, tensors, expected)
    prompt = tensors.pop(checkpoint.PROMPT_KEY)
    if own_order and peft_type is None:  # PEFT's file: both layers of a pair begin with what it gives them
        pairs = prompt.view(prompt.shape[0], -1, 2, 2 * encoder.token_dim)
        prompt = pairs[:, :, :1].expand_as(pairs).reshape(prompt.shape)
    with torch.no_grad():
        if not is_trainable:
            encoder.load_prompt_embeddings(prompt)
        else:
            _load_encoder(encoder, config, folder, prompt)
        for name in method_of(config).in_file:
            encoder.get_parameter(name).copy_(tensors.pop(name))
    before = _parameters(model, adapter_name)
    if adapter_name in model.peft_config:
        model._remove(adapter_name)
    model._install(adapter_name, config, prompt_start, encoder, template)
    with torch.no_grad():
        for key, parameter in saved_modules.tensors(model.base_model, adapter_name).items():
            parameter.copy_(tensors[key])
    _keep(model, _parameters(model, adapter_name), before)
    model.set_adapter(model.active_adapter or adapter_name)


def _parameters(model: PromptAdapters, adapter_name: str) -> dict[str, nn.Parameter]:
    """An adapter's, by path."""
    marks = (f"prompt_encoder.{adapter_name}.", f".modules_to_save.{adapter_name}.")
    named = model.named_parameters()
    return {path: one for path, one in named if path.startswith(marks[0]) or marks[1] in path}


def _keep(model: PromptAdapters, now: Mapping[str, nn.Parameter], before: Mapping[str, nn.Parameter]) -> None:
    """Put former parameters, which an optimizer may hold, in the places of those that are like them."""
    for path, parameter in now.items():
        old = before.get(path)
        if old is None or (old.shape, old.dtype, old.device) != (parameter.shape, parameter.dtype, parameter.device):
            continue
        parent, _, name = path.rpartition(".")
        with torch.no_grad():
            old.copy_(parameter)
        setattr(model.get_submodule(parent), name, old)


def _load_template(
    model: PromptAdapters, folder: Path, config: PromptLearningConfig, prompt_start: int, required: bool
) -> Template | None:
    """The folder's template, checked against the model. One that is not required is the plain prefix, or left over."""
    path = checkpoint.stored(folder, checkpoint.TEMPLATE_NAME)
    if not path.is_file():
        if required:
            raise FileNotFoundError(f"{path}: no such file; {CONFIG_NAME} says that the adapter has a template")
        return None
    try:
        template = Template.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not required and not template.is_plain_prefix:
        return None
    model._check_template(template, config, prompt_start)
    return template


def _load_encoder(encoder: PromptModule, config: PromptLearningConfig, folder: Path, prompt: Tensor) -> None:
    method = method_of(config)
    stored = checkpoint.read_encoder(folder, prompt) if method.keeps_encoder(config) else None
    if stored is not None:
        file, tensors = stored
        checkpoint.check_tensors(file, tensors, encoder.state_dict())
        # In the dtype it was trained in, so that it computes the same prompt.
        encoder.to(next(iter(tensors.values())).dtype)
        encoder.load_state_dict(tensors)
    elif method.from_prompt is not None:
        method.from_prompt(encoder, prompt)
    else:
        raise ValueError(
            f"{folder}: expected {checkpoint.ENCODER_NAME} to train on, but it is not there: PEFT saves only what the "
            "encoder computed. Load with is_trainable=False, or train from a folder saved by fusedprompt."
        )
