"""PEFT's prompt encoders, run on this package's ops. Their parameters, hooks and state stay PEFT's."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import IGNORE_INDEX
from ..ops._backend import AUTO

# PEFT's bound for rows that must not move (CPTEmbedding.get_epsilon).
_FROZEN_EPSILON = 1e-10


def using(backend: str) -> contextlib.AbstractContextManager[None]:
    """Within it, ops run on `backend`; "auto" follows `fusedprompt.use_backend` and FUSEDPROMPT_BACKEND."""
    return contextlib.nullcontext() if backend == AUTO else ops.use_backend(backend)


def why_not_adapter(config: Any) -> str | None:
    """An objection to an adapter's method, or None."""
    method = _value(config.peft_type)
    if method in ("PREFIX_TUNING", "CARTRIDGE"):
        return f"{method} trains keys and values of every layer, not input embeddings"
    if method == "MULTITASK_PROMPT_TUNING":
        return f"{method} makes another prompt for each row, by its task_ids"
    if method not in ("P_TUNING", "PROMPT_TUNING", "CPT"):
        return f"{method} is unknown here"
    return None


def why_not_encoder(encoder: Any, config: Any) -> str | None:
    """Why an encoder is called as PEFT calls it, and not run on ops; or None. Its embedding is called in any case."""
    import peft

    method = _value(config.peft_type)
    if config.inference_mode:
        return "inference mode: the prompt is the table itself"
    if method == "PROMPT_TUNING":
        return "prompt tuning has no encoder: the prompt is the table itself"
    expected = peft.PromptEncoder if method == "P_TUNING" else peft.CPTEmbedding
    if type(encoder) is not expected:
        return f"the encoder is a {type(encoder).__name__}, not PEFT's {expected.__name__}"
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks for all modules are set"
    parts: list[tuple[str, nn.Module, type[nn.Module]]] = [("encoder", encoder, type(encoder))]
    if method == "P_TUNING":
        head = encoder.mlp_head
        parts.append(("mlp_head", head, nn.Sequential))
        parts += [(f"mlp_head.{index}", layer, nn.ReLU if index % 2 else nn.Linear) for index, layer in enumerate(head)]
        if "lstm_head" in encoder._modules:
            parts.append(("lstm_head", encoder.lstm_head, nn.LSTM))
    else:
        parts += [(name, getattr(encoder, name), nn.Embedding) for name in ("embedding", "delta_embedding")]
    for name, part, kind in parts:
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


def uses_lstm(encoder: nn.Module) -> bool:
    return "lstm_head" in encoder._modules


def encode(encoder: Any, config: Any, indices: Tensor) -> Tensor:
    """PEFT's `prompt_encoder(indices)`: (1, R) indices to (1, R, D) rows, on ops where nothing objects."""
    if why_not_encoder(encoder, config) is not None:
        if _value(config.peft_type) == "CPT" and encoder.delta_embedding.weight.dim() != 2:
            return _sharded_context_rows(encoder, indices)
        rows: Tensor = encoder(indices)
        return rows
    if _value(config.peft_type) == "CPT":
        return _context_rows(encoder)
    rows = encoder.embedding(indices)
    if uses_lstm(encoder):
        lstm = encoder.lstm_head
        rows = ops.lstm(
            rows,
            [getattr(lstm, name) for names in lstm._all_weights for name in names],
            num_layers=lstm.num_layers,
            bidirectional=lstm.bidirectional,
            dropout=float(lstm.dropout),
            training=lstm.training,
        )
    linears = [layer for layer in encoder.mlp_head if isinstance(layer, nn.Linear)]
    return ops.mlp(rows[0], [layer.weight for layer in linears], [layer.bias for layer in linears]).unsqueeze(0)


