"""A base model with prompts: adapters, forward, generate, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, heads, saving
from .adapters import PromptAdapters
from .base_model import cache_length
from .config import TaskType
from .explanation import explain
from .generation import generate, place_template
from .mixed import Mixture, refuse_cache
from .ops._backend import AUTO
from .packing import use_slots
from .placing import drop_prefix_slots, with_slots
from .sharing import checked_route
from .tasks import FORWARD, TENSORS, Batch, continue_from_cache
from .template import Template


def get_prompt_model(
    base_model: nn.Module,
    config: Any,
    adapter_name: str = "default",
    prompt_start: int = 0,
    route: str = AUTO,
    template: Template | str | None = None,
) -> PromptModel:
    """Freeze a transformers model and put a trainable prompt in front of its input; PEFT's `get_peft_model`.

    Args:
        base_model: a transformers model. Its parameters stop requiring gradients.
        config: a configuration of this package (or PEFT's of the same name, or a dictionary). It is not changed.
        adapter_name: the name of the first adapter.
        prompt_start: how many tokens of each row stay before the prompt. PEFT's place is 0; 1 keeps BERT's [CLS] first,
            where its pooler looks. PEFT cannot load adapters with another place, and warns of the key in their file.
        route: how prompts reach the base model: "auto", "shared" or "splice"; see `PromptModel`.
        template: where the prompt's rows stand in a sequence, and what stands between them, as a `Template` or its
            string form; None is PEFT's place. It is saved with the adapter. PEFT cannot load adapters with a template
            that is not the plain prefix `[prompt N] [text]`, and their files tell it so.

    Raises:
        TypeError, ValueError: the model or a field of the configuration is not what it must be.
    """
    if config is None:
        raise TypeError("config: expected a prompt-learning configuration, got None")
    model = PromptModel(base_model, route)
    model.add_adapter(adapter_name, config, prompt_start, template)
    return model


class PromptModel(PromptAdapters):
    """A frozen base model and its prompt adapters.

    Called like the base model; attributes that it lacks are the base model's. Outputs are PEFT's (`PeftModelFor...`)
    except where docs/peft-differences.md says otherwise. The adapters' side is `PromptAdapters`.

    Attributes:
        route: "shared" runs the prompt through the base model once and lets every row of text read its keys and values,
            "splice" runs it once per row, "auto" shares where that is exact and pays. docs/routes.md says when.
    """

    def __init__(self, base_model: nn.Module, route: str = AUTO) -> None:
        """Without adapters, the base model as it is; see `get_prompt_model`."""
        super().__init__(base_model)
        self.route = route

    @property
    def route(self) -> str:
        """How prompts reach the base model, where a call does not say it: "auto", "shared" or "splice"."""
        return self._route

    @route.setter
    def route(self, route: str) -> None:
        self._route = checked_route(route)

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
        slots: Tensor | None = None,
        pool_index: Tensor | None = None,
        fields: Mapping[str, Any] | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model on prompt and tokens.

        Args:
            input_ids: (B, T) ids, or inputs_embeds: (B, T, D).
            attention_mask: (B, T), without the prompt. Rows may be padded on either side, or not at all, with the same
                result.
            labels: as the base model takes them, for the tokens alone. Those of a template's mask tokens may be given
                alone, as (B,) or (B, masks).
            position_ids: (B, T) or (1, T), without the prompt; they are moved behind it.
            past_key_values: a cache; one that is not empty holds the prompt already.
            route: "auto", "shared" or "splice", instead of the model's own.
            logits: of a language model: "full" for (B, P + T, V), "text" for (B, T, V) without the prompt's.
            slots: (B, S) int64, to say where everything goes: ~r for prompt row r, t >= 0 for token t; for padding
                either. attention_mask, labels per token, position_ids, token_type_ids and input_type_mask are then
                those of the output, (B, S); input_ids stay (B, T), and answers to questions count tokens.
            pool_index: (B,) int64, with slots: the columns that a sequence classifier reads, where they are not its
                usual ones (the last that is not padding in a decoder, the first in an encoder).
            fields: instead of input_ids, ids (B, T) without special tokens for each field of the adapter's template, or
                pairs of ids and mask. Labels per token are then a mapping too.
            adapter_names: the adapter of each row, "__base__" for none, instead of the active one for all; their
                prompts and templates may differ. The loss is the mean over the whole batch. With slots: the adapters
                whose prompts, one after another, the slots refer to.
            kwargs: for the base model (and `input_type_mask` (B, T) for CPT).

        Returns:
            The base model's output. Logits and hidden states have P + T positions, but for token classification and
            question answering, whose logits have T. On the shared route they are joined when they are first read.

        Raises:
            BackendUnavailable: route "shared" was asked for by name and cannot run; the message says why.
            ValueError: `slots` or a tensor that goes with them has the wrong shape, dtype or (on a CPU) values.
        """
        route = self.route if route is None else checked_route(route)
        tensors = (input_ids, inputs_embeds, attention_mask, labels, position_ids, token_type_ids)
        if self._disabled or self.active_adapter is None:
            _refuse_slots(slots, "a model without a prompt")
            _refuse_adapter_names(adapter_names)
            _refuse_fields(fields, "for a model without a prompt")
            given = {name: value for name, value in zip(TENSORS, tensors) if value is not None}
            if past_key_values is not None:
                given["past_key_values"] = past_key_values
            return self.base_model(**given, **kwargs)
        batch = Batch(*tensors, kwargs, route, logits)
        task = TaskType(self.active_config.task_type)
        batch.pool_index = pool_index
        if slots is not None:
            _refuse_fields(fields, "with slots, which are of a batch that is complete")
            use_slots(self, batch, slots, adapter_names)
            if batch.table is None and self.active_template is None and not self.active_start:
                drop_prefix_slots(batch, self.prompt_rows_count())
        elif adapter_names is not None:
            _refuse_fields(fields, "with adapter_names, whose templates may have others")
            batch.mixture = Mixture.of(self, adapter_names, batch.tokens)
            task = batch.mixture.task
        _check_logits(logits, task)
        if past_key_values is not None:
            if not self.facts.encoder_decoder and cache_length(past_key_values) > 0:
                _refuse_slots(slots, "tokens that follow a cache, in which the prompt stands already")
                refuse_cache(adapter_names)
                _refuse_fields(fields, "for tokens that follow a cache")
                return continue_from_cache(self, batch, past_key_values)
            kwargs["past_key_values"] = past_key_values
        if batch.layout is None and batch.mixture is None and self.active_template is not None:
            with_slots(self, self.active_template, batch, fields)
        else:
            _refuse_fields(fields, "for an adapter without a template of several parts")
        if pool_index is not None and (batch.layout is None or task is not TaskType.SEQ_CLS):
            raise ValueError(
                f"pool_index: expected None but for SEQ_CLS with slots or a template, got it for task {task.value}"
            )
        with self.heads_for_rows(None if batch.mixture is None else batch.mixture.names):
            return FORWARD[task](self, batch)

    def generate(self, inputs: Tensor | None = None, *, route: str | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prompt in front.

        Args:
            inputs: (B, T) ids, as `input_ids`; or pass `inputs_embeds` (B, T, D), and get only the new tokens.
            route: "auto", "shared" or "splice", instead of the model's own.
            kwargs: every argument of transformers' `generate`. `max_length` counts text only. `slots` (B, S) as in
                `forward`, and then `attention_mask` and `position_ids` (B, S). `adapter_names` as in `forward`: the
                adapter of each row.

        Returns:
            What `generate` returns: for decoders, ids of text and new tokens, without the prompt.
        """
        if self._disabled or self.active_adapter is None:
            _refuse_slots(kwargs.get("slots"), "a model without a prompt")
            _refuse_adapter_names(kwargs.get("adapter_names"))
            return self.base_model.generate(inputs, **kwargs)
        template = self.active_template
        if template is not None and kwargs.get("slots") is None and kwargs.get("adapter_names") is None:
            inputs, kwargs = None, place_template(self, template, inputs, kwargs)
        _refuse_fields(kwargs.get("fields"), "for an adapter without a template of several parts")
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
            batch: arguments of a forward call. With them, what would be done with this batch and its adapters,
                and a picture of its first row: P a prompt row, t a token, A an anchor, · padding.
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
        self._install(adapter_name, loaded.config, loaded.prompt_start, loaded.encoder, loaded.template)
        with torch.no_grad():
            for key, parameter in heads.tensors(self.base_model, adapter_name).items():
                parameter.copy_(loaded.head_tensors[key])
        self.set_adapter(self.active_adapter or adapter_name)


def _refuse_fields(fields: Any, case: str) -> None:
    if fields is not None:
        raise ValueError(f"fields: expected None {case}, got {sorted(fields)}")


def _refuse_slots(slots: Tensor | None, place: str) -> None:
    if slots is not None:
        raise ValueError(f"slots: expected None for {place}, got a tensor of shape {tuple(slots.shape)}")


def _refuse_adapter_names(names: Sequence[str] | None) -> None:
    if names is not None:
        raise ValueError(f"adapter_names: expected None where adapters are disabled or there is none, got {names!r}")


def _check_logits(logits: str, task: TaskType) -> None:
    if logits not in ("full", "text"):
        raise ValueError(f"logits: expected 'full' or 'text', got {logits!r}")
    if logits == "text" and task is not TaskType.CAUSAL_LM:
        raise ValueError(f"logits: expected 'full' for task {task.value}, got {logits!r}")
