"""A checkpoint with a bank's prompts in it, which engines load without this package: rows as added tokens."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.facts import BaseFacts
from ..base.own_forward import has_own_forward

if TYPE_CHECKING:
    from .store import PromptStore

FILE = "prompts.json"
_LOW = 1e4  # far below any logit, and within fp16


def bake(
    bank: PromptStore, base: Any, folder: str | os.PathLike[str], tokenizer: Any, names: Sequence[str] | None
) -> dict[str, str]:
    """See `PromptBank.bake`."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder: expected a new or an empty folder, got {target}, which is neither")
    rows = {name: bank.rows(name) for name in (bank.names if names is None else names)}
    if not rows:
        raise ValueError("names: expected at least one prompt, got none")
    model, tokenizer = _copied(base), _tokenizer_of(base, tokenizer)
    bank._check_base(model)
    scale, size = _check(model), model.get_input_embeddings().weight.shape[0]
    tokens = {name: [f"<prompt:{name}:{row}>" for row in range(len(own))] for name, own in rows.items()}
    added = [token for own in tokens.values() for token in own]
    tokenizer = _with_tokens(tokenizer, size, added)
    _put_in(model, torch.cat([*rows.values()]), scale)
    first, said = size, dict[str, Any]()
    for name, own in tokens.items():
        said[name] = {"text": "".join(own), "ids": [*range(first, first + len(own))]}
        first += len(own)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fusedprompt-baking-", dir=target.parent) as stage:
        whole = Path(stage, "checkpoint")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / FILE).write_text(json.dumps(said, indent=1))
        os.replace(whole, target)  # over an empty folder too
    return {name: one["text"] for name, one in said.items()}


def _copied(base: Any) -> Any:
    """The base model by its name, or a copy of one that others may be using."""
    if not isinstance(base, nn.Module):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    embedding: Any = getattr(base, "get_input_embeddings", lambda: None)()
    if embedding is None or has_own_forward(embedding):
        kind = type(base).__name__
        raise ValueError(f"base: expected a plain transformers model, without a bank that is attached, got a {kind}")
    return copy.deepcopy(base)


def _tokenizer_of(base: Any, tokenizer: Any) -> Any:
    if tokenizer is not None:
        return copy.deepcopy(tokenizer)
    from transformers import AutoTokenizer

    name = getattr(base, "name_or_path", None) if isinstance(base, nn.Module) else base
    if not name:
        raise ValueError("tokenizer: expected the base model's, which does not say where it comes from, got None")
    return AutoTokenizer.from_pretrained(name)


def _check(model: Any) -> float:
    """What the input embedding multiplies its table by (Gemma).

    Raises:
        ValueError: rows of its table would not come out as the rows that go in, or it has no head with one for each.
    """
    facts, kind = BaseFacts.of(model), type(model).__name__
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if facts.encoder_decoder or facts.placeholder is not None or not facts.causal:
        raise ValueError(f"base: expected a decoder whose layers read embeddings alone, got a {kind}")
    table = embedding.weight
    if type(head) is not nn.Linear or head.weight.shape[0] != table.shape[0] or not table.is_floating_point():
        raise ValueError(f"base: expected as many rows of a plain nn.Linear head as tokens, got the {kind}'s {head}")
    ids = torch.arange(0, table.shape[0], max(table.shape[0] // 64, 1), device=table.device)
    with torch.no_grad():
        made, own = embedding(ids).double(), table[ids].double()
    scale = float((made * own).sum() / (own * own).sum())
    # A product in the table's dtype is rounded once.
    if not torch.allclose(made, own * scale, rtol=2 * torch.finfo(table.dtype).eps, atol=0):
        raise ValueError(f"base: expected input embeddings that are rows of a table, scaled at most, got the {kind}'s")
    return scale


def _with_tokens(tokenizer: Any, size: int, added: Sequence[str]) -> Any:
    """A tokenizer with tokens whose ids begin at `size`, and fillers for ids below that it does not know."""
    from transformers import AddedToken

    known = len(tokenizer)
    if known > size:
        raise ValueError(f"tokenizer: expected at most the {size} tokens of the base model, got {known}")
    fillers = [f"<unused:{index}>" for index in range(known, size)]
    tokens = [AddedToken(token, special=True, normalized=False) for token in (*fillers, *added)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    found = tokenizer.convert_tokens_to_ids([*added])
    if found != [*range(size, size + len(added))]:
        raise ValueError(
            f"tokenizer: expected to give new tokens the ids from {size} on, but it has some of them already"
        )
    return tokenizer


def _put_in(model: Any, rows: Tensor, scale: float) -> None:
    """Rows behind a model's table, and rows of the head that cannot win behind the head's.

    Each is the mean of the head's rows: its logit is the mean of all tokens' logits, which is below the greatest
    whatever the hidden state is. No fixed row could have a low logit for every hidden state, and zeros would win
    where all logits are negative (GPT-2). transformers also leaves them out of what is drawn, by `suppress_tokens`.
    """
    size = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        head_rows = model.get_output_embeddings().weight.detach().clone()  # of a tied head, before it gets prompts
        model.resize_token_embeddings(size + len(rows), mean_resizing=False)
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        lost = head_rows.float().mean(0, keepdim=True).to(head_rows.dtype).expand(len(rows), -1)
        head.weight = nn.Parameter(torch.cat((head_rows, lost)), requires_grad=False)
        if head.bias is not None:
            head.bias[size:] = head.bias[:size].float().mean() - _LOW
        table[size:] = (rows.to(table.device, torch.float32) / scale).to(table.dtype)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, *range(size, size + len(rows))]
