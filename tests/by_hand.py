"""Small batches behind a prompt of 30 rows, and rows of them that are joined by hand."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import fusedprompt

ROWS, LENGTH, PROMPT = 4, 14, 30


def prompt_model(base: Any, task: str = "CAUSAL_LM", rows: int = PROMPT, **options: Any) -> Any:
    config = fusedprompt.PromptTuningConfig(task_type=task, num_virtual_tokens=rows)
    return fusedprompt.get_prompt_model(base, config, **options).eval()


def batch(side: str, token: int = 0) -> dict[str, Tensor]:
    """Four rows, of which the second is padded by six of a token."""
    ids = torch.randint(3, 80, (ROWS, LENGTH))
    if side == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if side == "left" else slice(8, 14)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, token), "attention_mask": mask}


def text_of(given: dict[str, Tensor], row: int) -> Tensor:
    ids = given["input_ids"][row]
    return ids[given["attention_mask"][row] > 0] if "attention_mask" in given else ids


def relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


def alone(model: Any, ids: Tensor) -> Tensor:
    """(T, V): logits of one row's text behind the prompt, joined by hand."""
    joined = torch.cat((model.prompt_rows(), model.base_model.get_input_embeddings()(ids)))
    logits: Tensor = model.base_model(inputs_embeds=joined.unsqueeze(0)).logits[0, -len(ids) :]
    return logits


def why(model: Any, **given: Any) -> str:
    return str(model.explain(**given)).splitlines()[0]


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, **sizes, **options)).eval()
