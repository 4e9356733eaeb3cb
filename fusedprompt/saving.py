"""From a model's adapter to files, and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint, heads, modules
from .config import (
    CONFIG_NAME,
    CPTConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    format_json,
)

if TYPE_CHECKING:
    from .model import PromptModel

# Beside PEFT's fields in adapter_config.json, and only where the prompt is not at PEFT's place: PEFT warns of it.
PROMPT_START_KEY = "fusedprompt_prompt_start"


@dataclass
class LoadedAdapter:
    """An adapter read from files and checked against a model, not yet part of it."""

    config: PromptLearningConfig
    prompt_start: int
    encoder: modules.PromptModule
    head_tensors: dict[str, Tensor]


def save(model: PromptModel, adapter_name: str, folder: Path) -> None:
    """Write one adapter of a model into a folder."""
    config = copy.copy(model.peft_config[adapter_name])
    encoder = None
    if not config.inference_mode and not isinstance(config, PromptTuningConfig):
        encoder = model.prompt_encoder[adapter_name].state_dict()
    config.inference_mode = True  # PEFT's files always say so
    prompt = model.get_prompt_embedding_to_save(adapter_name)
    tensors = {checkpoint.PROMPT_KEY: prompt, **heads.tensors(model.base_model, adapter_name)}
    fields = config.to_dict()
    if model.prompt_start[adapter_name]:
        fields[PROMPT_START_KEY] = model.prompt_start[adapter_name]
    checkpoint.save_adapter(folder, format_json(fields), CONFIG_NAME, tensors, encoder)


def load(model: PromptModel, folder: Path, is_trainable: bool) -> LoadedAdapter:
    """Read an adapter from a folder and check every tensor against a model, which is not changed."""
    fields = checkpoint.read_json(folder / CONFIG_NAME)
    prompt_start = int(fields.pop(PROMPT_START_KEY, 0))
    config = model._resolve(PromptLearningConfig.from_dict(fields, origin=str(folder / CONFIG_NAME)))
    config.inference_mode = not is_trainable
    file = checkpoint.stored(folder, checkpoint.ADAPTER_NAME)
    tensors, _ = checkpoint.read_tensors(file)
    encoder = _build(model, config)
    expected = {
        checkpoint.PROMPT_KEY: encoder.embedding.weight,
        **heads.expected_tensors(model.base_model, config.modules_to_save or []),
    }
    checkpoint.check_tensors(file, tensors, expected)
    prompt = tensors.pop(checkpoint.PROMPT_KEY)
    with torch.no_grad():
        if not is_trainable or isinstance(config, PromptTuningConfig):
            encoder.embedding.weight.copy_(prompt)
        else:
            _load_encoder(encoder, config, folder, prompt)
    return LoadedAdapter(config, prompt_start, encoder, tensors)


def _build(model: PromptModel, config: PromptLearningConfig) -> modules.PromptModule:
    """The adapter's module, with any values: they are about to be replaced."""
    if isinstance(config, PromptTuningConfig):
        # Initialising from a text would ask for a tokenizer that may be elsewhere.
        config = copy.copy(config)
        config.prompt_tuning_init = PromptTuningInit.RANDOM
    return modules.build(config, model.word_embeddings)


def _load_encoder(encoder: modules.PromptModule, config: PromptLearningConfig, folder: Path, prompt: Tensor) -> None:
    stored = checkpoint.read_encoder(folder, prompt)
    if stored is not None:
        file, tensors = stored
        checkpoint.check_tensors(file, tensors, encoder.state_dict())
        # In the dtype it was trained in, so that it computes the same prompt.
        encoder.to(next(iter(tensors.values())).dtype)
        encoder.load_state_dict(tensors)
    elif isinstance(config, CPTConfig) and isinstance(encoder, modules.CPTEmbedding):
        # PEFT saves context + change, and the context is known.
        encoder.delta_embedding.weight.copy_(prompt.to(encoder.embedding.weight) - encoder.embedding.weight)
    else:
        raise ValueError(
            f"{folder}: expected {checkpoint.ENCODER_NAME} to train on, but it is not there: PEFT saves only what the "
            "encoder computed. Load with is_trainable=False, or train from a folder saved by fusedprompt."
        )
