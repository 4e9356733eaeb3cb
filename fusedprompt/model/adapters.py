"""A base model and its adapters: adding, choosing, disabling and removing them, and the prompts that they make."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base import saved_modules
from ..base.cache import SharingFacts, new_cache, why_no_prefix
from ..base.facts import BaseFacts, check_base_model, device_of
from ..base.first_use import key_shapes
from ..base.state import BaseState, evaluating
from ..base.tasks import task_names, task_of
from ..layouts.mixture import prompts_of_rows
from ..layouts.prompt import Prompt
from ..layouts.template import Template
from ..methods import PromptModule, method_of
from ..methods.config import PromptLearningConfig, as_config
from ..methods.method import CACHE
from ..ops._backend import AUTO
from ..routes.head import TextHead
from ..routes.host import joined
from ..routes.prefix import check_keys, largest
from ..routes.prompt_cache import PromptCache
from .through import ReadsThrough


class PromptAdapters(ReadsThrough):
    """A frozen base model and the prompts that it can be used with; `PromptModel` runs them.

    Attributes:
        base_model: the transformers model.
        prompt_encoder: `nn.ModuleDict`, adapter name to the module that owns its parameters.
        peft_config: adapter name to its resolved configuration.
        prompts: adapter name to its prompt's size and place.
        active_adapter: the adapter in use.
        prompt_cache: prompts' keys and values for calls that train nothing.
        text_head: whether the next training step may leave its logits until they are read.
        bank: the `PromptBank` whose prompts calls name in place of adapters; None for adapters.
    """

    bank: Any = None
    backend = AUTO  # ops follow `use_backend`
    ties_layers = False

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        if isinstance(base_model, PromptAdapters):
            raise TypeError(
                "base_model: expected a transformers model, got a PromptModel; add_adapter adds prompts to it"
            )
        self.base_model: Any = check_base_model(base_model)
        self.facts = BaseFacts.of(base_model)
        self.sharing = SharingFacts.of(base_model, self.facts)
        self._state = BaseState(base_model)
        self._state.looks_left()  # as it is now
        self.prompt_cache = PromptCache()
        self.text_head = TextHead()
        self.prompt_encoder = nn.ModuleDict()
        self.peft_config: dict[str, PromptLearningConfig] = {}
        self.active_adapter: str | None = None
        self._disabled = False
        self.prompts: dict[str, Prompt] = {}
        self.train(base_model.training)
        self._complete = True  # from here on, attributes that the base model has are written to it

    @property
    def active_config(self) -> PromptLearningConfig:
        """The active adapter's configuration."""
        return self.peft_config[self._prompt().name]

    @property
    def in_use(self) -> str | None:
        """The adapter of calls that name none; None while adapters are disabled."""
        return None if self._disabled else self.active_adapter

    @property
    def prompt_start(self) -> dict[str, int]:
        """Adapter name to the number of tokens before its prompt."""
        return {name: prompt.start for name, prompt in self.prompts.items()}

    @property
    def active_start(self) -> int:
        """Tokens of each row that stay before the active adapter's prompt."""
        return self.prompt_start.get(self.active_adapter or "", 0)

    @property
    def active_template(self) -> Template | None:
        """The active adapter's template, unless that is the plain prefix."""
        return self.template_of(self.active_adapter or "")

    def template_of(self, adapter_name: str) -> Template | None:
        """An adapter's template, unless that is the plain prefix."""
        template = self.templates.get(adapter_name)
        return None if template is None or template.is_plain_prefix else template

    @property
    def templates(self) -> dict[str, Template]:
        """Adapter name to its template, of those that have one."""
        return {name: prompt.template for name, prompt in self.prompts.items() if prompt.template is not None}

    @property
    def state(self) -> BaseState:
        """What may change of the base model."""
        if self._state.module is not self.base_model:
            self._state = BaseState(self.base_model)
        return self._state

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
        resolved = self._resolve(as_config(config, PromptLearningConfig))
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
        trained = {name for name in names if not inference_mode and not self.peft_config[name].inference_mode}
        for name, encoder in self.prompt_encoder.items():
            encoder.requires_grad_(name in trained)
            for frozen in method_of(self.peft_config[name]).frozen:
                encoder.get_submodule(frozen).requires_grad_(False)
        for _, saved in saved_modules.saved_modules(self.base_model):
            for name, module in saved.modules_to_save.items():
                module.requires_grad_(name in trained)
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
        return cast(nn.Module, self.base_model)

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name: expected one of {sorted(self.peft_config)}, got {adapter_name!r}")

    def _resolve(self, config: PromptLearningConfig) -> PromptLearningConfig:
        if config.task_type is None:
            raise ValueError(f"task_type: expected one of {', '.join(task_names())}, got None")
        name = config.base_model_name_or_path or self.base_model.__dict__.get("name_or_path") or None
        saved = [*(config.modules_to_save or []), *task_of(config.task_type).heads]
        # The table's width, where it is not the hidden size (OPT-350m projects between them).
        width = getattr(self.word_embeddings, "embedding_dim", None)
        layers = config.num_layers
        if method_of(config).product == CACHE:
            objection = why_no_prefix(self.base_model, self.facts)
            if objection is not None:
                method = method_of(config).name
                raise ValueError(
                    f"base_model: expected one whose attention reads a prefix of {method}, but {objection}"
                )
            width = None
            if self.facts.encoder_decoder:  # the prefix is its decoder's
                layers = layers or len(new_cache(self.base_model).layers)
        resolved = config.resolved(
            self.base_model.config,
            token_dim=config.token_dim or width,
            num_layers=layers,
            base_model_name_or_path=name,
            modules_to_save=list(dict.fromkeys(saved)) or None,
        )
        if method_of(config).product == CACHE:
            return self._with_keys(config, resolved)
        if width is not None and resolved.token_dim != width:
            raise ValueError(f"token_dim: expected the width of the word embeddings, {width}, got {resolved.token_dim}")
        return resolved

    def _with_keys(self, given: PromptLearningConfig, resolved: PromptLearningConfig) -> PromptLearningConfig:
        """A prefix's configuration with the sizes of the base model's keys. Where PEFT's rule gives others, PEFT's
        prefix does not run, or leaves out layers."""
        shapes = key_shapes(self.base_model, self.facts)
        if not isinstance(shapes, tuple):
            return resolved
        heads, width = largest(shapes)
        if (given.num_attention_heads, given.token_dim) not in ((None, None), (heads, heads * width)):
            return resolved
        return dataclasses.replace(resolved, token_dim=heads * width, num_attention_heads=heads)

    def _check_template(self, template: Any, config: PromptLearningConfig, prompt_start: int) -> None:
        if not isinstance(template, Template):
            raise TypeError(f"template: expected a fusedprompt.Template or a string, got {type(template).__name__}")
        if prompt_start:
            raise ValueError(f"prompt_start: expected 0 with a template, which says all, got {prompt_start}")
        assert config.num_virtual_tokens is not None
        vocabulary = getattr(self.word_embeddings, "num_embeddings", None)
        template.check(_seen(config), self.facts.position_limit, vocabulary)

    def _install(
        self,
        adapter_name: str,
        config: PromptLearningConfig,
        prompt_start: int,
        encoder: PromptModule | None = None,
        template: Template | None = None,
    ) -> None:
        if self.bank is not None:
            raise ValueError(f"adapter_name: expected none in a model of a bank, got {adapter_name!r}; see bank.add")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ValueError(f"adapter_name: expected a non-empty name without dots, got {adapter_name!r}")
        task, method = task_of(config.task_type), method_of(config)
        assert config.num_virtual_tokens is not None
        if method.product == CACHE:
            self._check_prefix(adapter_name, config, prompt_start, template)
        try:
            encoder = encoder or method.module(config, self.word_embeddings)
            for frozen in method.frozen:
                encoder.get_submodule(frozen)  # an AttributeError names one that is not there
            encoder.train(self.training)
            self.prompt_encoder[adapter_name] = encoder.to(self.prompt_device)
            self.peft_config[adapter_name] = config
            tasks = None if method.num_tasks is None else method.num_tasks(config)
            kept = None if method.kept is None else method.kept(config)
            place = Prompt(
                adapter_name,
                method.name,
                task,
                _seen(config),
                prompt_start,
                template,
                method.product == CACHE,
                tasks,
                kept=kept,
            )
            self.prompts[adapter_name] = place
            names = config.modules_to_save or []
            required = [name for name in names if name not in task.heads]
            saved_modules.add_copies(self.base_model, adapter_name, names, required)
        except BaseException:
            self._remove(adapter_name)
            raise
        if len(self.peft_config) == 1:
            self.base_model.requires_grad_(False)

    def _check_prefix(
        self, name: str, config: PromptLearningConfig, prompt_start: int, template: Template | None
    ) -> None:
        method = method_of(config).name
        layers = len(new_cache(self.base_model).layers)
        if config.num_layers != layers:
            raise ValueError(
                f"num_layers: expected the {layers} layers of the base model's cache, got {config.num_layers}"
            )
        rule = f"with {method}, whose keys and values stand in front of all text"
        if prompt_start:
            raise ValueError(f"prompt_start: expected 0 {rule}, got {prompt_start}")
        if template is not None and not template.is_plain_prefix:
            raise ValueError(f"template: expected none {rule}, got {str(template)!r}")
        check_keys(self, name, config, method)

    def _remove(self, adapter_name: str) -> None:
        self.prompt_cache.clear(adapter_name)
        self.peft_config.pop(adapter_name, None)
        self.prompts.pop(adapter_name, None)
        if adapter_name in self.prompt_encoder:
            del self.prompt_encoder[adapter_name]
        saved_modules.remove_copies(self.base_model, adapter_name)

    def heads_for_rows(self, names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        """Within it, each row of a batch goes through the heads of its own adapter; see `saved_modules.for_rows`."""
        return saved_modules.for_rows(() if names is None else self.state.of_kind(saved_modules.SavedModule), names)

    def _use_heads(self) -> None:
        for _, saved in saved_modules.saved_modules(self.base_model):
            saved.active = None if self._disabled else self.active_adapter

    # The prompt

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's input embedding."""
        return cast(nn.Module, self.base_model.get_input_embeddings())

    @property
    def prompt_device(self) -> torch.device:
        """Where the input embedding is."""
        return device_of(self.word_embeddings)

    def _prompt(self, adapter_name: str | None = None) -> Prompt:
        """An adapter's, by default the active one's."""
        name = adapter_name or self.active_adapter
        if name is None:
            raise ValueError("active_adapter: expected an adapter, but the last one was deleted")
        return self.prompts[name]

    def prompt_rows_count(self, adapter_name: str | None = None) -> int:
        """P: prompt rows of an adapter, the active one by default."""
        return self._prompt(adapter_name).rows

    def prompt_rows(self, adapter_name: str | None = None, task_id: int | None = None) -> Tensor:
        """An adapter's prompt, (P, D), the active one's by default. task_id: which, of an adapter with several tasks.

        An encoder-decoder's table holds rows for its decoder too; they wait.
        """
        prompt = self._prompt(adapter_name)
        own = prompts_of_rows(self.prompts, [prompt.name], [task_id])[0] or prompt
        return self._encoded((own,))[0]

    def _encoded(self, prompts: Sequence[Prompt]) -> Tensor:
        """(k, P, D): the prompts of one adapter, all its tasks' in one call."""
        encoder: Any = self.prompt_encoder[prompts[0].name]
        tasks, count = [prompt.task_id for prompt in prompts if prompt.task_id is not None], prompts[0].encoded_rows
        rows: Tensor = encoder(task_ids=tasks) if tasks else encoder().expand(len(prompts), -1, -1)
        if prompts[0].kept is not None:
            return rows.index_select(1, _constant(prompts[0].kept, rows.device))
        return rows if rows.shape[1] == count else rows[:, :count]

    def table_rows_count(self, adapter_name: str | None = None) -> int:
        """R: its rows, and its template's constant tokens."""
        return self._prompt(adapter_name).table_rows

    def table(self, prompts: Sequence[Prompt], padded: bool = False) -> Tensor:
        """(R, D): each prompt's rows, and its template's constant tokens; with `padded`, a row of zeros behind all."""
        return joined(self, prompts, self._tables, padded, self.active_config.token_dim or 0)

    def _tables(self, prompts: Sequence[Prompt]) -> Tensor:
        """(k, R, D): the tables of prompts of one adapter."""
        rows, ids = self._encoded(prompts), prompts[0].constants
        if not ids:
            return rows
        constants = self.word_embeddings(_constant(tuple(ids), self.prompt_device)).to(rows.dtype)
        return torch.cat((rows, constants.expand(len(prompts), -1, -1)), 1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The whole prompt table (R, D) as it is saved: computed in eval mode, so that no dropout is saved with it."""
        self._check_known(adapter_name)
        encoder: Any = self.prompt_encoder[adapter_name]
        with torch.no_grad(), evaluating(encoder):
            prompt: Tensor = encoder.encode().detach().cpu()
        return prompt


def _seen(config: PromptLearningConfig) -> int:
    """P: the rows of an adapter's prompt that are put in."""
    method = method_of(config)
    kept = None if method.kept is None else method.kept(config)
    assert config.num_virtual_tokens is not None
    return config.num_virtual_tokens if kept is None else len(kept)


@functools.lru_cache(maxsize=64)
def _constant(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids on a device, copied there once, for training too if the first use was in inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)
