"""A PEFT model as routes see a model with prompts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..base.cache import SharingFacts
from ..base.facts import BaseFacts
from ..base.saved_modules import for_rows
from ..base.state import BaseState
from ..base.tasks import Task, task_of
from ..layouts.prompt import Prompt
from ..methods.method import CACHE, find_method, name_of
from ..ops._backend import using
from ..routes.head import TextHead
from ..routes.host import joined
from ..routes.prompt_cache import PromptCache
from .encoders import prompt_rows


class PeftHost:
    """The `Host` of a PeftModel. It owns no weights. Its adapters were trained with layers that PEFT ties.

    task: of the model's class; None where that has none, and each adapter's configuration says it.
    """

    ties_layers = True

    def __init__(self, model: Any, backend: str, route: str, task: Task | None) -> None:
        self.model, self.backend, self.route, self.task = model, backend, route, task
        self.text_head = TextHead()
        self._prompt_cache, self._settings = PromptCache(), dict[str, dict[str, Any]]()
        self._state: BaseState | None = None
        self._sharing: SharingFacts | None = None
        if getattr(model, "base_model", None) is not None:  # a copy that is being made has none yet
            self.state.looks_left()  # as it is now

    @property
    def base_model(self) -> Any:
        return self.model.base_model

    @functools.cached_property
    def facts(self) -> BaseFacts:
        return BaseFacts.of(self.base_model)

    @property
    def sharing(self) -> SharingFacts:
        if self._sharing is None:
            self._sharing = SharingFacts.of(self.base_model, self.facts)
        return self._sharing

    @sharing.setter
    def sharing(self, facts: SharingFacts) -> None:
        self._sharing = facts

    @property
    def state(self) -> BaseState:
        if self._state is None or self._state.module is not self.base_model:
            self._state = BaseState(self.base_model)
        return self._state

    @property
    def word_embeddings(self) -> Any:
        """PEFT's; the base model's own, where PEFT looks for a table of another size and finds none."""
        found = self.model.word_embeddings
        return self.base_model.get_input_embeddings() if found is None else found

    @property
    def in_use(self) -> str:
        return str(self.model.active_adapter)

    @property
    def prompts(self) -> dict[str, Prompt]:
        found = {}
        for name, config in self.peft_config.items():
            task = self.task or (Task("none") if config.task_type is None else task_of(config.task_type))
            rows = int(getattr(config, "num_virtual_tokens", 0))
            method = find_method(config.peft_type)
            tasks = None if method is None or method.num_tasks is None else method.num_tasks(config)
            in_cache = method is not None and method.product == CACHE
            found[name] = Prompt(name, name_of(config.peft_type), task, rows, in_cache=in_cache, num_tasks=tasks)
        return found

    @property
    def peft_config(self) -> Any:
        return self.model.peft_config

    @property
    def prompt_encoder(self) -> Any:
        return self.model.prompt_encoder

    @property
    def prompt_cache(self) -> PromptCache:
        """Without the active adapter's entry if its configuration has changed: `inference_mode` alone makes another
        prompt of the same weights."""
        name, settings = self.in_use, dict(vars(self.model.active_peft_config))
        if self._settings.get(name) != settings:
            self._prompt_cache.clear(name)
            self._settings[name] = settings
        return self._prompt_cache

    def table(self, prompts: Sequence[Prompt], padded: bool = False) -> Tensor:
        width = int(self.model.active_peft_config.token_dim)
        with using(self.backend):
            return joined(self, prompts, self._encoded, padded, width)

    def _encoded(self, prompts: Sequence[Prompt]) -> Tensor:
        """(k, P, D): without the rows of an encoder-decoder's table that wait for its decoder."""
        name, count = prompts[0].name, prompts[0].encoded_rows
        tasks = [prompt.task_id for prompt in prompts if prompt.task_id is not None]
        rows = prompt_rows(self.model, name, tasks or None)
        rows = rows if tasks else rows.expand(len(prompts), -1, -1)
        return rows if rows.shape[1] == count else rows[:, :count]

    def heads_for_rows(self, names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        if names is None:
            return contextlib.nullcontext()
        from peft.utils import ModulesToSaveWrapper

        return for_rows(self.state.of_kind(ModulesToSaveWrapper), names)
