"""A PEFT model as the rest of this package sees a model with prompts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..base_model import BaseFacts, device_of
from ..config import PromptLearningConfig, as_config
from ..lm_head import TextHead
from ..prompt_cache import PromptCache
from ..sharing import SharingFacts
from .encoders import prompt_rows, using
from .mixed import heads_for_rows

if TYPE_CHECKING:
    from ..model import PromptModel


class PeftView:
    """What `tasks`, `shared` and `generation` read of a `PromptModel`, read from a PeftModel. It owns no weights.

    `PeftView.of` gives it the type that these ask for.
    """

    def __init__(self, model: Any, backend: str, route: str) -> None:
        self.model, self.backend, self.route = model, backend, route
        self._prompt_cache, self._settings = PromptCache(), dict[str, dict[str, Any]]()
        self.text_head = TextHead()

    @classmethod
    def of(cls, model: Any, backend: str, route: str) -> PromptModel:
        view: Any = cls(model, backend, route)
        prompt_model: PromptModel = view
        return prompt_model

    @property
    def prompt_cache(self) -> PromptCache:
        """Without the active adapter's entry if its configuration has changed: `inference_mode` alone makes another
        prompt of the same weights."""
        name, settings = self.active_adapter, dict(vars(self.model.active_peft_config))
        if self._settings.get(name) != settings:
            self._prompt_cache.clear(name)
            self._settings[name] = settings
        return self._prompt_cache

    @property
    def base_model(self) -> Any:
        return self.model.base_model

    @functools.cached_property
    def facts(self) -> BaseFacts:
        return BaseFacts.of(self.base_model)

    @functools.cached_property
    def sharing(self) -> SharingFacts:
        return SharingFacts.of(self.base_model, self.facts)

    @property
    def word_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.word_embeddings
        return embeddings

    @property
    def active_adapter(self) -> str:
        return str(self.model.active_adapter)

    @property
    def peft_config(self) -> dict[str, Any]:
        configs: dict[str, Any] = self.model.peft_config
        return configs

    @property
    def prompt_encoder(self) -> Any:
        return self.model.prompt_encoder

    @property
    def prompt_start(self) -> dict[str, int]:
        return dict.fromkeys(self.peft_config, 0)

    active_start = 0

    @property
    def active_config(self) -> PromptLearningConfig:
        return as_config(self.model.active_peft_config)

    @property
    def prompt_device(self) -> Any:
        return device_of(self.word_embeddings)

    def prompt_rows_count(self, adapter_name: str | None = None) -> int:
        config = self.model.active_peft_config if adapter_name is None else self.peft_config[adapter_name]
        return int(config.num_virtual_tokens)

    def prompt_rows(self, adapter_name: str | None = None) -> Tensor:
        """(P, D): without the rows of an encoder-decoder's table that wait for its decoder."""
        with using(self.backend):
            rows = prompt_rows(self.model, adapter_name)
        count = self.prompt_rows_count(adapter_name)
        return rows if rows.shape[0] == count else rows[:count]

    def template_of(self, adapter_name: str) -> None:
        return None

    def prompt_table(self, adapter_name: str | None = None) -> Tensor:
        return self.prompt_rows(adapter_name)

    def table_rows_count(self, adapter_name: str | None = None) -> int:
        return self.prompt_rows_count(adapter_name)

    def heads_for_rows(self, names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if names is None else heads_for_rows(self.base_model, names)
