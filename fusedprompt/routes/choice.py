"""Whether a batch may take the shared route, and whether that pays: the cheapest question first.

The route is exact where virtual token p's hidden states depend on virtual tokens 0 ... p alone, and can reach the text
only through a key/value cache that holds all of them. Every objection here is a clause that completes "route 'shared'
cannot run: ...".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base.facts import BaseFacts, why_not_causal
from ..base.state import active_noise, is_replica
from ..layouts.batch import Batch
from ..layouts.prompt import Prompt
from ..ops._backend import AUTO, BackendUnavailable
from .call import SHARED, SPLICE
from .host import Host
from .loss import calls_loss_function, has_transformers_loss

ROUTES = (AUTO, SHARED, SPLICE)
# Arguments of a forward call that mean the same on both routes.
_UNDERSTOOD = ("use_cache", "return_dict", "output_hidden_states", "num_items_in_batch", "labels")
# Arguments and settings that mean the same on both routes while they are off.
_COVERING = ("output_attentions", "output_router_logits")


class RouteUnavailable(BackendUnavailable):
    """A route that was asked for by name cannot serve this call; the message says why."""

    def __init__(self, objection: str, route: str = SHARED) -> None:
        self.objection = objection
        super().__init__(f"route '{route}' cannot run: {objection}")


def checked_route(route: Any) -> str:
    """`route`, if it is one.

    Raises:
        ValueError: it is not.
    """
    if route not in ROUTES:
        raise ValueError(f"route: expected one of {ROUTES}, got {route!r}")
    return str(route)


def why_not_prompts(host: Host, prompts: Sequence[Prompt]) -> str | None:
    """An objection to sharing these prompts that does not change, or None. Asks no part of the base model."""
    if host.sharing.objection is not None:
        return host.sharing.objection
    if not prompts:
        return "no row has a prompt"
    for prompt in prompts:
        if not prompt.task.shares:
            return f"the adapter's task is {prompt.task.name}, whose text is not run behind a shared prompt"
        if prompt.pattern is not None:
            return "the adapter's template does not put the whole prompt in front"
        if prompt.start:
            return f"the prompt stands behind {prompt.start} tokens of text (prompt_start)"
    return None


def why_not_as_peft(facts: BaseFacts) -> str | None:
    """An objection to sharing a prompt with the results of PEFT, or None."""
    if facts.placeholder is not None and not facts.needs_layer_inputs:
        return "PEFT gives this base model embeddings without the inputs of each layer that it makes of ids"
    return None


def why_not_now(host: Host) -> str | None:
    """An objection from the present settings of the base model, or None."""
    noise, checkpoints = host.state.findings()
    if noise is not None:
        return f"the base model is in training mode with {noise}, which would be the same in every row"
    if checkpoints:
        return "gradient checkpointing recomputes layers without a cache"
    config = host.base_model.config
    for name in _COVERING:
        if getattr(config, name, False):
            return f"config.{name} asks for values of every row's virtual tokens"
    if not host.state.looks_left():
        return "an attention was told to look to the right (is_causal=False)"
    setting = why_not_causal(config)  # transformers reads it at every call
    return None if setting is None else f"config.{setting} lets virtual tokens depend on the text"


def why_not_model(host: Host, *adapter_names: str) -> str | None:
    """An objection to sharing the prompts of adapters, whatever the batch, or None."""
    return why_not_prompts(host, [host.prompts[name] for name in adapter_names]) or why_not_now(host)


def why_not_batch(host: Host, batch: Batch, others: Mapping[str, Any], placed: bool, rows: int) -> str | None:
    """An objection to these arguments of a forward call, or None. placed: its layout is given. rows: of the prompt."""
    if placed:
        return "the slots say where each prompt row goes, and it is not in front of all text"
    size, length = batch.shape
    if not size or not length:
        return "the batch has no tokens"
    for name, value in others.items():
        off = value is False and name in _COVERING
        if value is not None and not off and name not in _UNDERSTOOD:
            return f"{name} is an argument of the base model that would have to cover the virtual tokens"
    if batch.token_type_ids is not None:
        return "token_type_ids is an argument of the base model that would have to cover the virtual tokens"
    if batch.position_ids is not None and batch.attention_mask is None and others.get("use_cache") is False:
        return "position_ids without a mask and a cache may mean several texts in a row"
    return why_not_length(host, rows + length)


def why_not_length(host: Host, total: int) -> str | None:
    """An objection to `total` positions, of prompt and text, generated ones included, or None."""
    window = host.sharing.window
    if window is not None and total > window:
        return f"{total} positions do not fit into the base model's window of {window}"
    return None


def why_not_loss(host: Host) -> str | None:
    """An objection to losses of text whose logits are those of a shared prompt and of its text, or None."""
    return (
        None
        if calls_loss_function(host.base_model, host.facts)
        else "the base model's forward makes its loss by itself"
    )


def cost_rule(rows: int, size: int, length: int, kept: bool, device: str = "cpu", prompts: int = 1) -> str | None:
    """The cost rule: why `auto` leaves a batch (size, length) to splice, though sharing would be exact; or None.

    A pass of the prompt's own reads the base model's weights once more. On a CPU that costs as much as 20 to 28 tokens
    (6-layer Llama, D=512, CPU time of a training step: 1.04 of splice's where sharing saved 20 tokens, 0.93 where it
    saved 28). On a GPU it comes out at some 250 tokens by arithmetic: 2 bytes and 2 FLOP per weight and token, at 3.3
    TB/s and 800 TFLOP/s; that has not been measured. A forward pass that trains nothing has no pass of the prompt's
    own, but joined logits cost up to 7 % of it.

    kept: the prompt's keys and values are at hand, or will be for the next batch. prompts: how many there are.
    """
    spliced = size * (rows + length)
    saved = spliced - size * length - (0 if kept else prompts * rows)
    fewest, share = (16, 0.08) if kept else (64 if device == "cpu" else 256, 0.04)
    if saved < max(fewest, share * spliced):
        return f"sharing would save {saved} of {spliced} tokens, which is too few to pay"
    return None


def is_kept(host: Host, prompts: Sequence[Prompt]) -> bool:
    """Whether the states of prompts may come from the cache: nothing is trained, random or watched, and no text beside
    them is a batch's own."""
    if any(prompt.shared is not None for prompt in prompts):
        return False
    encoders = [host.prompt_encoder[prompt.name] for prompt in prompts]
    if torch.compiler.is_compiling() or any(map(is_replica, encoders)):
        return False
    if any(active_noise(part) is not None or _is_watched(part) for part in encoders):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (any(one.requires_grad for part in encoders for one in part.parameters()) or host.state.trains())


