"""The training of a run by transformers' Trainer: from its last checkpoint on, and to its best one."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import CPTConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_prompt_model
from ...layouts.layout import IGNORE_INDEX
from ...model.prompt_model import PromptModel
from ...model.starting import initialize_kv_prefix_from_text
from .. import progress
from . import curve
from .prepare import Material, collator
from .settings import Settings, write_text

CHECKPOINTS, STATE = "checkpoints", "trainer_state.json"


def prompt_model(settings: Settings, material: Material, base: Any, tokenizer: Any) -> PromptModel:
    """The base model with the prompt that training begins with; the same for the same settings."""
    torch.manual_seed(settings.seed)
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": settings.virtual_tokens}
    text: dict[str, Any]
    config: Any
    if settings.method == "cpt":
        config = CPTConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=settings.model, **material.context)
    elif settings.method == "p-tuning":
        config = PromptEncoderConfig(**shared, encoder_reparameterization_type=settings.encoder)
    elif settings.method == "prefix":
        config = PrefixTuningConfig(**shared, init_weights="zero")
    elif settings.init_text is None:
        config = PromptTuningConfig(**shared, prompt_tuning_init="SAMPLE_VOCAB")
    else:
        text = {"prompt_tuning_init_text": settings.init_text, "tokenizer_name_or_path": settings.model}
        config = PromptTuningConfig(**shared, prompt_tuning_init="TEXT", **text)
    model = get_prompt_model(base, config)
    if settings.method == "prefix" and settings.init_text is not None:
        initialize_kv_prefix_from_text(model, tokenizer, text=settings.init_text, use_chat_template=False)
    return model


def new_trainer(settings: Settings, material: Material, model: Any, tokenizer: Any, folder: Path, cpu: bool) -> Any:
    """transformers' Trainer, which measures, writes down and saves the model after each interval."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        logging_steps=settings.interval,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.interval,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.interval,
        save_total_limit=2,  # the last and the best: with 1, Trainer removes the last in the end
        metric_for_best_model="loss",
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        seed=settings.seed,
        use_cpu=cpu,
        disable_tqdm=True,
        report_to=[],
    )

    class LossTrainer(Trainer):  # type: ignore[misc]
        """Reads nothing of an evaluation but its loss.

        Trainer reads the logits as well, and a step behind one whose logits were read makes its own (`TextHead`): it
        rounds differently from a step behind a checkpoint, and a resumed run would not be the same bit for bit.
        """

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                loss = _answers_loss(model, inputs) if settings.method == "cpt" else self.compute_loss(model, inputs)
            return loss.detach(), None, None

    trainer = LossTrainer(
        model=model,
        args=arguments,
        train_dataset=material.train,
        eval_dataset=material.held_out,
        data_collator=collator(getattr(tokenizer, "pad_token_id", None)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _answers_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over a batch's own labels: the loss of CPT counts those of its context as well."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = model(**given, logits="text").logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def loss_without_prompt(trainer: Any) -> float:
    """The held-out loss of the base model, as that of the prompt is measured."""
    with trainer.model.disable_adapter():
        return float(trainer.evaluate()["eval_loss"])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run. What was being written when the process was killed is removed.

    Trainer writes its state last, so that a checkpoint with a readable one is whole.
    """
    places = {int(place.name.rpartition("-")[2]): place for place in (folder / CHECKPOINTS).glob("checkpoint-*")}
    for step, place in sorted(places.items(), reverse=True):
        try:
            if json.loads((place / STATE).read_text(encoding="utf-8"))["global_step"] == step:
                return place
        except (OSError, ValueError, KeyError):
            pass
        shutil.rmtree(place)
    return None


def curve_at(checkpoint: Path | None) -> list[curve.Point]:
    """The intervals up to a checkpoint."""
    if checkpoint is None:
        return []
    return curve.points(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"])


def train(trainer: Any, settings: Settings, folder: Path) -> list[curve.Point]:
    """Train to the end, from the last checkpoint if there is one, and leave the model as it was at its best.

    Returns:
        All intervals.

    Raises:
        ValueError: no interval ended with a finite loss.
    """
    checkpoint = last_checkpoint(folder)
    if not curve.is_over(curve_at(checkpoint), settings.steps, settings.patience):
        from transformers import set_seed

        trainer.add_callback(_watch(settings, folder))
        set_seed(settings.seed)  # whatever was computed before
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    intervals = curve_at(last_checkpoint(folder))
    kept = curve.best(intervals)
    if kept is None:
        raise ValueError(
            f"--learning-rate: expected one with which the held-out loss stays finite, got {settings.learning_rate}"
        )
    trainer.model.load_adapter(folder / CHECKPOINTS / f"checkpoint-{kept.step}", "default", is_trainable=True)
    return intervals


def _watch(settings: Settings, folder: Path) -> Any:
    """A callback that ends a run in time, and tells about it: a line for each interval, and a bar on a terminal."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = progress.bar(total=settings.steps, initial=state.global_step, desc="tuning", unit="step")
            self.start, self.at = time.perf_counter(), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()
            if state.global_step == settings.steps:  # whose interval may be a shorter one
                control.should_log = control.should_evaluate = control.should_save = True

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            intervals = curve.points(state.log_history)
            last, now = intervals[-1], time.perf_counter()
            seconds = (now - self.start) / (last.step - self.at)
            self.bar.write(
                f"step {last.step:>{len(str(settings.steps))}}/{settings.steps}  loss {last.loss:.4f}  "
                f"held out {last.held_out:.4f}  {seconds:.2f} s/step"
            )
            self.start, self.at = now, last.step
            write_text(folder / "curve.csv", curve.as_csv(intervals))
            control.should_training_stop |= curve.is_over(intervals, settings.steps, settings.patience)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Watch()
