"""What routes may ask of a model with prompts: `PromptModel` is one, a PEFT model under `apply` another."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.cache import SharingFacts
from ..base.facts import BaseFacts, device_of
from ..base.state import BaseState
from ..layouts.prompt import Prompt
from ..layouts.shared_text import put_beside
from .head import TextHead
from .prompt_cache import PromptCache


class Host(Protocol):
    """A base model, its prompts, and what is remembered of both.

    sharing: whether prompts of this base model can be shared at all; what a call finds out is written into it.
    text_head: whether the next training step may leave its logits until they are read.
    base_model: the transformers model. facts: what does not change of it. state: what may. word_embeddings: its own.
    in_use: the adapter of calls that name none; None if they are for the base model alone.
    prompts, peft_config, prompt_encoder: each adapter's prompt and its place, its configuration, ours or PEFT's, and
        its module, in an `nn.ModuleDict`.
    prompt_cache: prompts' keys and values for calls that train nothing.
    ties_layers: in an encoder-decoder two layers may have the same keys and values of a prefix; see `layer_order`.
    route: "auto", "shared" or "splice", for calls that name none. backend: of the ops.
    """

    sharing: SharingFacts
    text_head: TextHead
    ties_layers: bool

    @property
    def base_model(self) -> Any: ...
    @property
    def facts(self) -> BaseFacts: ...
    @property
    def state(self) -> BaseState: ...
    @property
    def word_embeddings(self) -> nn.Module: ...
    @property
    def in_use(self) -> str | None: ...
    @property
    def prompts(self) -> Mapping[str, Prompt]: ...
    @property
    def peft_config(self) -> Mapping[str, Any]: ...
    @property
    def prompt_encoder(self) -> Any: ...
    @property
    def prompt_cache(self) -> PromptCache: ...
    @property
    def route(self) -> str: ...
    @property
    def backend(self) -> str: ...

    def table(self, prompts: Sequence[Prompt], padded: bool = False) -> Tensor:
        """(R, D): the tables of prompts, one after another, to which slots refer. padded: and a row of zeros.

        Prompts of one adapter's tasks that stand together are made together.
        """

    def heads_for_rows(self, names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        """Within it each row of a batch goes through its own adapter's copies of modules that are saved in full."""


def joined(
    host: Host, prompts: Sequence[Prompt], make: Callable[[Sequence[Prompt]], Tensor], padded: bool, width: int
) -> Tensor:
    """`Host.table`. make: of prompts of one adapter, (k, R, D) without text beside them."""
    groups = [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.name)]
    tables, device = [], device_of(host.word_embeddings)
    for group in groups:
        text, encoded = group[0].shared, group[0].encoded_rows
        rows = make(group) if encoded else torch.empty(len(group), 0, width, device=device, dtype=host.base_model.dtype)
        tables.append((rows if text is None else put_beside(rows, text, host.word_embeddings)).flatten(0, 1))
    if len(tables) == 1 and not padded:
        return tables[0]
    like = tables[0] if tables else torch.empty(0, width, device=device)
    return torch.cat([*(tables or [like]), *([like.new_zeros(1, like.shape[1])] if padded else [])])
