"""Families whose layers take a second embedding of each token: Gemma 3n and Gemma 4.

Their text model makes these from ids. Images and sounds have none of their own: Gemma 4 gives their places those of the
padding token, Gemma 3n those of token 0 (`get_per_layer_inputs` of both, transformers 5.23). A prompt's rows get the
same.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def text_model(base: nn.Module) -> Any:
    """The part that makes inputs of each layer from ids, or None."""
    found = (part for part in base.modules() if hasattr(part, "get_per_layer_inputs"))
    part: Any = next(found, None)
    return part if part is not None and part.config.hidden_size_per_layer_input else None


def placeholder(base: nn.Module) -> tuple[int | None, bool]:
    """The id whose layer inputs a prompt's rows get, or None for models without such inputs; and whether they are
    needed: Gemma 4 looks for the ids of embeddings that come alone, Gemma 3n does without."""
    part = text_model(base)
    if part is None:
        return None, False
    needed = "inputs_embeds" in inspect.signature(part.get_per_layer_inputs).parameters
    return int((part.config.pad_token_id if needed else None) or 0), needed


def layer_inputs(base: nn.Module, ids: Tensor) -> Tensor:
    """(B, S, layers, width): the inputs of each layer for ids (B, S)."""
    inputs: Tensor = text_model(base).get_per_layer_inputs(ids)
    return inputs
