"""What the rest of the package needs to know about a base model, found by looking at it rather than at its name."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_inputs import placeholder
from .own_forward import has_own_forward
from .positions import position_table
from .virtual_ids import needs_ids

_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


@dataclass(frozen=True)
class BaseFacts:
    """Properties of a base model that decide how a prompt is arranged in front of its tokens.

    encoder_decoder: the prompt goes to the encoder.
    causal: every attention of the model (not an encoder-decoder) looks to the left only.
    takes_position_ids, takes_token_type_ids: its forward has an argument of that name.
    tells_position_ids: a decoder's forward has none, but its table of positions can be told them (see `numbered`).
    first_position: position id of a sequence's first token (RoBERTa starts behind its padding index).
    position_limit: longest sequence a learned position table can number, or None for relative positions.
    width: of the input embeddings, if they say so.
    pools_last: a sequence classifier reads the last column of a row: decoders do, and XLNet. Encoders read the first.
    windowed: some attentions see the nearest columns alone; of a decoder, those that its cache does not know of.
    stateful: a recurrent model, which may take padding for text whatever the mask says.
    padding_last: padding must stand behind the text, because columns are counted (see `first_use`).
    needs_ids: it takes no embeddings in place of ids (see `virtual_ids`).
    placeholder: the id whose layer inputs a prompt's rows get (see `layer_inputs`), or None where there are none.
    needs_layer_inputs: it cannot run on embeddings alone.
    """

    encoder_decoder: bool
    causal: bool
    takes_position_ids: bool
    takes_token_type_ids: bool
    first_position: int
    position_limit: int | None
    width: int | None = None
    pools_last: bool = False
    tells_position_ids: bool = False
    windowed: bool = False
    stateful: bool = False
    padding_last: bool = False
    needs_ids: bool = False
    placeholder: int | None = None
    needs_layer_inputs: bool = False

    @property
    def places_position_ids(self) -> bool:
        """Whether position ids can be given, in one way or another."""
        return self.takes_position_ids or self.tells_position_ids

    def padding_first(self, pools: bool) -> bool:
        """Whether padding stands before prompt and text: in causal models, whose rows do not see it there, and where a
        row's last column is read."""
        return self.pools_last if pools else self.causal and not self.padding_last

    @classmethod
    def of(cls, base: Any) -> BaseFacts:
        """Look at a transformers model."""
        encoder_decoder = bool(getattr(base.config, "is_encoder_decoder", False))
        parameters = inspect.signature(base.forward).parameters
        first, model = _first_position(base), transformers_model(base)
        causal = not encoder_decoder and why_not_causal(base.config) is None and _looks_left(base)
        takes_position_ids = "position_ids" in parameters
        of_prompt, needed = placeholder(base)
        return cls(
            encoder_decoder=encoder_decoder,
            causal=causal,
            takes_position_ids=takes_position_ids,
            pools_last=causal or getattr(base.config, "summary_type", None) == "last",
            tells_position_ids=causal and not takes_position_ids and position_table(base) is not None,
            takes_token_type_ids="token_type_ids" in parameters,
            first_position=first,
            position_limit=_position_limit(base, first),
            width=getattr(base.get_input_embeddings(), "embedding_dim", None),
            windowed=any(not causal or name != "sliding_window" for name, _ in local_windows(base.config)),
            stateful=bool(getattr(model, "_is_stateful", False)),
            needs_ids=model is not None and needs_ids(model),
            placeholder=of_prompt,
            needs_layer_inputs=needed,
        )


def why_not_causal(config: Any) -> str | None:
    """The setting of a configuration that lets attention look to the right, or None."""
    settings = vars(config)
    if settings.get("is_causal") is False:
        return "is_causal=False"
    if settings.get("use_bidirectional_attention") is True:  # of Gemma's embedding models
        return "use_bidirectional_attention=True"
    text = settings.get("text_config")
    return None if text is None or not hasattr(text, "__dict__") else why_not_causal(text)


def local_windows(config: Any) -> list[tuple[str, int]]:
    """Settings by which attention sees the nearest columns alone, with their sizes."""
    found = []
    for name, value in vars(config).items():
        sizes = value if isinstance(value, (list, tuple)) else [value]  # Longformer's has one for each layer
        if _WINDOW.search(name) and all(type(size) is int and size > 0 for size in sizes) and sizes:
            found.append((name, min(sizes)))
    return found


_WINDOW = re.compile("window$|window_(size|len)$|^local_attention$|^attention_chunk_size$")


def _looks_left(base: Any) -> bool:
    """Whether every attention over the text looks to the left only: by what the classes of decoders and of recurrent
    models say (BigBirdPegasus' decoder masks in one place and denies it in another), or else by what attentions say.

    Attentions over an encoder or an image say that they do not, and concern no text.
    """
    if getattr(base.config, "is_decoder", False) or getattr(base, "_is_stateful", False):
        return True
    config, decoder = base.config, base
    if hasattr(config, "get_text_config") and config.get_text_config(decoder=True) is not config:
        decoder = base.get_decoder()
    named = [(name, bool(part.is_causal)) for name, part in decoder.named_modules() if hasattr(part, "is_causal")]
    attentions = [causal for name, causal in named if not _OF_OTHERS.search(name)]
    return all(attentions) if attentions else _generates(base)


_OF_OTHERS = re.compile("cross|encoder_attn|EncDec|vision|image|audio", re.IGNORECASE)


def _generates(base: Any) -> bool:
    """For models that do not mark their attentions (BLOOM, MPT): whether this one reads from left to right."""
    supports = getattr(base, "_supports_default_dynamic_cache", None)  # not XLNet, which generates in its own way
    return hasattr(base, "score") or (hasattr(base, "generate") and supports is not None and bool(supports()))


def _first_position(base: nn.Module) -> int:
    """RoBERTa and its relatives number positions from padding_idx + 1; the module that does so has this method. MRA,
    Nystromformer and YOSO keep the numbers from 2 on."""
    first = 0
    for part in base.modules():
        if hasattr(part, "create_position_ids_from_inputs_embeds"):
            return int(part.padding_idx) + 1  # type: ignore[arg-type]
        numbers = part._buffers.get("position_ids")
        if numbers is not None and numbers.numel() and not numbers.is_meta:
            first = max(first, int(numbers.flatten()[0]))
    return first


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
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # CANINE embeds characters by hashes
        embeddings = None
    if not isinstance(embeddings, nn.Module):
        raise TypeError(f"base_model: expected a model with input embeddings, got {type(base).__name__}")
    if isinstance(embeddings, (nn.ModuleList, nn.ModuleDict)):
        kind = type(base).__name__
        raise TypeError(
            f"base_model: expected one input embedding, got {kind}, which adds up {len(embeddings)} of them"
        )
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
    """Where an embedding runs. torch.ao's quantised ones have no parameters, and run on CPUs alone; offloaded ones have
    their weights only while they run, where accelerate's hook brings them."""
    weight = next(embeddings.parameters(), getattr(embeddings, "weight", None))  # a replica's is a plain tensor
    device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
    hook: Any = getattr(embeddings, "_hf_hook", None)
    runs_on = getattr(hook, "execution_device", None)
    return device if device.type != "meta" or runs_on is None else torch.device(runs_on)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor made on the host, on a device, without waiting for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
