"""What transformers, accelerate, PEFT and TRL ask of a model, answered for the model with its prompts."""

from __future__ import annotations

import functools
import inspect
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from ..base.facts import transformers_model
from ..layouts.parts import Field
from ..layouts.prompt import Prompt
from ..methods import method_of
from . import card, trainer
from .adapters import PromptAdapters


class Citizen(PromptAdapters):
    """A model that tools take for what it is; docs/tools.md has a table of what each of them reads."""

    @property
    def device(self) -> torch.device:
        """Where inputs go: that of the input embeddings."""
        return self.prompt_device

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings and logits: the base model's. Prompts are trained in fp32, whatever it is."""
        dtype: torch.dtype = self.base_model.dtype
        return dtype

    @property
    def active_adapters(self) -> list[str]:
        """The adapter in use, as a list, as PEFT has it."""
        return [] if self.active_adapter is None else [self.active_adapter]

    @property
    def _hf_peft_config_loaded(self) -> bool:
        # Trainer trains a quantised model only where something else is there to be trained.
        return bool(self.peft_config)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether losses are divided by `num_items_in_batch`, where it is given; else they are means over their batch.

        Trainer asks for it when it is made, which is the moment to make it know prompt models (model/trainer.py).
        """
        trainer.extend()
        if self.in_use is not None and method_of(self.active_config).targets is not None:
            return False
        base = transformers_model(self.base_model) or self.base_model
        return bool(getattr(base, "accepts_loss_kwargs", True)) and _divides_by_items(type(base).forward)

    @property
    def loss_type(self) -> str | None:
        """transformers' name of the base model's loss; None where the prompt predicts the first label of each row.

        By the name Trainer knows whether to leave that label out when it counts `num_items_in_batch`.
        """
        kind: str | None = getattr(self.base_model, "loss_type", None)
        prompt = None if self.in_use is None else self.prompts[self.in_use]
        return None if prompt is not None and prompt.task.predicts_next and _precedes_text(prompt) else kind

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a model card, README.md, or complete the metadata of the one that is there."""
        card.create_or_update(self, output_dir)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        selected_adapters: Sequence[str] | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | None = None,
    ) -> Any:
        """Upload adapters to the Hugging Face Hub, as `save_pretrained` saves them; the base model stays where it is.

        A model card that the repository has already is left as it is.

        Args:
            repo_id: the repository; it is made if there is none.
            tags: further ones, for a new model card.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(token=token)
        try:
            repo_id, known = api.create_repo(repo_id, private=private).repo_id, False
        except HfHubHTTPError:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            known = api.file_exists(repo_id, card.FILE, revision=revision)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, selected_adapters)
            if tags:
                card.create_or_update(self, folder, tags)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload a prompt",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=[card.FILE] if known else None,
            )

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        raise NotImplementedError


def _precedes_text(prompt: Prompt) -> bool:
    pattern = prompt.pattern
    return not prompt.start and (pattern is None or not isinstance(pattern.parts[0], Field))


_CALL = re.compile(r"loss_function\((?:[^()]|\([^()]*\))*\*\*\w+")


@functools.cache
def _divides_by_items(forward: Any) -> bool:
    """Whether a model's forward hands further arguments to transformers' loss functions, which then divide by them.

    Many take such arguments, for their attention, and compute a mean all the same.
    """
    try:
        return _CALL.search(inspect.getsource(inspect.unwrap(forward))) is not None
    except OSError:  # there is no source
        return False
