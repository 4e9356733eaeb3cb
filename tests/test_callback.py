"""`FusedPromptCallback`: Trainer's PEFT model on these ops and routes while it trains, and PEFT's before and after."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import fusedprompt
from fusedprompt import FusedPromptCallback
from fusedprompt.integrations import peft as integration
from fusedprompt.integrations.peft import patch_of
from models import build, config_fields
from test_tools_trainer import losses, quiet, rows_of, weights


class Witness(transformers.TrainerCallback):
    """Which methods were patched in each step; stops training by an error if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.seen = fails, list[set[str]]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        patch = next((patch_of(one) for one in model.modules() if isinstance(one, peft.PeftModel)), None)
        self.seen.append(set() if patch is None else {"forward"} & set(patch.replaced))
        if self.fails:
            raise RuntimeError("on purpose")


def peft_of(method: str, family: str = "Llama", task: str = "CAUSAL_LM") -> Any:
    name, fields = config_fields(method, task)
    base = quiet(build(family, task))
    torch.manual_seed(7)
    return peft.get_peft_model(base, getattr(peft, name)(**fields))


def make(model: Any, folder: Path, callbacks: list[Any], task: str = "CAUSAL_LM", **options: Any) -> Any:
    """A trainer that is made with its callbacks."""
    rows = rows_of(task, 16)
    usual = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    usual |= {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "report_to": []}
    arguments = transformers.TrainingArguments(**{**usual, "disable_tqdm": True, "use_cpu": True, "seed": 3, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


def told(trainer: Any) -> list[float]:
    return losses(trainer) + [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize(
    ("method", "family", "task", "options"),
    [
        ("PROMPT", "Llama", "CAUSAL_LM", {}),
        ("MLP", "Llama", "CAUSAL_LM", {"gradient_accumulation_steps": 2}),
        ("PREFIX", "Llama", "CAUSAL_LM", {}),
        ("MLP", "Llama", "CAUSAL_LM", {"bf16": True}),
        ("LSTM", "Bert", "SEQ_CLS", {"gradient_accumulation_steps": 2}),
    ],
)
def test_training_is_peft_s_and_so_is_what_is_before_and_behind_it(
    method: str, family: str, task: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, ours, witness = peft_of(method, family, task), peft_of(method, family, task), Witness()
    by_peft = make(plain, tmp_path / "plain", [], task, **options)
    by_us = make(ours, tmp_path / "ours", [FusedPromptCallback(), witness], task, **options)
    first, expected = by_us.evaluate()["eval_loss"], by_peft.evaluate()["eval_loss"]
    assert first == pytest.approx(expected, rel=1e-2 if options.get("bf16") else 1e-4)
    by_peft.train()
    by_us.train()
    assert witness.seen == [{"forward"}] * 3 and patch_of(ours) is None
    close = {"rel": 2e-2} if options.get("bf16") else {"rel": 1e-4}
    assert told(by_us) == pytest.approx(told(by_peft), **close) and len(told(by_us)) == 5
    if not options.get("bf16"):
        for name, value in weights(plain).items():
            torch.testing.assert_close(weights(ours)[name], value, rtol=2e-3, atol=1e-4)
        assert vars(ours).keys() == vars(plain).keys()
    text = capsys.readouterr().err
    assert text.count("fusedprompt on PeftModelFor") == 1 and config_name(method) in text
    assert by_us.evaluate()["eval_loss"] == pytest.approx(by_peft.evaluate()["eval_loss"], **close)
    predicted = by_us.predict(rows_of(task, 4)).predictions
    assert predicted.shape == by_peft.predict(rows_of(task, 4)).predictions.shape


def config_name(method: str) -> str:
    return {"PROMPT": "PROMPT_TUNING", "PREFIX": "PREFIX_TUNING"}.get(method, "P_TUNING")


def test_below_a_wrapper_of_accelerate_s_it_patches_again(tmp_path: Path) -> None:
    """Mixed precision puts a forward of its own into the model, around ours; it stays there between two trainings."""
    model, witness, callback = peft_of("PROMPT"), Witness(), FusedPromptCallback(report=False)
    trainer = make(model, tmp_path, [callback, witness], bf16=True)
    for _ in range(2):
        trainer.train()
        assert patch_of(model) is None and "forward" in vars(model)
    again = make(model, tmp_path, [FusedPromptCallback(report=False), witness], bf16=True)
    again.train()
    assert witness.seen == [{"forward"}] * 9


def test_a_callback_that_is_added_later_comes_in_time_unless_the_model_is_wrapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, seen in (({}, {"forward"}), ({"bf16": True}, set())):
        model, witness = peft_of("PROMPT"), Witness()
        trainer = make(model, tmp_path, [witness], **options)
        trainer.add_callback(FusedPromptCallback)
        trainer.train()
        assert witness.seen == [seen] * 3 and patch_of(model) is None
    assert "forward: another library has wrapped it; call apply before that" in capsys.readouterr().err


def test_training_that_fails_leaves_the_model_patched_for_the_next(tmp_path: Path) -> None:
    model, callback = peft_of("PROMPT"), FusedPromptCallback(report=False)
    trainer = make(model, tmp_path, [callback, Witness(fails=True)])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert patch_of(model) is callback.patch
    other = FusedPromptCallback(route="splice", report=False)
    again = make(model, tmp_path, [other])
    assert patch_of(model) is other.patch and other.patch.route == "splice"
    again.train()
    assert patch_of(model) is None
    trainer = make(model, tmp_path, [callback])
    callback.revert()
    assert patch_of(model) is None


def test_a_patch_by_hand_stays_and_an_automatic_one_gives_way(tmp_path: Path) -> None:
    model, witness, callback = peft_of("PROMPT"), Witness(), FusedPromptCallback()
    patch = fusedprompt.apply(model, route="splice")
    make(model, tmp_path, [callback, witness]).train()
    assert patch_of(model) is patch and callback.patch is None and witness.seen == [{"forward"}] * 3
    integration.enable(route="splice")
    try:
        model = peft_of("PROMPT")
    finally:
        integration.disable()
    make(model, tmp_path, [callback, witness])
    assert patch_of(model) is callback.patch and callback.patch.route == "auto"


def test_a_model_from_a_function_is_patched(tmp_path: Path) -> None:
    witness, rows = Witness(), rows_of("CAUSAL_LM")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    trainer = transformers.Trainer(
        model_init=lambda: peft_of("PROMPT"),
        args=arguments,
        train_dataset=rows,
        callbacks=[FusedPromptCallback(report=False), witness],
    )
    trainer.train()
    assert witness.seen == [{"forward"}] * 2


def test_what_cannot_be_patched_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    lora = peft.get_peft_model(build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected prompt learning, got LORA"):
        make(lora, tmp_path, [FusedPromptCallback()])
    with pytest.raises(TypeError, match=r"peft_model: expected a peft\.PeftModel"):
        make(build("Llama"), tmp_path, [FusedPromptCallback()])
    with pytest.raises(fusedprompt.BackendUnavailable):
        make(peft_of("PROMPT"), tmp_path, [FusedPromptCallback(backend="triton")])
    with pytest.raises(ValueError, match="backend: expected one of"):
        FusedPromptCallback(backend="fast")
    with pytest.raises(ValueError, match="route: expected one of"):
        FusedPromptCallback(route="long")


def test_it_is_a_callback_of_transformers_by_its_class_too(tmp_path: Path) -> None:
    callback = FusedPromptCallback(route="splice", fix=True)
    assert isinstance(callback, transformers.TrainerCallback) and isinstance(callback, FusedPromptCallback)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (copied.route, copied.fix, copied.patch) == ("splice", True, None)
    trainer = make(peft_of("PROMPT"), tmp_path, [callback])
    assert trainer.pop_callback(FusedPromptCallback) is callback