def _context_rows(encoder: Any) -> Tensor:
    """CPT: the frozen context plus the projected change.

    The projection is written back where a gradient may follow, into the parameter's own memory; PEFT gives the
    parameter new memory in every call.
    """
    delta = encoder.delta_embedding.weight
    rows, projected = _projected(encoder, encoder.embedding.weight, delta)
    if torch.is_grad_enabled() and delta.requires_grad:
        with torch.no_grad():
            delta.copy_(projected)
    return rows.unsqueeze(0)


def _sharded_context_rows(encoder: Any, indices: Tensor) -> Tensor:
    """The same where parameters hold nothing but while their module runs, as under ZeRO-3: PEFT's encoder reads them
    before that, and fails. Only the prompt is projected, not the parameter."""
    with torch.no_grad():
        table = encoder.embedding(indices)[0]
    return _projected(encoder, table, encoder.delta_embedding(indices)[0])[0].unsqueeze(0)


def _projected(encoder: Any, table: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (P, D) of the prompt, and of the projected change."""
    context = context_of(encoder.config, table.device)
    epsilon = context.epsilon
    with torch.no_grad():
        # A row that was projected may be longer than its bound by rounding. It stays as it is: so the prompt that is
        # saved has the bits of the one that was trained.
        norm = delta.float().norm(dim=1)
        rounding = 8 * max(torch.finfo(dtype).eps for dtype in (delta.dtype, torch.float32))
        epsilon = torch.where(norm <= epsilon * (1 + rounding), torch.maximum(norm, epsilon), epsilon)
    return ops.cpt(table, delta, epsilon, context.trainable)


class Context(NamedTuple):
    """What a CPT configuration says of each of its P tokens, as tensors.

    types: (P,) int64 type codes. targets: (P,) int64 ids where the code marks a label, else -100.
    epsilon: (P,) fp32, the largest norm of each row's change. trainable: (P,) bool.
    """

    types: Tensor
    targets: Tensor
    epsilon: Tensor
    trainable: Tensor


def context_of(config: Any, device: torch.device) -> Context:
    """A configuration's `Context`, made once per device: copies to a GPU wait for it."""
    epsilons = (config.opt_projection_format_epsilon, config.opt_projection_epsilon)
    return _context_of(
        tuple(config.cpt_tokens_type_mask), tuple(config.cpt_token_ids), epsilons, config.token_dim, device
    )


@functools.lru_cache(maxsize=64)
def _context_of(
    codes: tuple[int, ...], ids: tuple[int, ...], epsilons: tuple[float, float], width: int, device: torch.device
) -> Context:
    scale = math.sqrt(width / 2048)
    bounds = {1: epsilons[0] * scale, 2: epsilons[1] * scale, 3: epsilons[0] * scale}
    with torch.inference_mode(False):
        return Context(
            torch.tensor(codes, device=device),
            torch.tensor([token if is_label(code) else IGNORE_INDEX for token, code in zip(ids, codes)], device=device),
            torch.tensor([bounds.get(code % 4 if code > 0 else 0, _FROZEN_EPSILON) for code in codes], device=device),
            torch.tensor([code % 4 != 0 for code in codes], device=device),
        )


def is_label(code: int) -> bool:
    """Whether a type code marks a label."""
    return code > 0 and code % 4 == 0


def prompt_rows(model: Any, adapter_name: str | None = None) -> Tensor:
    """An adapter's (the active one's) whole prompt (R, D), hooks of the encoder and of its embedding included."""
    name = adapter_name or model.active_adapter
    config, encoder = model.peft_config[name], model.prompt_encoder[name]
    table = encoder.embedding
    indices = model.prompt_tokens[name].unsqueeze(0).to(next(table.parameters()).device)
    # A shard of ZeRO-3 is there only while its module runs: even a table that is the prompt is called.
    rows: Tensor = table(indices) if config.inference_mode else encode(encoder, config, indices)
    return rows[0]


def _value(name: Any) -> str:
    """PEFT's enumerations come back from a file as plain strings."""
    return str(getattr(name, "value", name))
