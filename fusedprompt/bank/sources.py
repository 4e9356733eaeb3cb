"""The rows of prompts that are elsewhere: in adapters' folders, in models, in tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.state import evaluating
from ..base.tasks import task_of
from ..layouts.template import Template
from ..methods import checkpoint, method_of
from ..methods.config import CONFIG_NAME, PromptLearningConfig
from ..methods.method import CACHE
from .entry import DTYPES, dtype_name


def rows_of(source: Any, width: int, adapter_name: str | None, task_id: int | None) -> Tensor:
    """Rows (P, D) on the CPU, in memory of their own.

    source: a tensor (P, D), a `PromptModel`, or an adapter's folder, ours or PEFT's, or its name on the Hub.

    Raises:
        TypeError, ValueError, FileNotFoundError: it is none of these, or does not give rows of input embeddings alone.
    """
    if isinstance(source, Tensor):
        _refuse("a tensor", adapter_name=adapter_name, task_id=task_id)
        rows = source
    elif isinstance(source, (str, os.PathLike)):
        _refuse("a folder", adapter_name=adapter_name)
        rows = _of_folder(checkpoint.find_folder(source), width, task_id)
    elif hasattr(source, "prompt_rows") and hasattr(source, "prompts"):
        rows = _of_model(source, adapter_name, task_id)
    else:
        raise TypeError(f"source: expected a tensor, a folder or a PromptModel, got {type(source).__name__}")
    rows = rows.detach()
    if rows.dim() != 2 or not rows.shape[0] or rows.shape[1] != width or dtype_name(rows) not in DTYPES:
        raise ValueError(
            f"source: expected rows (P, D = {width}) of one of {DTYPES}, got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("source: expected finite rows, got some that are not")
    return rows.cpu().clone(memory_format=torch.contiguous_format)


def _refuse(kind: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with {kind}, got {value!r}")


def _of_model(model: Any, adapter_name: str | None, task_id: int | None) -> Tensor:
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.prompts:
        raise ValueError(f"adapter_name: expected one of {sorted(model.prompts)}, got {name!r}")
    _check(model.peft_config[name], model.prompts[name].start, model.prompts[name].pattern)
    _check_task(model.peft_config[name], task_id)
    with torch.no_grad(), evaluating(model.prompt_encoder[name]):  # without dropout, as it is saved
        rows: Tensor = model.prompt_rows(name, task_id)
    return rows


def _of_folder(folder: Path, width: int, task_id: int | None) -> Tensor:
    """As `PromptModel.prompt_rows` of the loaded adapter, without a base model."""
    fields = checkpoint.read_json(folder / CONFIG_NAME)
    start, in_template = fields.pop(checkpoint.PROMPT_START_KEY, 0), checkpoint.PEFT_TYPE_KEY in fields
    fields["peft_type"] = fields.pop(checkpoint.PEFT_TYPE_KEY, fields.get("peft_type"))
    config = PromptLearningConfig.from_dict(fields, origin=str(folder / CONFIG_NAME))
    template = checkpoint.stored(folder, checkpoint.TEMPLATE_NAME)
    _check(config, start, Template.from_json(template.read_text()) if in_template and template.is_file() else None)
    config.inference_mode = True
    method, file = method_of(config), checkpoint.stored(folder, checkpoint.ADAPTER_NAME)
    _check_task(config, task_id)
    tensors, _ = checkpoint.read_tensors(file)
    config.token_dim = config.token_dim or width  # CPT's files do not say it
    module = method.module(config.blank(), nn.Embedding(1, config.token_dim, device="meta"))
    like = torch.empty(module.total_virtual_tokens, module.product_width, device="meta")
    own = {name: module.get_parameter(name) for name in method.in_file}
    checkpoint.check_tensors(file, tensors, {checkpoint.PROMPT_KEY: like, **own})
    with torch.no_grad():
        if method.num_tasks is None and not own:
            rows = tensors[checkpoint.PROMPT_KEY]  # in the dtype of the file
        else:
            module.load_prompt_embeddings(tensors[checkpoint.PROMPT_KEY])
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
            encode: Any = module.eval()
            rows = encode() if task_id is None else encode(task_ids=(task_id,))[0]
    kept = None if method.kept is None else method.kept(config)
    return rows[: config.num_virtual_tokens] if kept is None else rows[list(kept)]


def _check(config: Any, start: int, template: Template | None) -> None:
    """Refuse what is more than rows in front of a text."""
    method = method_of(config)
    if method.product == CACHE:
        raise ValueError(
            f"source: expected a prompt of input embeddings, got {method.name}, which is keys and values of every "
            "layer: no id of a token has those"
        )
    heads = [*(config.modules_to_save or []), *task_of(config.task_type).heads]
    if heads:
        raise ValueError(f"source: expected a prompt alone, got one that is trained with modules of its own: {heads}")
    if start or (template is not None and not template.is_plain_prefix):
        place = f"prompt_start={start}" if start else f"the template {template}"
        raise ValueError(f"source: expected a prompt in front of its text, got one with {place}")


def _check_task(config: Any, task_id: int | None) -> None:
    number, name = method_of(config).num_tasks, method_of(config).name
    tasks = 0 if number is None else number(config)
    if number is None and task_id is not None:
        raise ValueError(f"task_id: expected None for {name}, got {task_id!r}")
    if number is not None and (type(task_id) is not int or not 0 <= task_id < tasks):
        raise ValueError(f"task_id: expected one of {name}'s tasks, 0 to {tasks - 1}, got {task_id!r}")
