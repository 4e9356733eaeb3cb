"""What several commands do with a causal language model: load it, and cut a text into blocks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def load_tokenizer(model: str, argument: str = "--model") -> Any:
    """A model's tokenizer.

    Raises:
        ValueError: there is none; the message names the argument.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model, argument)


def load_base(model: str, argument: str = "--model", **options: Any) -> Any:
    """A causal language model, with further options of `from_pretrained`. Raises: as for its tokenizer."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, model, argument, **options)


def _load(kind: Any, model: str, argument: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{argument}: expected a causal language model with a tokenizer, got {model!r}: {why}"
        ) from error


def check_positions(base_config: Any, virtual_tokens: int, length: int, names: str) -> None:
    """Refuse rows that are longer than the model, prompt and all.

    Args:
        base_config: the model's configuration.
        names: the arguments that these sizes come from, for the message.

    Raises:
        ValueError: they are.
    """
    limit = getattr(base_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and virtual_tokens + length > limit:
        raise ValueError(f"{names}: expected at most the model's {limit} positions, got {virtual_tokens} + {length}")


def blocks_of(content: str, tokenizer: Any, size: int, names: tuple[str, str]) -> Tensor:
    """A text in blocks, (blocks, size) int64. What is left behind the last whole block is dropped.

    Every block begins with the token that begins a text, where the tokenizer has one: some models predict badly
    without, and the prompt should get no credit for mending that.

    Args:
        names: the arguments that text and size come from, for messages.

    Raises:
        ValueError: a block would hold less than two tokens, or there are not two blocks.
    """
    if size < 2:
        raise ValueError(f"{names[1]}: expected at least 2, one token to predict the next, got {size}")
    # A long text is more than the model's context, about which tokenizers warn; here it is cut into blocks.
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]
    width = size - len(begin)
    number = len(ids) // width
    if number < 2:
        raise ValueError(f"{names[0]}: expected at least two blocks of {names[1]} {size} tokens, got {len(ids)} tokens")
    return torch.tensor([begin + ids[width * row : width * (row + 1)] for row in range(number)], device="cpu")
