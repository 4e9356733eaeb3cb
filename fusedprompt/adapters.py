"""A base model and its adapters: adding, choosing, disabling and removing them, and the prompts that they make."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, modules
from .base_model import BaseFacts, check_base_model, device_of
from .config import PromptLearningConfig, TaskType, as_config
from .lm_head import TextHead
from .pieces import table_ids
from .prompt_cache import PromptCache
from .sharing import SharingFacts
from .template import Template


class PromptAdapters(nn.Module):
    """A frozen base model and the prompts that it can be used with; `PromptModel` runs them.

    Attributes:
        base_model: the transformers model.
        prompt_encoder: `nn.ModuleDict`, adapter name to the module that owns its parameters.
        peft_config: adapter name to its resolved configuration.
        prompt_start: adapter name to the number of tokens before its prompt.
        templates: adapter name to its template, of those that have one.
        active_adapter: the adapter in use.
        prompt_cache: prompts' keys and values for calls that train nothing.
        text_head: whether the next training step may leave its logits until they are read.
    """

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        if isinstance(base_model, PromptAdapters):
            raise TypeError(
                "base_model: expected a transformers model, got a PromptModel; add_adapter adds prompts to it"
            )
        self.base_model: Any = check_base_model(base_model)
        self.facts = BaseFacts.of(base_model)
        self.sharing = SharingFacts.of(base_model, self.facts)
        self.prompt_cache = PromptCache()
        self.text_head = TextHead()
        self.prompt_encoder = nn.ModuleDict()
        self.peft_config: dict[str, PromptLearningConfig] = {}
        self.active_adapter: str | None = None
        self._disabled = False
        self.prompt_start: dict[str, int] = {}
        self.templates: dict[str, Template] = {}
        self.train(base_model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def active_config(self) -> PromptLearningConfig:
        """The active adapter's configuration."""
        if self.active_adapter is None:
            raise ValueError("active_adapter: expected an adapter, but the last one was deleted")
        return self.peft_config[self.active_adapter]

    @property
    def active_start(self) -> int:
        """Tokens of each row that stay before the active adapter's prompt."""
        return self.prompt_start[self.active_adapter] if self.active_adapter is not None else 0

    @property
    def active_template(self) -> Template | None:
        """The active adapter's template, unless that is the plain prefix."""
        return None if self.active_adapter is None else self.template_of(self.active_adapter)

    def template_of(self, adapter_name: str) -> Template | None:
        """An adapter's template, unless that is the plain prefix."""
        template = self.templates.get(adapter_name)
        return None if template is None or template.is_plain_prefix else template

    def add_adapter(
        self, adapter_name: str, config: Any, prompt_start: int = 0, template: Template | str | None = None
    ) -> None:
        """Add an untrained adapter; `set_adapter` makes it the active one. Nothing changes if this raises.

        Args:
            config, prompt_start, template: as in `get_prompt_model`.

        Raises:
            ValueError: the name is taken or cannot name a module, or a field of `config` breaks its rule.
        """
        if isinstance(prompt_start, bool) or not isinstance(prompt_start, int) or prompt_start < 0:
            raise ValueError(f"prompt_start: expected an int >= 0, got {prompt_start!r}")
        resolved = self._resolve(as_config(config))
        if isinstance(template, str):
            template = Template.parse(template)
        if template is not None:
            self._check_template(template, resolved, prompt_start)
        self._install(adapter_name, resolved, prompt_start, template=template)
        self.set_adapter(self.active_adapter or adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter. Its parameters require gradients (unless it is for inference), the others' do not.

        Args:
            adapter_name: or several, to be trained together in batches with `adapter_names`; the first is the active
                one. The parameters of all of them require gradients.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        if not names:
            raise ValueError("adapter_name: expected a name, or several, got none")
        for name in names:
            self._check_known(name)
        self.active_adapter = names[0]
        for name, encoder in self.prompt_encoder.items():
            trains = name in names and not inference_mode and not self.peft_config[name].inference_mode
            encoder.requires_grad_(trains)
            if isinstance(encoder, modules.CPTEmbedding):
                encoder.embedding.requires_grad_(False)
        for _, saved in heads.saved_modules(self.base_model):
            for name, module in saved.modules_to_save.items():
                trains = name in names and not inference_mode and not self.peft_config[name].inference_mode
                module.requires_grad_(trains)
        self._use_heads()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the active one, the first that is left takes its place, or none."""
        self._check_known(adapter_name)
        self._remove(adapter_name)
        if self.active_adapter == adapter_name:
            self.active_adapter = None
            if self.peft_config:
                self.set_adapter(next(iter(self.peft_config)))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this is the base model as it was, heads included."""
        before, self._disabled = self._disabled, True
        self._use_heads()
        try:
            yield
        finally:
            self._disabled = before
            self._use_heads()

    def get_base_model(self) -> nn.Module:
        """The base model."""
        model: nn.Module = self.base_model
        return model

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name: expected one of {sorted(self.peft_config)}, got {adapter_name!r}")

    def _resolve(self, config: PromptLearningConfig) -> PromptLearningConfig:
        if config.task_type is None:
            raise ValueError(f"task_type: expected one of {', '.join(task.value for task in TaskType)}, got None")
        name = config.base_model_name_or_path or self.base_model.__dict__.get("name_or_path") or None
        own_heads = heads.TASK_HEADS.get(TaskType(config.task_type), ())
        saved = [*(config.modules_to_save or []), *own_heads]
        # The table's width, where it is not the hidden size (OPT-350m projects between them).
        width = getattr(self.word_embeddings, "embedding_dim", None)
        resolved = config.resolved(
            self.base_model.config,
            token_dim=config.token_dim or width,
            base_model_name_or_path=name,
            modules_to_save=list(dict.fromkeys(saved)) or None,
        )
        if width is not None and resolved.token_dim != width:
            raise ValueError(f"token_dim: expected the width of the word embeddings, {width}, got {resolved.token_dim}")
        return resolved

    def _check_template(self, template: Any, config: PromptLearningConfig, prompt_start: int) -> None:
        if not isinstance(template, Template):
            raise TypeError(f"template: expected a fusedprompt.Template or a string, got {type(template).__name__}")
        if prompt_start:
            raise ValueError(f"prompt_start: expected 0 with a template, which says all, got {prompt_start}")
        assert config.num_virtual_tokens is not None
        vocabulary = getattr(self.word_embeddings, "num_embeddings", None)
        template.check(config.num_virtual_tokens, self.facts.position_limit, vocabulary)

    def _install(
        self,
        adapter_name: str,
        config: PromptLearningConfig,
        prompt_start: int,
        encoder: modules.PromptModule | None = None,
        template: Template | None = None,
    ) -> None:
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ValueError(f"adapter_name: expected a non-empty name without dots, got {adapter_name!r}")
        own_heads = heads.TASK_HEADS.get(TaskType(config.task_type), ())
        try:
            encoder = encoder or modules.build(config, self.word_embeddings)
            encoder.train(self.training)
            self.prompt_encoder[adapter_name] = encoder.to(self.prompt_device)
            self.peft_config[adapter_name] = config
            self.prompt_start[adapter_name] = prompt_start
            if template is not None:
                self.templates[adapter_name] = template
            names = config.modules_to_save or []
            heads.add_copies(self.base_model, adapter_name, names, [name for name in names if name not in own_heads])
        except BaseException:
            self._remove(adapter_name)
            raise
        if len(self.peft_config) == 1:
            self.base_model.requires_grad_(False)

    def _remove(self, adapter_name: str) -> None:
        self.prompt_cache.clear(adapter_name)
        self.peft_config.pop(adapter_name, None)
        self.prompt_start.pop(adapter_name, None)
        self.templates.pop(adapter_name, None)
        if adapter_name in self.prompt_encoder:
            del self.prompt_encoder[adapter_name]
        heads.remove_copies(self.base_model, adapter_name)

    def heads_for_rows(self, names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        """Within it, each row of a batch goes through the heads of its own adapter; see `heads.for_rows`."""
        return heads.for_rows(self.base_model, names)

    def _use_heads(self) -> None:
        for _, saved in heads.saved_modules(self.base_model):
            saved.active = None if self._disabled else self.active_adapter

    # The prompt

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's input embedding."""
        module: nn.Module = self.base_model.get_input_embeddings()
        return module

    @property
    def prompt_device(self) -> torch.device:
        """Where the input embedding is."""
        return device_of(self.word_embeddings)

    def prompt_rows_count(self, adapter_name: str | None = None) -> int:
        """P: prompt rows of an adapter, the active one by default."""
        config = self.active_config if adapter_name is None else self.peft_config[adapter_name]
        assert config.num_virtual_tokens is not None
        return config.num_virtual_tokens

    def prompt_rows(self, adapter_name: str | None = None) -> Tensor:
        """An adapter's prompt, (P, D), the active one's by default.

        An encoder-decoder's table holds rows for its decoder too; they wait.
        """
        encoder: Any = self.prompt_encoder[adapter_name or self.active_adapter]  # type: ignore[index]
        rows: Tensor = encoder()
        count = self.prompt_rows_count(adapter_name)
        return rows if rows.shape[0] == count else rows[:count]

    def table_rows_count(self, adapter_name: str | None = None) -> int:
        """R: rows of `prompt_table`."""
        template = self.active_template if adapter_name is None else self.template_of(adapter_name)
        return self.prompt_rows_count(adapter_name) + (0 if template is None else len(table_ids(template)))

    def prompt_table(self, adapter_name: str | None = None) -> Tensor:
        """What an adapter's slots refer to, (R, D): its prompt, then its template's constant tokens."""
        rows = self.prompt_rows(adapter_name)
        template = self.active_template if adapter_name is None else self.template_of(adapter_name)
        ids = [] if template is None else table_ids(template)
        if not ids:
            return rows
        constants = self.word_embeddings(_constant(tuple(ids), self.prompt_device))
        return torch.cat((rows, constants.to(rows.dtype)))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The whole prompt table (R, D) as it is saved: computed in eval mode, so that no dropout is saved with it."""
        self._check_known(adapter_name)
        encoder: Any = self.prompt_encoder[adapter_name]
        training = encoder.training
        encoder.eval()
        try:
            with torch.no_grad():
                prompt: Tensor = encoder.encode().detach().cpu()
        finally:
            encoder.train(training)
        return prompt


@functools.lru_cache(maxsize=64)
def _constant(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids on a device, copied there once, for training too if the first use was in inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)
