"""Patched PEFT models in training: Trainer, checkpointing, compilation, autocast; and PEFT's defects fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fusedprompt
from models import build, pad, task_inputs, tokens
from test_apply_results import METHODS, assert_same, inputs_of, peft_model, run
from tolerance import one_thread  # noqa: F401


def trainer(model: Any, folder: Path, steps: int) -> Any:
    import transformers

    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize(
    ("method", "route"), [("PROMPT", "splice"), ("MLP", "shared"), ("LSTM", "splice"), ("CPT", "shared")]
)
def test_trainer_trains_evaluates_loads_the_best_and_resumes_as_with_peft(
    method: str, route: str, tmp_path: Path
) -> None:
    seen = {}
    for name in ("theirs", "ours"):
        model = peft_model("Llama", method=method)
        if name == "ours":
            fusedprompt.apply(model, route=route)
        trainer(model, tmp_path / name, 2).train()
        again = trainer(model, tmp_path / name, 4)
        again.train(resume_from_checkpoint=True)
        seen[name] = [
            entry[key]
            for entry in again.state.log_history
            for key in ("loss", "eval_loss", "grad_norm")
            if key in entry
        ]
        assert again.state.global_step == 4 and again.state.best_model_checkpoint is not None
    assert seen["ours"] == pytest.approx(seen["theirs"], rel=1e-4)
    assert len(seen["ours"]) >= 10


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_what_peft_gives(method: str) -> None:
    model, inputs = peft_model("Llama", method=method).double().train(), inputs_of("CAUSAL_LM")
    model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.base_model.enable_input_require_grads()
    expected = run(model, inputs)
    with fusedprompt.apply(model) as patch:
        assert_same(run(model, inputs), expected)
        assert not patch.refused


@pytest.mark.parametrize("method", ["MLP", "CPT"])
def test_autocast_gives_what_peft_gives(method: str) -> None:
    model, inputs = peft_model("Llama", method=method), inputs_of("CAUSAL_LM")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs)
        with fusedprompt.apply(model, route="splice"):
            actual = model(**inputs)
    assert actual.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss.float(), expected.loss.float(), rtol=0.02, atol=0)


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM"])
def test_a_compiled_patched_model_gives_what_it_gives_uncompiled(method: str) -> None:
    model, inputs = peft_model("Llama", method=method), inputs_of("CAUSAL_LM")
    expected = run(model, inputs)
    with fusedprompt.apply(model, route="splice"):
        compiled = torch.compile(model, backend="aot_eager")
        loss = compiled(**inputs).loss
        gradients = torch.autograd.grad(loss, [model.prompt_encoder["default"].embedding.weight])
    torch.testing.assert_close(loss, expected["loss"])
    torch.testing.assert_close(
        gradients[0], expected["d loss / d prompt_encoder.default.embedding.weight"], rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_may_prepare_a_patched_model(precision: str) -> None:
    import accelerate

    seen = []
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for patched in (False, True):
        model, inputs = peft_model("Llama", method="MLP").train(), inputs_of("CAUSAL_LM")
        patch = fusedprompt.apply(model, route="splice") if patched else None
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(model.prompt_encoder.parameters(), lr=1.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(2):
            output = model(**inputs)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        seen.append({"loss": output.loss.detach(), "logits": output.logits.detach()})
        if patch is not None:
            patch.revert()
            torch.testing.assert_close(model(**inputs).logits, accelerator.unwrap_model(model)(**inputs).logits)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it is for one precision a process
    if precision == "no":
        assert_same(seen[1], seen[0], exact=True)
    else:  # PEFT sums the rows' gradients in bf16
        torch.testing.assert_close(seen[1]["loss"], seen[0]["loss"], rtol=1e-3, atol=0)


def test_dropout_of_the_encoder_draws_what_peft_draws() -> None:
    import peft

    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=24,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.5,
    )
    model, inputs = peft.get_peft_model(build("Llama"), config).train(), inputs_of("CAUSAL_LM")
    torch.manual_seed(3)
    expected = model(**inputs).loss
    with fusedprompt.apply(model):
        torch.manual_seed(3)
        torch.testing.assert_close(model(**inputs).loss, expected)
        saved = model.get_prompt_embedding_to_save("default")
        assert not torch.equal(model.get_prompt_embedding_to_save("default"), saved)  # PEFT's defect, kept
    with fusedprompt.apply(model, fix=True):
        saved = model.get_prompt_embedding_to_save("default")
        assert torch.equal(model.get_prompt_embedding_to_save("default"), saved)
        assert model.prompt_encoder["default"].lstm_head.training
        torch.testing.assert_close(saved, model.eval().get_prompt(1)[0].detach())


def test_fix_makes_padding_change_nothing_in_forward_and_generate() -> None:
    model, ids = peft_model("GPT2", method="MLP"), tokens(2)
    padded, mask = pad(ids, 3, 0)
    options = {"max_new_tokens": 5, "pad_token_id": 0}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, 7:]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        kept = model(input_ids=padded, attention_mask=mask).logits[:, -1]
        assert not torch.allclose(kept, expected, atol=1e-3)
        with fusedprompt.apply(model, fix=True) as patch:
            fixed = model(input_ids=padded, attention_mask=mask).logits[:, -1]
            text = model.generate(input_ids=padded, attention_mask=mask, **options)[:, 10:]
            assert "corrected:" in str(patch) and "left padding" in str(patch).split("corrected:")[1]
            with model.disable_adapter():
                plain = model.generate(input_ids=ids, **options)
    torch.testing.assert_close(fixed, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(text, alone)
    assert torch.equal(plain, model.base_model.generate(input_ids=ids, **options))


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS"])
def test_fix_corrects_labels_positions_and_pooling(task: str, family: str) -> None:
    model, ids = peft_model(family, task, "MLP"), tokens()
    padded, mask = pad(ids, 0, 3)
    alone, inputs = task_inputs(task, ids), task_inputs(task, padded, mask)
    for name in ("start_positions", "end_positions"):
        if name in alone:
            inputs[name] = alone[name]
    if task == "TOKEN_CLS":
        inputs["labels"] = torch.nn.functional.pad(alone["labels"], (0, 3), value=-100)
        with pytest.raises(ValueError, match="batch_size"):
            model(**alone)
    with fusedprompt.apply(model, fix=True) as patch:
        expected, actual = model(**alone), model(**inputs)
        assert "corrected:" in str(patch)
    name = "start_logits" if task == "QUESTION_ANS" else "logits"
    if task != "QUESTION_ANS":  # its loss is over all positions, padding too
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=1e-5)
    found = actual[name] if task == "SEQ_CLS" else actual[name][:, :7]
    torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["MLP", "CPT"])
def test_fix_makes_load_adapter_into_a_live_model_give_the_saved_prompt(method: str, tmp_path: Path) -> None:
    model, inputs = peft_model("Llama", method=method), inputs_of("CAUSAL_LM")
    expected = model(**inputs).logits.detach()
    model.save_pretrained(tmp_path)
    with fusedprompt.apply(model, fix=True):
        assert model.load_adapter(str(tmp_path), "default") is not None
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "again")
    first, again = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_fix_reads_each_context_s_own_settings_and_leaves_the_mask_alone() -> None:
    import peft

    from models import CPT_FIELDS

    model = peft.get_peft_model(build("Llama"), peft.CPTConfig(task_type="CAUSAL_LM", **CPT_FIELDS), "named")
    inputs = inputs_of("CAUSAL_LM")
    kinds = torch.full_like(inputs["labels"], 4)
    with fusedprompt.apply(model) as patch:
        with pytest.raises(KeyError, match="default"):
            model(**inputs)
        assert "adapter named 'default'" in patch.report()
    with fusedprompt.apply(model, fix=True):
        assert model(**inputs, input_type_mask=kinds).loss.isfinite()
    assert torch.equal(kinds, torch.full_like(kinds, 4))


def test_cpt_dispatches_a_fifth_of_peft_s_operators() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def count(call: Any) -> int:
        with Count() as counter:
            call()
        return len(counter.names)

    model, ids = peft_model("Llama", method="CPT"), tokens(4)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    embeds = torch.zeros(4, 15, 32)
    base = count(lambda: model.base_model(inputs_embeds=embeds, attention_mask=torch.ones(4, 15)))
    theirs = count(lambda: model(**inputs)) - base
    with fusedprompt.apply(model, route="splice"):
        ours = count(lambda: model(**inputs)) - base
    assert ours * 5 <= theirs, (ours, theirs)
