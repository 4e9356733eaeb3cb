"""A base model with prompts: adapters, forward, generate, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.bank import PromptBank
from ..layouts.batch import Batch
from ..layouts.mixture import BASE
from ..layouts.template import Template
from ..methods import checkpoint
from ..ops._backend import AUTO
from ..routes.call import FULL, Call, check_logits
from ..routes.choice import checked_route
from ..routes.explain import describe_adapter, explain, first_use_line
from ..routes.plan import plan
from ..routes.run import run
from . import card, saving
from .banked import BankedCall, check_bank
from .citizen import Citizen


def get_prompt_model(
    base_model: nn.Module,
    config: Any,
    adapter_name: str = "default",
    prompt_start: int = 0,
    route: str = AUTO,
    template: Template | str | None = None,
    logits: str = FULL,
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
        logits: of a language model, "full" or "text"; see `PromptModel`.

    Raises:
        TypeError, ValueError: the model or a field of the configuration is not what it must be.
    """
    if config is None:
        raise TypeError("config: expected a prompt-learning configuration, got None")
    model: PromptModel = PromptModel(base_model, route, logits)
    model.add_adapter(adapter_name, config, prompt_start, template)
    return model


class PromptModel(Citizen):
    """A frozen base model and its prompt adapters, called like the base model.

    Attributes that it lacks are the base model's, to be read and to be set. Its class is a subclass with the base
    model's class name and arguments; docs/tools.md says what tools make of that. Outputs are PEFT's
    (`PeftModelFor...`) except where docs/peft-differences.md says otherwise. The adapters' side is `PromptAdapters`.
    Arguments, results and errors below are those of a call.

    Attributes:
        route: "shared" runs the prompt through the base model once and lets every row of text read its keys and values,
            "splice" runs it once per row, "auto" shares where that is exact and pays. docs/routes.md says when.
        logits: of a language model, where a call does not say it: "full", or "text" for logits that stand where the
            labels stand, as Trainer's metrics compare them: (B, T, V), or with slots (B, S, V).

    Args:
        input_ids: (B, T) ids, or inputs_embeds: (B, T, D).
        attention_mask: (B, T), without the prompt. Rows may be padded on either side, or not at all, with the same
            result.
        labels: as the base model takes them, for the tokens alone. Those of a template's mask tokens may be given
            alone, as (B,) or (B, masks).
        position_ids: (B, T) or (1, T), without the prompt; they are moved behind it.
        past_key_values: a cache; one that is not empty holds the prompt already.
        route: "auto", "shared" or "splice", instead of the model's own.
        logits: of a language model: "full" for (B, P + T, V), "text" for (B, T, V) without the prompt's; instead of the
            model's own.
        slots: (B, S) int64, to say where everything goes: ~r for prompt row r, t >= 0 for token t; for padding
            either. attention_mask, labels per token, position_ids, token_type_ids and input_type_mask are then
            those of the output, (B, S); input_ids stay (B, T), and answers to questions count tokens.
        pool_index: (B,) int64, with slots: the columns that a sequence classifier reads, where they are not its
            usual ones (the last that is not padding in a decoder, the first in an encoder).
        fields: instead of input_ids, ids (B, T) without special tokens for each field of the adapter's template, or
            pairs of ids and mask. Labels per token are then a mapping too.
        adapter_names: the adapter of each row, "__base__" for none, instead of the active one for all; their
            prompts and templates may differ. The loss is the mean over the whole batch. With slots: the adapters
            whose prompts, one after another, the slots refer to. With a bank these are its prompts.
        task_ids: (B,) the task of each row, for adapters of multitask prompt tuning: a list, or an int64 tensor (on a
            GPU the host waits for its values). With adapter_names, None (or -1) for rows of other adapters; with
            slots and adapter_names, of each of these.
        shared_prefix: (1, K) ids that every row begins with (instructions, examples), computed once like the prompt;
            they are then no part of the rows. Results are those of rows that begin with them, labelled -100 there.
        shared_prefix_place: "behind" the prompt or "before" it.
        input_type_mask: (B, T) type codes of the tokens, for CPT.
        kwargs: for the base model.

    Returns:
        The base model's output. Logits and hidden states have P + T positions, but for token classification and
        question answering, whose logits have T, and whose losses are those of their logits. On the shared route they
        are joined when they are first read.

    Raises:
        RouteUnavailable: route "shared" was asked for by name and cannot run; the message says why.
        ValueError: `slots` or a tensor that goes with them has the wrong shape, dtype or (on a CPU) values.
    """

    def __init__(
        self, base_model: nn.Module, route: str = AUTO, logits: str = FULL, bank: PromptBank | None = None
    ) -> None:
        """Without adapters, the base model as it is; see `get_prompt_model`.

        Args:
            bank: the prompts that calls may name as `adapter_names`, in place of adapters. A call reads the versions
                that are there when it begins. The base model is frozen; without names a call is for it alone.
        """
        super().__init__(base_model)
        self.route, self.logits = route, logits
        if bank is not None:
            self.bank = check_bank(bank, self)
            base_model.requires_grad_(False)

    def _named(self, names: Any, route: str) -> tuple[Any, Any]:
        """The host of a call, and its `adapter_names`: of a bank, those of versions."""
        if self.bank is None or names is None:
            return self, names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names: expected a list of one name per row, got {names!r}")
        if not set(names) - {BASE}:
            return self, None
        host = BankedCall(self, self.bank, names, route)
        return host, host.names

    @property
    def route(self) -> str:
        """How prompts reach the base model, where a call does not say it: "auto", "shared" or "splice"."""
        return self._route

    @route.setter
    def route(self, route: str) -> None:
        self._route = checked_route(route)

    @property
    def logits(self) -> str:
        """Which logits of a language model calls return that do not say it: "full" or "text"."""
        return self._logits

    @logits.setter
    def logits(self, logits: str) -> None:
        check_logits(logits, None)
        self._logits = logits

    def _usual_logits(self, host: Any, slots: Any) -> str:
        """With slots labels are those of the output; other tasks' logits stand where their labels stand already."""
        in_use = host.in_use
        of_tokens = in_use is not None and host.prompts[in_use].task.predicts_next and slots is None
        return self.logits if of_tokens else FULL

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
        logits: str | None = None,
        slots: Tensor | None = None,
        pool_index: Tensor | None = None,
        fields: Mapping[str, Any] | None = None,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | Sequence[int | None] | None = None,
        shared_prefix: Tensor | None = None,
        shared_prefix_place: str = "behind",
        input_type_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model on prompt and tokens; the class says what the arguments are."""
        batch = Batch(input_ids, inputs_embeds, attention_mask, labels, position_ids, token_type_ids, input_type_mask)
        route = self.route if route is None else route
        host, adapter_names = self._named(adapter_names, self.route)
        logits = self._usual_logits(host, slots) if logits is None else logits
        own = (route, logits, slots, pool_index, fields, adapter_names, task_ids, shared_prefix, shared_prefix_place)
        call = Call(batch, kwargs, past_key_values, *own)
        return run(host, plan(host, call))

    def generate(self, inputs: Tensor | None = None, *, route: str | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prompt in front.

        Args:
            inputs: (B, T) ids, as `input_ids`; or pass `inputs_embeds` (B, T, D), and get only the new tokens.
            route: "auto", "shared" or "splice", instead of the model's own.
            kwargs: every argument of transformers' `generate`. `max_length` counts text only. `slots` (B, S) as in
                `forward`, and then `attention_mask` and `position_ids` (B, S). `adapter_names` and `task_ids` as in
                `forward`: the adapter, and the task, of each row. `shared_prefix` as in `forward`: no part of what is
                returned, nor seen by processors of logits.

        Returns:
            What `generate` returns: for decoders, ids of text and new tokens, without the prompt.
        """
        kwargs.pop("labels", None)  # Seq2SeqTrainer hands on its batch as it is
        host, kwargs["adapter_names"] = self._named(kwargs.get("adapter_names"), self.route)
        call = Call.to_generate(inputs, kwargs, self.route if route is None else route)
        with torch.no_grad():  # as transformers does: nothing here is to be trained
            return run(host, plan(host, call))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def explain(self, method: str = "forward", /, **arguments: Any) -> str:
        """How each adapter's prompt is computed and reaches the base model, and why so, a line each.

        Args:
            method: "forward" or "generate".
            arguments: of a call of that method. With them, what would be done with this batch and its adapters,
                and a picture of its first row: P a prompt row, t a token, A an anchor, · padding.
        """
        if method not in ("forward", "generate"):
            raise ValueError(f"method: expected 'forward' or 'generate', got {method!r}")
        if method == "forward" and not arguments:
            bank = [] if self.bank is None else [repr(self.bank)]
            return "\n".join(
                [*bank, *(describe_adapter(self, name) for name in self.peft_config), *first_use_line(self)]
            )
        host, arguments["adapter_names"] = self._named(arguments.get("adapter_names"), self.route)
        if method == "generate":
            return explain(host, Call.to_generate(arguments.pop("inputs", None), arguments, self.route))
        if arguments.get("logits") is None:
            arguments["logits"] = self._usual_logits(host, arguments.get("slots"))
        return explain(host, Call.of(arguments, self.route))

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        max_shard_size: Any = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Save adapters in PEFT's format: "default" into the folder itself, any other into a subfolder of its name.

        Each adapter is written whole or not at all. One that can be trained further also gets its encoder's parameters
        in prompt_encoder.safetensors, which PEFT ignores. A folder without README.md gets a model card.

        Args:
            state_dict: values of the model's parameters to save instead of its own, as gathered from all processes.
            is_main_process: False for the other ones of a distributed run, which write nothing.
            safe_serialization: True; max_shard_size: an adapter is one file.
            push_to_hub: upload them too; hub: arguments of `push_to_hub`. `repo_id` is the folder's name by default.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._check_known(name)
        if not safe_serialization:
            raise ValueError("safe_serialization: expected True, got False: adapters are safetensors files")
        if hub and not push_to_hub:
            raise TypeError(f"save_pretrained: got unexpected arguments {sorted(hub)}")
        if not is_main_process:
            return
        for name in names:
            saving.save(
                self, name, Path(save_directory) if name == "default" else Path(save_directory, name), state_dict
            )
        if not Path(save_directory, card.FILE).exists():
            card.create_or_update(self, save_directory)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, "selected_adapters": names, **hub})

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        subfolder: str | None = None,
        torch_device: torch.device | str | None = None,
        **download: Any,
    ) -> PromptModel:
        """Load an adapter saved by this package or by PEFT onto a base model.

        Args:
            path: a local folder, or the name of a repository on the Hub.
            is_trainable: continue training where it stopped. For P-tuning the folder must hold the encoder, which only
                this package saves.
            subfolder: of either.
            torch_device: where the prompt's parameters go, instead of to the base model's embeddings.
            download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and others of
                huggingface_hub, for a repository on the Hub.

        Returns:
            A model in eval mode, or with `is_trainable` in the base model's mode.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, with the file and the tensor.
            TypeError: an argument that is not known.
        """
        model: PromptModel = cls(base_model)
        model.load_adapter(path, adapter_name, is_trainable, subfolder, torch_device, **download)
        return model if is_trainable else model.eval()

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        subfolder: str | None = None,
        torch_device: torch.device | str | None = None,
        **download: Any,
    ) -> None:
        """Load an adapter; one of the same name is replaced. Nothing changes if this raises.

        Parameters that fit keep their identity, so that an optimizer goes on with them. Args and errors as in
        `from_pretrained`.
        """
        folder = checkpoint.find_folder(path, subfolder, **download)
        saving.load(self, adapter_name, folder, is_trainable)
        if torch_device is not None:
            self.prompt_encoder[adapter_name].to(torch_device)
