"""transformers' Trainer with a prompt model: checkpoints, columns, labels, counted items, the hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

import fusedprompt
from models import build, config_fields, ours, tokens
from word_tokenizers import word_tokenizer

NAMES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def rows_of(task: str, count: int = 8) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, ids in enumerate(tokens(count)):
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task == "QUESTION_ANS":
            row |= {"start_positions": index % 3, "end_positions": 3 + index % 3}
        elif task == "SEQ_CLS":
            row["labels"] = index % 3
        elif task == "TOKEN_CLS":
            row["labels"] = ids % 3
        else:
            row["labels"] = ids
        rows.append(row)
    return rows


def trainer_of(model: Any, folder: Path, rows: Any, **options: Any) -> Any:
    usual = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    more = {name: options.pop(name) for name in ("compute_metrics", "data_collator") if name in options}
    arguments = transformers.TrainingArguments(**{**usual, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, **more)


def quiet(model: Any) -> Any:
    """Without dropout, for steps that are compared."""
    for part in model.modules():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or isinstance(part, torch.nn.Dropout)):
                setattr(part, name, 0.0)
    return model


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["PROMPT", "MLP", "CPT"])
def test_a_checkpoint_holds_the_adapter_alone(method: str, tied: bool, tmp_path: Path) -> None:
    model = ours("Llama", method=method, tie_word_embeddings=tied)
    trainer_of(model, tmp_path, rows_of("CAUSAL_LM"), save_strategy="steps", save_steps=1).train()
    for step in (1, 2):
        names = {file.name for file in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert names >= NAMES and "model.safetensors" not in names
        assert ("prompt_encoder.safetensors" in names) == (method != "PROMPT")
    loaded = fusedprompt.PromptModel.from_pretrained(
        build("Llama", tie_word_embeddings=tied), tmp_path / "checkpoint-2"
    )
    assert torch.equal(loaded.prompt_rows(), model.prompt_rows())


@pytest.mark.parametrize(("family", "task", "method"), [("Llama", "CAUSAL_LM", "MLP"), ("Bert", "SEQ_CLS", "PROMPT")])
def test_resumed_training_ends_where_it_would_have(family: str, task: str, method: str, tmp_path: Path) -> None:
    rows, ends = rows_of(task), []
    for stops in ((4,), (2, 4)):
        folder = tmp_path / str(len(stops))
        for index, stop in enumerate(stops):
            model = ours(family, task, method, seed=7 + index)  # resumed from the file, not from its start
            options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
            trainer = trainer_of(model, folder, rows, **options)
            trainer.add_callback(_StopAt(stop))
            trainer.train(resume_from_checkpoint=bool(index))
        ends.append(weights(model))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("method", ["MLP", "PROMPT"])
def test_the_best_model_is_loaded_and_can_be_trained_on(method: str, tmp_path: Path) -> None:
    model, seen = ours("Llama", method=method, tie_word_embeddings=True), []

    def worse_and_worse(prediction: Any) -> dict[str, float]:
        seen.append(model.prompt_rows().detach().clone())
        return {"score": -float(len(seen))}

    trainer = trainer_of(
        model,
        tmp_path,
        rows_of("CAUSAL_LM"),
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=worse_and_worse,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert torch.equal(model.prompt_rows(), seen[0]) and not torch.equal(seen[0], seen[2])
    assert weights(model) and model.active_config.inference_mode is False


def test_all_adapters_are_resumed_and_an_optimizer_keeps_its_parameters(tmp_path: Path) -> None:
    model = ours("Llama", method="MLP")
    name, fields = config_fields("PROMPT", rows=6)
    model.add_adapter("other", getattr(fusedprompt, name)(**fields))
    rows = rows_of("CAUSAL_LM")
    trainer_of(model, tmp_path, rows, save_strategy="steps", save_steps=1, max_steps=1).train()
    expected = {name: model.get_prompt_embedding_to_save(name) for name in ("default", "other")}
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.add_(1)
    before = dict(model.named_parameters())
    trainer_of(model, tmp_path, rows, max_steps=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, prompt in expected.items():
        assert torch.equal(model.get_prompt_embedding_to_save(name), prompt)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "task", "column"),
    [
        ("Bert", "QUESTION_ANS", "start_positions"),
        ("T5", "SEQ_2_SEQ_LM", "decoder_input_ids"),
        ("Llama", "CAUSAL_LM", "input_type_mask"),
        ("Bert", "TOKEN_CLS", "token_type_ids"),
    ],
)
def test_columns_of_the_task_s_own_forward_are_kept(family: str, task: str, column: str, tmp_path: Path) -> None:
    rows = rows_of(task)
    for row in rows:
        row |= {"noise": 3, column: row.get(column, row["input_ids"] % 2)}
    seen = []
    for keep in (True, False):
        model = ours(family, task, "CPT" if column == "input_type_mask" else "PROMPT")
        if not keep:
            for row in rows:
                row.pop("noise", None)
        trainer = trainer_of(model, tmp_path, rows, remove_unused_columns=keep)
        trainer.train()
        seen.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("pattern", [None, "[prompt 4] [text]", "[prompt 2] [text] [prompt 2]"])
@pytest.mark.parametrize("logits", ["full", "text"])
@pytest.mark.parametrize("padded", [False, True])
def test_label_smoothing_is_of_next_tokens(pattern: str | None, logits: str, padded: bool, tmp_path: Path) -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(build("Llama"), config, template=pattern, logits=logits)
    rows = rows_of("CAUSAL_LM", 4)
    if padded:
        for row in rows[::2]:
            row["attention_mask"] = torch.tensor([0, 0, 1, 1, 1, 1, 1])
            row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, -100)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    kept = batch["labels"]
    shapes = []

    def shapes_of(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {}

    options = {"label_smoothing_factor": 0.1, "max_steps": 1, "compute_metrics": shapes_of}
    trainer = trainer_of(model, tmp_path, rows, **options)
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        # The model's own loss counts the same labels: its mean, without smoothing, is that of these rows.
        output = model(**{**batch, "labels": kept}, logits="full")
        rows_of_labels, total, count = [], 0.0, 0
        for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], kept):
            text = row[mask.bool()][None]
            alone = model(input_ids=text, labels=labels[mask.bool()][None], logits="full")
            start = 4 if pattern != "[prompt 2] [text] [prompt 2]" else 2
            predicting = alone.logits[0, start - 1 : start - 1 + text.shape[1]]
            total += float(F.cross_entropy(predicting, text[0], label_smoothing=0.1, reduction="sum"))
            count += text.shape[1]
            rows_of_labels.append(alone)
    assert found == pytest.approx(total / count, rel=1e-4)
    assert output.loss.isfinite()
    width = 7 if logits == "text" else 11
    assert shapes == [((4, width), (4, 7))]
    trainer.train()
    assert losses(trainer) == pytest.approx([total / count], rel=1e-4)


def test_label_smoothing_of_a_rendered_template_is_of_next_tokens(tmp_path: Path) -> None:
    template = fusedprompt.Template.parse("[prompt 2] [text] [prompt 2]")
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(build("Llama"), config, template=template)
    collate = fusedprompt.TemplateCollator(template, loss=["text"])
    rows = [{"text": [5 + i, 6, 7, 8 + i]} for i in range(4)]
    options = {"label_smoothing_factor": 0.1, "remove_unused_columns": False, "data_collator": collate}
    trainer = trainer_of(model, tmp_path, rows, **options)
    batch = dict(collate(rows))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("slots", [False, True])
def test_metrics_get_predictions_at_the_labels_by_a_setting_of_the_model(slots: bool, tmp_path: Path) -> None:
    template = fusedprompt.Template.parse("[prompt 2] [text] [prompt 2]") if slots else None
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(build("Llama"), config, template=template)
    model.logits = "text"
    collate = None if template is None else fusedprompt.TemplateCollator(template, loss=["text"])
    rows: Any = [{"text": [5, 6, 7, 8]}] * 4 if slots else rows_of("CAUSAL_LM", 4)
    seen = []

    def accuracy(prediction: Any) -> dict[str, float]:
        best = prediction.predictions.argmax(-1)
        assert best.shape == prediction.label_ids.shape
        seen.append(best)
        return {"accuracy": float((best[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    options = {"compute_metrics": accuracy, "remove_unused_columns": False, "data_collator": collate}
    trainer = trainer_of(model, tmp_path, rows, **options)
    assert "eval_accuracy" in trainer.evaluate()
    if not slots:
        with torch.no_grad():
            full = model(input_ids=torch.stack([row["input_ids"] for row in rows]), logits="full").logits
        assert (torch.from_numpy(seen[0]) == full[:, 4:].argmax(-1)).all()


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("Llama", "CAUSAL_LM"),
        ("GPT2", "CAUSAL_LM"),
        ("OPT", "CAUSAL_LM"),
        ("T5", "SEQ_2_SEQ_LM"),
        ("Bart", "SEQ_2_SEQ_LM"),
        ("Bert", "SEQ_CLS"),
        ("Llama", "SEQ_CLS"),
        ("Roberta", "TOKEN_CLS"),
        ("Bert", "QUESTION_ANS"),
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(family: str, task: str, tmp_path: Path) -> None:
    rows, seen = rows_of(task, 4), []
    for size, steps in ((4, 1), (2, 2)):
        model = quiet(ours(family, task))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = trainer_of(model, tmp_path, rows, optim="sgd", max_grad_norm=0.0, **options)
        before = model.prompt_rows().detach().clone()
        trainer.train()
        seen.append((losses(trainer)[0], model.prompt_rows().detach() - before, trainer.evaluate()["eval_loss"]))
    whole, parts = seen
    assert whole[0] == pytest.approx(parts[0], rel=1e-4)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        model = ours(family, task)
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        assert whole[0] == pytest.approx(float(model(**batch).loss), rel=1e-4)  # Trainer counts the labels that count


def test_accumulated_gradients_of_smoothed_labels_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    rows, seen = rows_of("CAUSAL_LM", 4), []
    rows[0]["labels"] = rows[0]["labels"].masked_fill(torch.arange(7) < 4, -100)
    for size, steps in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = trainer_of(ours("Llama"), tmp_path, rows, label_smoothing_factor=0.1, **options)
        trainer.train()
        seen.append(losses(trainer)[0])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_accumulated_gradients_of_cpt_are_means_of_its_own_loss(tmp_path: Path) -> None:
    rows, seen = rows_of("CAUSAL_LM", 4), []
    for row in rows:
        row["input_type_mask"] = torch.full_like(row["input_ids"], 4)
    for size, steps in ((4, 1), (2, 2)):
        model = ours("Llama", method="CPT")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = trainer_of(model, tmp_path, rows, **options)
        trainer.train()
        seen.append(losses(trainer)[0])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_seq2seq_trainer_generates_by_its_own_settings_and_smooths(tmp_path: Path) -> None:
    model, shapes = ours("T5", "SEQ_2_SEQ_LM"), []

    def shape_of(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=3, min_new_tokens=3, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1
        ),
        label_smoothing_factor=0.1,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = [{"input_ids": row.tolist(), "labels": row[:4].tolist()} for row in tokens(4)]
    collate = transformers.DataCollatorForSeq2Seq(word_tokenizer("gpt2"), model=model)
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        compute_metrics=shape_of,
    )
    trainer.train()
    batch = dict(collate(rows))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = quiet(model).eval()(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert shapes[0][1] >= 4 and model.base_model.generation_config.max_new_tokens == 3


def test_a_quantised_base_is_trained(tmp_path: Path) -> None:
    base = build("Llama")
    base.is_quantized, base.hf_quantizer = True, type("Q", (), {"is_trainable": True, "is_qat_trainable": False})()
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = trainer_of(fusedprompt.get_prompt_model(base, config), tmp_path, rows_of("CAUSAL_LM"))
    assert trainer.train().training_loss > 0


def test_trainers_of_other_models_are_as_they_were(tmp_path: Path) -> None:
    trainer_of(ours("Llama"), tmp_path / "ours", rows_of("CAUSAL_LM"))
    base = build("Llama", tie_word_embeddings=True)
    trainer_of(base, tmp_path, rows_of("CAUSAL_LM"), save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_push_to_hub_of_trainer_uploads_the_adapter_and_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, Any]] = []

    def upload_folder(self: Any, **kwargs: Any) -> Any:
        files = {file.name: file.read_bytes() for file in Path(kwargs["folder_path"]).iterdir() if file.is_file()}
        uploads.append({**kwargs, "files": files})

    import huggingface_hub

    def create_repo(self: Any, name: str, **kwargs: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    for function in (create_repo, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
        if hasattr(transformers.trainer, function.__name__):  # transformers 4
            monkeypatch.setattr(f"transformers.trainer.{function.__name__}", functools.partial(function, None))
    model = ours("Llama", method="MLP", tie_word_embeddings=True)
    trainer = trainer_of(model, tmp_path / "prompts", rows_of("CAUSAL_LM"), hub_model_id="me/prompts", max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    files = uploads[0]["files"]
    assert NAMES | {"prompt_encoder.safetensors"} <= set(files) and "model.safetensors" not in files
    assert b"library_name: peft" in files["README.md"]
