"""What the rest of the package needs to know about a base model, found by looking at it rather than at its name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .own_forward import has_own_forward

_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


@dataclass(frozen=True)
class BaseFacts:
    """Properties of a base model that decide how a prompt is arranged in front of its tokens.

    encoder_decoder: the prompt goes to the encoder.
    causal: every attention of the model (not an encoder-decoder) looks to the left only.
    takes_position_ids, takes_token_type_ids: its forward has an argument of that name.
    first_position: position id of a sequence's first token (RoBERTa starts behind its padding index).
    position_limit: longest sequence a learned position table can number, or None for relative positions.
    width: of the input embeddings, if they say so.
    """

    encoder_decoder: bool
    causal: bool
    takes_position_ids: bool
    takes_token_type_ids: bool
    first_position: int
    position_limit: int | None
    width: int | None = None

    @classmethod
    def of(cls, base: Any) -> BaseFacts:
        """Look at a transformers model."""
        encoder_decoder = bool(getattr(base.config, "is_encoder_decoder", False))
        attentions = [bool(module.is_causal) for module in base.modules() if hasattr(module, "is_causal")]
        parameters = inspect.signature(base.forward).parameters
        first = _first_position(base)
        return cls(
            encoder_decoder=encoder_decoder,
            causal=not encoder_decoder and (all(attentions) if attentions else _generates(base)),
            takes_position_ids="position_ids" in parameters,
            takes_token_type_ids="token_type_ids" in parameters,
            first_position=first,
            position_limit=_position_limit(base, first),
            width=getattr(base.get_input_embeddings(), "embedding_dim", None),
        )


def _generates(base: Any) -> bool:
    """For models that do not mark their attentions (BLOOM, MPT): whether this one reads from left to right."""
    supports = getattr(base, "_supports_default_dynamic_cache", None)  # not XLNet, which generates in its own way
    return hasattr(base, "score") or (hasattr(base, "generate") and supports is not None and bool(supports()))


def _first_position(base: nn.Module) -> int:
    """RoBERTa and its relatives number positions from padding_idx + 1; the module that does so has this method."""
    numbering = (part for part in base.modules() if hasattr(part, "create_position_ids_from_inputs_embeds"))
    part: Any = next(numbering, None)
    return 0 if part is None else int(part.padding_idx) + 1


def _position_limit(base: nn.Module, first_position: int) -> int | None:
    sizes = [
        # OPT and BART keep `offset` unused rows at the front of the table.
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
    ]
    return min(sizes) - first_position if sizes else None


def check_base_model(base: Any) -> nn.Module:
    """Refuse anything that is not a transformers-like model, by naming what it lacks."""
    for attribute in ("config", "get_input_embeddings", "forward"):
        if not hasattr(base, attribute):
            raise TypeError(f"base_model: expected a transformers model, got {type(base).__name__} without {attribute}")
    if not isinstance(base, nn.Module):
        raise TypeError(f"base_model: expected an nn.Module, got {type(base).__name__}")
    model: Any = base
    if not isinstance(model.get_input_embeddings(), nn.Module):
        raise TypeError(f"base_model: expected a model with input embeddings, got {type(base).__name__}")
    return base


def transformers_model(base: nn.Module) -> Any:
    """The model whose code is transformers' own: `base`, or the one that it wraps (torch.compile, LoRA); else None."""
    return next((module for module in base.modules() if _is_transformers_own(module)), None)


_own_kinds: dict[type, bool] = {}


def _is_transformers_own(module: nn.Module) -> bool:
    kind = type(module)
    if kind not in _own_kinds:
        _own_kinds[kind] = any(parent.__module__.startswith("transformers.models.") for parent in kind.__mro__)
    return _own_kinds[kind] and "config" in vars(module)


def fusable_table(embeddings: nn.Module) -> Tensor | None:
    """The word-embedding table, if looking rows up in it is all that the module does; else None.

    Scaled (Gemma), quantised, sharded, hooked or adapted embeddings do more than that, and must be called.
    """
    if type(embeddings) is not nn.Embedding or has_own_forward(embeddings) or embeddings.max_norm is not None:
        return None
    if embeddings._forward_hooks or embeddings._forward_pre_hooks or embeddings._backward_hooks:
        return None
    weight = embeddings.weight
    # type(): DTensor and quantised tensors subclass Tensor; a ZeRO-3 shard is an empty vector.
    if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    # The gradient of these is not a plain scatter-add.
    special = embeddings.padding_idx is not None or embeddings.sparse or embeddings.scale_grad_by_freq
    return None if weight.requires_grad and special else weight


def device_of(embeddings: nn.Module) -> torch.device:
    """Where an embedding is. torch.ao's quantised ones have no parameters, and run on CPUs alone."""
    weight = next(embeddings.parameters(), getattr(embeddings, "weight", None))  # a replica's is a plain tensor
    return weight.device if isinstance(weight, Tensor) else torch.device("cpu")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the host, on a device, without waiting for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
