"""PEFT's prompt encoders, run on this package's ops. Their parameters, hooks and state stay PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.facts import device_of
from ..methods import find_method, method_of
from ..methods.method import CACHE, name_of


def why_not_adapter(config: Any) -> str | None:
    """An objection to an adapter's method, or None."""
    name = name_of(config.peft_type)
    if find_method(name) is not None:
        return None
    return f"{name} is unknown here"


def why_not_encoder(encoder: Any, config: Any) -> str | None:
    """Why an encoder is called as PEFT calls it, and not run on ops; or None. Its embedding is called in any case."""
    import peft

    method = method_of(config)
    if config.inference_mode:
        return "inference mode: the prompt is the table itself"
    if method.product == CACHE and not hasattr(encoder, "transform"):
        return "keys and values are the parameters"
    if method.num_tasks is not None:
        return "PEFT's module is called, once for each distinct task of a batch"
    if method.peft is None:
        return f"{method.name.lower().replace('_', ' ')} has no encoder: the prompt is the table itself"
    expected = getattr(peft, method.peft.class_name)
    if type(encoder) is not expected:
        return f"the encoder is a {type(encoder).__name__}, not PEFT's {expected.__name__}"
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks for all modules are set"
    for name, part, kind in (("encoder", encoder, type(encoder)), *method.peft.parts(encoder)):
        if type(part) is not kind:
            return f"{name} is a {type(part).__name__}, not a {kind.__name__}"
        if _hooked(part):
            return f"{name} has hooks or another forward, which must see its call"
        for weight in part._parameters.values():
            if weight is not None and type(weight) not in (nn.Parameter, Tensor):
                return f"{name} has parameters of type {type(weight).__name__}"
    return None


def _hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def encode(encoder: Any, config: Any, indices: Tensor) -> Tensor:
    """PEFT's `prompt_encoder(indices)[0]`: (1, R) indices to (R, D) rows, on ops where nothing objects."""
    peft = method_of(config).peft
    if peft is not None and why_not_encoder(encoder, config) is None:
        return peft.run(encoder, indices)
    sharded = None if peft is None or peft.run_sharded is None else peft.run_sharded(encoder, indices)
    rows: Tensor = encoder(indices)[0] if sharded is None else sharded
    return rows


def prompt_rows(model: Any, adapter_name: str | None = None, task_ids: Sequence[int] | None = None) -> Tensor:
    """An adapter's (the active one's) whole prompt (R, D), or those of distinct tasks (k, R, D), hooks of the encoder
    and of its embedding included."""
    name = adapter_name or model.active_adapter
    config, encoder = model.peft_config[name], model.prompt_encoder[name]
    table = encoder.embedding
    tokens = model.prompt_tokens[name]
    if method_of(config).product == CACHE:
        tokens = tokens[: config.num_virtual_tokens]
    indices = tokens.unsqueeze(0).to(device_of(table))
    if task_ids is not None:
        of_tasks: Tensor = encoder(indices.expand(len(task_ids), -1), torch.tensor(task_ids, device=indices.device))
        return of_tasks
    # A cartridge's embedding stands for its parameters, and cannot be called.
    is_table = config.inference_mode and isinstance(table, nn.Embedding)
    # A shard of ZeRO-3 is there only while its module runs: even a table that is the prompt is called.
    rows: Tensor = table(indices)[0] if is_table else encode(encoder, config, indices)
    return rows