def _is_watched(encoder: nn.Module) -> bool:
    """Whether hooks see the encoder's calls, or change what they give."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in encoder.modules())


def why_not_wait(host: Host) -> str | None:
    """An objection to leaving logits until they are read, whatever the batch, or None.

    Nobody reads them who trains with the output's own loss, and the head's forward and backward over the virtual
    tokens alone took 75 of 1094 ms of a step (B=4, P=200, T=210, V=32000). The base model must not change in the
    meantime, so it must be frozen; and where each process has a shard of it, one that runs a part alone would wait for
    the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and _is_sharded(host.base_model):
        return "each process has a shard of the base model"
    if not has_transformers_loss(host.base_model, host.facts):
        return "the base model's loss is its own"
    return "a part of the base model is trained" if host.state.trains() else None


def _is_sharded(base: nn.Module) -> bool:
    """Whether parameters are anything but whole tensors of this process: by FSDP, `fully_shard`, or ZeRO-3."""
    return any(
        type(parameter) is not nn.Parameter
        or not parameter.numel()
        or getattr(parameter, "_fsdp_flattened", False)  # of FSDP with use_orig_params
        or hasattr(parameter, "ds_id")
        for parameter in base.parameters()
    )


def why_not_head_loss(host: Host) -> str | None:
    """An objection to losses without logits, whatever the batch, or None."""
    if host.text_head.may_be_withheld(host.base_model):
        return why_not_wait(host)
    return why_not_wait(host) or "the base model's head is not a plain nn.Linear that comes last in it"
