"""What a model writes behind questions of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .progress import bar


def answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    temperature: float = 0.0,
) -> list[str]:
    """The text that a model writes behind each question, in evaluation mode.

    Args:
        model: a causal language model with transformers' `generate`.
        questions: ids of each, none of them empty.
        temperature: of sampling, by PyTorch's random numbers; 0 takes the most likely token.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    pad = next((token for token in (getattr(tokenizer, "pad_token_id", None), end) if token is not None), 0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.eval()
    device, texts = next(model.parameters()).device, list[str]()
    for first in bar(range(0, len(questions), batch_size), desc="answering", unit="batch"):
        batch = [list(ids) for ids in questions[first : first + batch_size]]
        width = max(map(len, batch))
        # Padding is on the left, so that every row goes on where its question ends.
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            **sampling,
        )
        for row in output[:, width:].tolist():
            kept = row[: row.index(end)] if end in row else row
            texts.append(tokenizer.decode(kept, skip_special_tokens=True))
    return texts
