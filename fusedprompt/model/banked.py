"""One call's prompts out of a bank: a `Host` of its own, which no later version of a prompt can reach."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..bank.bank import PromptBank
from ..base.cache import SharingFacts
from ..base.facts import BaseFacts
from ..base.state import BaseState
from ..base.tasks import Task, task_of
from ..layouts.mixture import BASE
from ..layouts.prompt import Prompt
from ..methods.config import PeftType
from ..methods.prompt_tuning import PromptTuningConfig
from ..routes.host import joined
from ..routes.prompt_cache import PromptCache
from .adapters import PromptAdapters


class BankedCall:
    """A model, with the prompts that one call names in place of its adapters.

    A prompt's name is here that of its version, so that keys and values that are kept of it are no other one's. Its
    rows are held as long as the call runs.

    Attributes:
        names: the call's `adapter_names`, by versions.
    """

    ties_layers = False

    def __init__(self, model: PromptAdapters, bank: PromptBank, names: Sequence[str], route: str) -> None:
        self.model, self.route, self.backend = model, route, model.backend
        self.text_head = model.text_head
        entries = {name: bank._version(name) for name in dict.fromkeys(names) if name != BASE}
        self.names = [BASE if name == BASE else entries[name].key for name in names]
        self.prompt_encoder: Any = {}
        self.prompts: dict[str, Prompt] = {}
        self.peft_config: dict[str, Any] = {}
        task = task_of_base(model)
        for entry in entries.values():
            self.prompt_encoder[entry.key] = bank._module(entry, model.prompt_device)
            self.prompts[entry.key] = Prompt(entry.key, PeftType.PROMPT_TUNING.value, task, entry.rows)
            self.peft_config[entry.key] = PromptTuningConfig(
                task_type=task.name, num_virtual_tokens=entry.rows, token_dim=bank.width, inference_mode=True
            )
        self.in_use = next(iter(self.prompts))

    @property
    def base_model(self) -> Any:
        return self.model.base_model

    @property
    def facts(self) -> BaseFacts:
        return self.model.facts

    @property
    def sharing(self) -> SharingFacts:
        return self.model.sharing

    @sharing.setter
    def sharing(self, found: SharingFacts) -> None:  # of the base model, for later calls too
        self.model.sharing = found

    @property
    def state(self) -> BaseState:
        return self.model.state

    @property
    def word_embeddings(self) -> nn.Module:
        return self.model.word_embeddings

    @property
    def prompt_cache(self) -> PromptCache:
        return self.model.prompt_cache

    def table(self, prompts: Sequence[Prompt], padded: bool = False) -> Tensor:
        """See `Host`."""

        def make(group: Sequence[Prompt]) -> Tensor:
            rows: Tensor = self.prompt_encoder[group[0].name]()
            return rows.unsqueeze(0)

        return joined(self, prompts, make, padded, self.facts.width or 0)

    def heads_for_rows(self, names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        """A bank's prompts have no heads of their own."""
        return contextlib.nullcontext()


def task_of_base(model: PromptAdapters) -> Task:
    """What a prompt alone is for on a base model: no task has a head of its own."""
    base = model.base_model
    if not base.can_generate():
        return task_of("FEATURE_EXTRACTION")
    return task_of("SEQ_2_SEQ_LM" if model.facts.encoder_decoder else "CAUSAL_LM")


def check_bank(bank: Any, model: PromptAdapters) -> PromptBank:
    """Refuse what is no bank of a model's base model.

    Raises:
        TypeError, ValueError: it is none, or one of a base model of another width or vocabulary.
    """
    if not isinstance(bank, PromptBank):
        raise TypeError(f"bank: expected a fusedprompt.PromptBank, got {type(bank).__name__}")
    bank._check_base(model.base_model)
    return bank
