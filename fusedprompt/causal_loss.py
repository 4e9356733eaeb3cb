"""Losses of language models that we compute, and whether their logits can be left until somebody reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .deferred import replaced
from .layout import IGNORE_INDEX
from .lm_head import Withheld
from .loss import summed_cross_entropy
from .ops._backend import AUTO
from .ops.cpt.reference import label_weights
from .sharing import transformers_model

if TYPE_CHECKING:
    from .model import PromptModel


# Arguments with which the base model's loss is the mean, over the labels, of each position's for the one behind it.
_PLAIN = (
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "labels",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "num_items_in_batch",
)


def may_wait(model: PromptModel, labels: Tensor | None) -> bool:
    """Whether logits are left until they are read: a shared prompt's, and the text's if their head can wait too."""
    return not model.text_head.read and _could_wait(model, labels)


def _could_wait(model: PromptModel, labels: Tensor | None) -> bool:
    return labels is not None and not torch.compiler.is_compiling() and why_not_wait(model) is None


def why_not_wait(model: PromptModel) -> str | None:
    """An objection to leaving logits until they are read, whatever the batch, or None.

    Nobody reads them who trains with the output's own loss, and the head's forward and backward over the virtual
    tokens alone took 75 of 1094 ms of a step (B=4, P=200, T=210, V=32000). The base model must not change in the
    meantime, so it must be frozen; and where each process has a shard of it, one that runs a part alone would wait for
    the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and _is_sharded(model.base_model):
        return "each process has a shard of the base model"
    if not has_transformers_loss(model):
        return "the base model's loss is its own"
    if any(parameter.requires_grad for parameter in model.base_model.parameters()):
        return "a part of the base model is trained"
    return None


def _is_sharded(base: nn.Module) -> bool:
    """Whether parameters are anything but whole tensors of this process: by FSDP, `fully_shard`, or ZeRO-3."""
    return any(
        type(parameter) is not nn.Parameter
        or not parameter.numel()
        or getattr(parameter, "_fsdp_flattened", False)  # of FSDP with use_orig_params
        or hasattr(parameter, "ds_id")
        for parameter in base.parameters()
    )


def why_not_head_loss(model: PromptModel) -> str | None:
    """An objection to losses without logits, whatever the batch, or None."""
    if model.text_head.may_be_withheld(model.base_model):
        return why_not_wait(model)
    return why_not_wait(model) or "the base model's head is not a plain nn.Linear that comes last in it"


def has_transformers_loss(model: PromptModel) -> bool:
    """Whether the base model's loss is transformers' cross entropy of next tokens."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    base = transformers_model(model.base_model)
    if base is None or base.loss_function is not ForCausalLMLoss:
        return False
    # BART's decoder has the property, and computes another loss, of labels that are not moved.
    return "loss_function" in inspect.unwrap(type(base).forward).__code__.co_names


def call_with_labels(model: PromptModel, arguments: Mapping[str, Any], route: str) -> Any:
    """The base model's output for spliced arguments; with labels (B, S) among them, its logits wait where they can.

    Not where splicing was asked for by name: that is PEFT's arithmetic to the bit.
    """
    labels, base = arguments.get("labels"), model.base_model
    plain = route == AUTO and _has_plain_loss(base, arguments) and _could_wait(model, labels)
    if not (plain and model.text_head.may_be_withheld(base)):
        return base(**arguments)
    if model.text_head.read:
        return model.text_head.told_of(base(**arguments), dict)
    assert labels is not None
    others = {name: value for name, value in arguments.items() if name not in ("labels", "num_items_in_batch")}
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    counted = arguments.get("num_items_in_batch")

    def loss_of(source: Tensor | Withheld) -> Tensor:
        return mean_loss(summed_loss(source, following), counted, following)

    return call_for_loss(model, lambda: base(**others), loss_of, wait=True)


def _has_plain_loss(base: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether nothing but labels and logits decides about the base model's loss, and its output has names."""
    as_dict, config = arguments.get("return_dict"), base.config
    named = getattr(config, "return_dict", True) if as_dict is None else as_dict
    if not named or getattr(config, "output_router_logits", False):
        return False
    return all(value is None or name in _PLAIN for name, value in arguments.items())


def summed_loss(source: Tensor | Withheld, following: Tensor) -> Tensor:
    """Sum of the cross entropies of logits (B, T, V), or of those that a head would make, with labels (B, T)."""
    if isinstance(source, Withheld):
        return source.summed_loss(following.to(source.hidden.device)).float()
    return summed_cross_entropy(source.view(-1, source.shape[-1]), following.to(source.device).flatten())


def mean_loss(total: Tensor, counted: Any, *labels: Tensor) -> Tensor:
    """A sum of losses over the number of labels that count, or over `counted`, Trainer's `num_items_in_batch`."""
    number = sum((part != IGNORE_INDEX).sum() for part in labels) if counted is None else counted
    mean: Tensor = total / (number.to(total.device) if isinstance(number, Tensor) else number)
    return mean


def context_loss(source: Tensor | Withheld, labels: Tensor, token_types: Tensor, decay: float) -> Tensor:
    """`ops.cpt_loss` of logits (B, S, V), or of those that a head would make."""
    if isinstance(source, Tensor):
        return ops.cpt_loss(source, labels, token_types, decay=decay)
    hidden = source.hidden
    following = F.pad(labels[:, 1:].to(hidden.device), (0, 1), value=IGNORE_INDEX)
    factors = None
    if decay != 1.0:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        factors = F.pad(label_weights(token_types[:, 1:].to(hidden.device), decay, wide), (0, 1))
    return source.summed_loss(following, factors) / (following != IGNORE_INDEX).sum().clamp(min=1)


def call_for_loss(
    model: PromptModel, call: Callable[[], Any], loss_of: Callable[[Tensor | Withheld], Tensor], wait: bool
) -> Any:
    """The output of `call()`, which runs the base model without labels, with the loss of its logits.

    wait: the logits may be left until they are read; `loss_of` then gets the head that would make them.
    """
    output, head = model.text_head.call(model.base_model, call) if wait else (call(), None)
    if head is None:
        return model.text_head.told_of(replaced(output, loss=loss_of(output.logits)), dict)
    logits = head.logits()
    return model.text_head.told_of(replaced(output, loss=loss_of(head)), lambda: {"logits": logits()})
