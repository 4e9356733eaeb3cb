"""transformers' Trainer, extended: it knows prompt models.

Trainer saves the adapters of what is an instance of `PeftModel`, and the whole state of anything else; a prompt model
is no `PeftModel`, and the checks are in the middle of its methods. So five of them are replaced on its class. They
serve trainers of prompt models; all others get the original.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..base.outputs import replaced
from ..layouts.layout import IGNORE_INDEX
from ..methods import checkpoint
from ..methods.config import CONFIG_NAME
from ..routes.call import FULL, TEXT, Call
from ..routes.plan import plan
from .adapters import PromptAdapters

_ORIGINAL = "_fusedprompt_original"


def extend() -> None:
    """Replace the methods, if Trainer has been imported. A second call does nothing."""
    module = sys.modules.get("transformers.trainer")
    if module is None or not hasattr(module, "Trainer"):
        return
    for ours in (_save, _load_from_checkpoint, _load_best_model, _push_from_checkpoint, compute_loss):
        original = getattr(module.Trainer, ours.__name__, None)
        if original is not None and not hasattr(original, _ORIGINAL):
            setattr(module.Trainer, ours.__name__, _for_prompt_models(original, ours))
    for name in [name for name in sys.modules if name.startswith("trl.")]:
        original = vars(sys.modules[name]).get("add_fused_lm_head")
        if original is not None and not hasattr(original, _ORIGINAL):
            vars(sys.modules[name])["add_fused_lm_head"] = _for_base_models(original)


def _for_prompt_models(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = _unwrapped(self.model)
        if not isinstance(model, PromptAdapters):
            return original(self, *args, **kwargs)
        return ours(self, model, functools.partial(original, self), *args, **kwargs)

    setattr(method, _ORIGINAL, original)
    return method


def _for_base_models(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's trainers put a head of their own into a model, of a `PeftModel` into its base model, where it belongs."""

    @functools.wraps(original)
    def add(model: Any, *args: Any, **kwargs: Any) -> Any:
        return original(model.base_model if isinstance(model, PromptAdapters) else model, *args, **kwargs)

    setattr(add, _ORIGINAL, original)
    return add


def _unwrapped(model: Any) -> Any:
    """Without torch.compile's wrapper."""
    return vars(model)["_modules"].get("_orig_mod", model) if isinstance(model, nn.Module) else model


def _is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def _save(trainer: Any, model: Any, original: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
    """Adapters, tokenizer and arguments: what Trainer saves of a model that saves itself."""
    if not trainer.args.should_save:
        return
    folder = trainer.args.output_dir if output_dir is None else output_dir
    model.save_pretrained(folder, state_dict=state_dict)
    processing: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processing is not None:
        processing.save_pretrained(folder)
    torch.save(trainer.args, os.path.join(folder, "training_args.bin"))


def _load_from_checkpoint(
    trainer: Any, model: Any, original: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any
) -> None:
    """All adapters of a checkpoint, to be trained on if they are trained now."""
    folder = Path(resume_from_checkpoint)
    if _is_sharded(trainer) or not _load(model, folder):
        original(resume_from_checkpoint, *args, **kwargs)


def _load_best_model(trainer: Any, model: Any, original: Any) -> None:
    if _is_sharded(trainer) or not _load(model, Path(trainer.state.best_model_checkpoint)):
        original()


def _load(model: Any, folder: Path) -> bool:
    """Load a checkpoint's adapters in place of those of the same names; False if it has none."""
    places = {name: folder if name == "default" else folder / name for name in model.peft_config}
    found = {name: place for name, place in places.items() if checkpoint.stored(place, CONFIG_NAME).is_file()}
    trained = {name: not model.peft_config[name].inference_mode for name in found}
    for name, place in found.items():
        model.load_adapter(place, name, is_trainable=trained[name])
    return bool(found)


def _push_from_checkpoint(trainer: Any, model: Any, original: Any, checkpoint_folder: str) -> Any:
    """With our files beside those that Trainer copies into the folder that it uploads."""
    if trainer.is_world_process_zero():
        for name in (CONFIG_NAME, checkpoint.ADAPTER_NAME, checkpoint.ENCODER_NAME, checkpoint.TEMPLATE_NAME):
            if Path(checkpoint_folder, name).is_file():
                shutil.copy(Path(checkpoint_folder, name), Path(trainer.args.output_dir, name))
    return original(checkpoint_folder)


def compute_loss(
    trainer: Any, model: Any, original: Any, wrapped: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
) -> Any:
    """Label smoothing, which Trainer makes of logits and labels: labels go where the logits of prompt and text are.

    Every label counts that counts in the model's own loss, the first one as it is predicted by the prompt.
    """
    smooths = trainer.label_smoother is not None and getattr(trainer, "compute_loss_func", None) is None
    task = None if model.in_use is None else model.prompts[model.in_use].task
    if not smooths or inputs.get("labels") is None or task is None or not task.predicts_next:
        return original(wrapped, inputs, return_outputs, **kwargs)
    planned = plan(model, Call.of({**inputs, "logits": FULL}, model.route))
    labels, layout = inputs["labels"], None if inputs.get("slots") is not None else planned.layout
    (size, length), given = labels.shape, inputs.get("logits")
    placed = labels if layout is None else layout.fill(labels, IGNORE_INDEX)
    following = F.pad(placed[:, 1:], (0, 1), value=IGNORE_INDEX)
    if not _is_shifted(trainer.accelerator.unwrap_model(wrapped)):
        placed = following
    inputs.update(labels=placed, logits=FULL)
    loss, output = original(wrapped, inputs, True, **kwargs)
    del inputs["logits"]
    items = kwargs.get("num_items_in_batch")
    if items is not None and trainer.model_accepts_loss_kwargs and not _divides_by_items(trainer.label_smoother):
        loss = loss * (following != IGNORE_INDEX).sum() / items
    if return_outputs and layout is not None and (given or model.logits) == TEXT:
        columns = layout.token_positions(size, length, output.logits.device)
        rows = torch.arange(size, device=output.logits.device).unsqueeze(1)
        output = replaced(output, logits=output.logits[rows, columns])
    return (loss, output) if return_outputs else loss


def _divides_by_items(smoother: Any) -> bool:
    """Before transformers 5.15 a smoothed loss is the mean of its batch, which Trainer takes for a part of all."""
    return "num_items_in_batch" in inspect.signature(smoother.__call__).parameters


def _is_shifted(model: Any) -> bool:
    """Whether Trainer moves labels by one before it smooths them: it goes by the name of the model's class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
