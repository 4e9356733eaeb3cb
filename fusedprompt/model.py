"""A base model with prompts: adapters, forward, generate, saving and loading."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, heads, modules, saving
from .base_model import BaseFacts, cache_length, check_base_model, device_of
from .config import PromptLearningConfig, TaskType, as_config
from .explanation import explain
from .generation import generate
from .ops._backend import AUTO
from .prompt_cache import PromptCache
from .sharing import SharingFacts, checked_route
from .tasks import FORWARD, TENSORS, Batch, continue_from_cache


def get_prompt_model(
    base_model: nn.Module,
    config: Any,
    adapter_name: str = "default",
    prompt_start: int = 0,
    route: str = AUTO,
) -> PromptModel:
    """Freeze a transformers model and put a trainable prompt in front of its input; PEFT's `get_peft_model`.

    Args:
        base_model: a transformers model. Its parameters stop requiring gradients.
        config: a configuration of this package (or PEFT's of the same name, or a dictionary). It is not changed.
        adapter_name: the name of the first adapter.
        prompt_start: how many tokens of each row stay before the prompt. PEFT's place is 0; 1 keeps BERT's [CLS] first,
            where its pooler looks. PEFT cannot load adapters with another place, and warns of the key in their file.
        route: how prompts reach the base model: "auto", "shared" or "splice"; see `PromptModel`.

    Raises:
        TypeError, ValueError: the model or a field of the configuration is not what it must be.
    """
    if config is None:
        raise TypeError("config: expected a prompt-learning configuration, got None")
    model = PromptModel(base_model, route)
    model.add_adapter(adapter_name, config, prompt_start)
    return model


class PromptModel(nn.Module):
    """A frozen base model and its prompt adapters.

    Called like the base model; attributes that it lacks are the base model's. Outputs are PEFT's (`PeftModelFor...`)
    except where docs/peft-differences.md says otherwise.

    Attributes:
        base_model: the transformers model.
        prompt_encoder: `nn.ModuleDict`, adapter name to the module that owns its parameters.
        peft_config: adapter name to its resolved configuration.
        prompt_start: adapter name to the number of tokens before its prompt.
        active_adapter: the adapter in use.
        route: "shared" runs the prompt through the base model once and lets every row of text read its keys and values,
            "splice" runs it once per row, "auto" shares where that is exact and pays. docs/routes.md says when.
        prompt_cache: prompts' keys and values for calls that train nothing.
    """

    def __init__(self, base_model: nn.Module, route: str = AUTO) -> None:
        """Without adapters, the base model as it is; see `get_prompt_model`."""
        super().__init__()
        if isinstance(base_model, PromptModel):
            raise TypeError(
                "base_model: expected a transformers model, got a PromptModel; add_adapter adds prompts to it"
            )
        self.base_model: Any = check_base_model(base_model)
        self.facts = BaseFacts.of(base_model)
        self.sharing = SharingFacts.of(base_model, self.facts)
        self.route = route
        self.prompt_cache = PromptCache()
        self.prompt_encoder = nn.ModuleDict()
        self.peft_config: dict[str, PromptLearningConfig] = {}
        self.active_adapter: str | None = None
        self._disabled = False
        self.prompt_start: dict[str, int] = {}
        self.train(base_model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def route(self) -> str:
        """How prompts reach the base model, where a call does not say it: "auto", "shared" or "splice"."""
        return self._route

    @route.setter
    def route(self, route: str) -> None:
        self._route = checked_route(route)

    # Adapters

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

    def add_adapter(self, adapter_name: str, config: Any, prompt_start: int = 0) -> None:
        """Add an untrained adapter; `set_adapter` makes it the active one. Nothing changes if this raises.

        Args:
            config, prompt_start: as in `get_prompt_model`.

        Raises:
            ValueError: the name is taken or cannot name a module, or a field of `config` breaks its rule.
        """
        if isinstance(prompt_start, bool) or not isinstance(prompt_start, int) or prompt_start < 0:
            raise ValueError(f"prompt_start: expected an int >= 0, got {prompt_start!r}")
        self._install(adapter_name, self._resolve(as_config(config)), prompt_start)
        self.set_adapter(self.active_adapter or adapter_name)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use one adapter. Its parameters require gradients (unless it is for inference), the others' do not."""
        self._check_known(adapter_name)
        self.active_adapter = adapter_name
        for name, encoder in self.prompt_encoder.items():
            trains = name == adapter_name and not inference_mode and not self.peft_config[name].inference_mode
            encoder.requires_grad_(trains)
            if isinstance(encoder, modules.CPTEmbedding):
                encoder.embedding.requires_grad_(False)
        for _, saved in heads.saved_modules(self.base_model):
            for name, module in saved.modules_to_save.items():
                trains = name == adapter_name and not inference_mode and not self.peft_config[name].inference_mode
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

    def _install(
        self,
        adapter_name: str,
        config: PromptLearningConfig,
        prompt_start: int,
        encoder: modules.PromptModule | None = None,
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
        if adapter_name in self.prompt_encoder:
            del self.prompt_encoder[adapter_name]
        heads.remove_copies(self.base_model, adapter_name)

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

    def prompt_rows_count(self) -> int:
        """P: prompt rows that stand before the tokens."""
        count = self.active_config.num_virtual_tokens
        assert count is not None
        return count

    def prompt_rows(self) -> Tensor:
        """The active adapter's prompt, (P, D). An encoder-decoder's table holds rows for its decoder too; they wait."""
        encoder: Any = self.prompt_encoder[self.active_adapter]  # type: ignore[index]
        rows: Tensor = encoder()
        count = self.prompt_rows_count()
        return rows if rows.shape[0] == count else rows[:count]

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

    # Running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Any = None,
        *,
        route: str | None = None,
        logits: str = "full",
        **kwargs: Any,
    ) -> Any:
        """Run the base model on prompt and tokens.

        Args:
            input_ids: (B, T) ids, or inputs_embeds: (B, T, D).
            attention_mask: (B, T), without the prompt. Rows may be padded on either side, or not at all, with the same
                result.
            labels: as the base model takes them, for the tokens alone.
            position_ids: (B, T) or (1, T), without the prompt; they are moved behind it.
            past_key_values: a cache; one that is not empty holds the prompt already.
            route: "auto", "shared" or "splice", instead of the model's own.
            logits: of a language model: "full" for (B, P + T, V), "text" for (B, T, V) without the prompt's.
            kwargs: for the base model (and `input_type_mask` (B, T) for CPT).

        Returns:
            The base model's output. Logits and hidden states have P + T positions, but for token classification and
            question answering, whose logits have T. On the shared route they are joined when they are first read.

        Raises:
            BackendUnavailable: route "shared" was asked for by name and cannot run; the message says why.
        """
        _refuse_adapter_names(kwargs)
        route = self.route if route is None else checked_route(route)
        tensors = (input_ids, inputs_embeds, attention_mask, labels, position_ids, token_type_ids)
        if self._disabled or self.active_adapter is None:
            given = {name: value for name, value in zip(TENSORS, tensors) if value is not None}
            if past_key_values is not None:
                given["past_key_values"] = past_key_values
            return self.base_model(**given, **kwargs)
        self._check_logits(logits)
        batch = Batch(*tensors, kwargs, route, logits)
        if past_key_values is not None:
            if not self.facts.encoder_decoder and cache_length(past_key_values) > 0:
                return continue_from_cache(self, batch, past_key_values)
            kwargs["past_key_values"] = past_key_values
        return FORWARD[TaskType(self.active_config.task_type)](self, batch)

    def _check_logits(self, logits: str) -> None:
        if logits not in ("full", "text"):
            raise ValueError(f"logits: expected 'full' or 'text', got {logits!r}")
        task = TaskType(self.active_config.task_type)
        if logits == "text" and task is not TaskType.CAUSAL_LM:
            raise ValueError(f"logits: expected 'full' for task {task.value}, got {logits!r}")

    def generate(self, inputs: Tensor | None = None, *, route: str | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prompt in front.

        Args:
            inputs: (B, T) ids, as `input_ids`; or pass `inputs_embeds` (B, T, D), and get only the new tokens.
            route: "auto", "shared" or "splice", instead of the model's own.
            kwargs: every argument of transformers' `generate`. `max_length` counts text only.

        Returns:
            What `generate` returns: for decoders, ids of text and new tokens, without the prompt.
        """
        _refuse_adapter_names(kwargs)
        if self._disabled or self.active_adapter is None:
            return self.base_model.generate(inputs, **kwargs)
        with torch.no_grad():  # as transformers does: nothing here is to be trained
            return generate(self, inputs, self.route if route is None else checked_route(route), **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def explain(self, **batch: Any) -> str:
        """How each adapter's prompt is computed and reaches the base model, and why so, a line each.

        Args:
            batch: arguments of a forward call. With them, what would be done with this batch and the active adapter.
        """
        return explain(self, batch)

    # Saving and loading

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Save adapters in PEFT's format: "default" into the folder itself, any other into a subfolder of its name.

        Each adapter is written whole or not at all. One that can be trained further also gets its encoder's parameters
        in prompt_encoder.safetensors, which PEFT ignores.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._check_known(name)
        for name in names:
            saving.save(self, name, Path(save_directory) if name == "default" else Path(save_directory, name))

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        subfolder: str | None = None,
    ) -> PromptModel:
        """Load an adapter saved by this package or by PEFT onto a base model.

        Args:
            path: a local folder, or the name of a repository on the Hub.
            is_trainable: continue training where it stopped. For P-tuning the folder must hold the encoder, which only
                this package saves.

        Returns:
            A model in eval mode, or with `is_trainable` in the base model's mode.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, with the file and the tensor.
        """
        model = cls(base_model)
        model.load_adapter(path, adapter_name, is_trainable=is_trainable, subfolder=subfolder)
        return model if is_trainable else model.eval()

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        subfolder: str | None = None,
    ) -> None:
        """Load an adapter; one of the same name is replaced. Nothing changes if this raises.

        Args and errors as in `from_pretrained`.
        """
        loaded = saving.load(self, checkpoint.find_folder(path) / (subfolder or ""), is_trainable)
        if adapter_name in self.peft_config:
            self._remove(adapter_name)
        self._install(adapter_name, loaded.config, loaded.prompt_start, loaded.encoder)
        with torch.no_grad():
            for key, parameter in heads.tensors(self.base_model, adapter_name).items():
                parameter.copy_(loaded.head_tensors[key])
        self.set_adapter(self.active_adapter or adapter_name)


def _refuse_adapter_names(kwargs: dict[str, Any]) -> None:
    """Base models with **kwargs would swallow this PEFT argument, and every row would get the active prompt."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names: expected None, because all rows of a batch use the active adapter (set_adapter), got "
            f"{kwargs['adapter_names']!r}"
        )
