"""Adapters on disk: PEFT's format in both directions, atomic writes, and errors that name the file and the tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import fusedprompt
from fusedprompt.methods import checkpoint
from models import build, config_fields, ours, pair, task_inputs, tokens

TASKS = [
    ("Llama", "CAUSAL_LM"),
    ("GPT2", "CAUSAL_LM"),
    ("T5", "SEQ_2_SEQ_LM"),
    ("Bart", "SEQ_2_SEQ_LM"),
    ("Bert", "SEQ_CLS"),
    ("Llama", "SEQ_CLS"),
    ("Roberta", "TOKEN_CLS"),
    ("Bert", "QUESTION_ANS"),
    ("Bert", "FEATURE_EXTRACTION"),
]
CASES = [(family, task, method) for family, task in TASKS for method in ("PROMPT", "MLP", "LSTM")]
CASES += [("Llama", "CAUSAL_LM", "CPT"), ("GPT2", "CAUSAL_LM", "CPT")]
OUTPUT = {"QUESTION_ANS": "start_logits", "FEATURE_EXTRACTION": "last_hidden_state"}


def output(model: Any, task: str) -> torch.Tensor:
    """Outputs at the tokens, without labels (PEFT's token classification fails with them)."""
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    if task == "SEQ_2_SEQ_LM":
        inputs["labels"] = tokens(3, 5)
    with torch.no_grad():
        values = model(**inputs)[OUTPUT.get(task, "logits")]
    return values[:, -7:] if task in ("TOKEN_CLS", "QUESTION_ANS") else values


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_either_side_loads_what_the_other_saved(family: str, task: str, method: str, tmp_path: Path) -> None:
    theirs, mine = pair(family, task, method)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded: dict[tuple[str, str], Any] = {}
    for side in ("mine", "theirs"):
        loaded["peft", side] = peft.PeftModel.from_pretrained(build(family, task), str(tmp_path / side))
        loaded["ours", side] = fusedprompt.PromptModel.from_pretrained(build(family, task), tmp_path / side)
    assert torch.equal(output(loaded["ours", "mine"], task), output(mine, task))
    for side in ("mine", "theirs"):
        # In fp64, so that rounding inside the base model does not hide a difference.
        expected, found = (output(loaded[reader, side].double(), task) for reader in ("peft", "ours"))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    found, wanted = (
        safetensors.torch.load_file(str(tmp_path / side / "adapter_model.safetensors")) for side in ("mine", "theirs")
    )
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_the_saved_prompt_is_bitwise_the_one_of_training(method: str, tmp_path: Path) -> None:
    model = ours("Llama", method=method).train()
    trained = model.prompt_rows().detach()
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(str(tmp_path / "adapter_model.safetensors"))["prompt_embeddings"]
    assert torch.equal(saved, trained)


def test_a_half_precision_model_saves_its_dtype_and_loads_in_fp32(tmp_path: Path) -> None:
    model = ours("Llama", method="LSTM").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(str(tmp_path / "adapter_model.safetensors"))["prompt_embeddings"]
    assert saved.dtype == torch.bfloat16
    loaded = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    assert loaded.prompt_rows().dtype == torch.float32 and torch.equal(loaded.prompt_rows(), saved.float())
    resumed = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)
    assert torch.equal(resumed.prompt_rows(), saved)


def test_several_adapters_go_to_folders_of_their_names_as_in_peft(tmp_path: Path) -> None:
    model = ours("Llama", method="MLP")
    name, fields = config_fields("PROMPT", rows=6)
    model.add_adapter("other", getattr(fusedprompt, name)(**fields))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other",
        "prompt_encoder.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(build("Llama"), str(tmp_path))
    loaded.delete_adapter("default")  # PEFT refuses two methods in one model
    again = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    again.load_adapter(tmp_path / "other", "second")
    again.load_adapter(tmp_path, "third", subfolder="other")
    model.set_adapter("other")
    for adapter in ("second", "third"):
        again.set_adapter(adapter)
        assert torch.equal(output(again, "CAUSAL_LM"), output(model, "CAUSAL_LM"))
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["other"])
    assert sorted(p.name for p in (tmp_path / "chosen").iterdir()) == ["README.md", "other"]
    with pytest.raises(ValueError, match="adapter_name: expected one of"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["nobody"])
    assert not (tmp_path / "none").exists()


def test_a_text_prompt_loads_without_its_tokenizer(tmp_path: Path) -> None:
    ours("Llama").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/nowhere"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    for trainable in (False, True):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=trainable)


def test_cpt_from_peft_can_be_trained_further(tmp_path: Path) -> None:
    theirs, _ = pair("Llama", "CAUSAL_LM", "CPT")
    theirs.save_pretrained(str(tmp_path))
    resumed = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)
    torch.testing.assert_close(output(resumed, "CAUSAL_LM"), output(theirs, "CAUSAL_LM"))
    encoder = resumed.prompt_encoder["default"]
    wanted = theirs.prompt_encoder["default"].get_projection()
    torch.testing.assert_close(encoder.delta_embedding.weight.detach(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["MLP", "LSTM"])
def test_p_tuning_from_peft_cannot_be_trained_further_and_says_why(method: str, tmp_path: Path) -> None:
    theirs, _ = pair("Llama", "CAUSAL_LM", method)
    theirs.save_pretrained(str(tmp_path))
    base = build("Llama")
    with pytest.raises(ValueError, match="PEFT saves only what the encoder computed"):
        fusedprompt.PromptModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in base.parameters())


def test_an_encoder_that_is_not_the_prompts_is_refused(tmp_path: Path) -> None:
    """PEFT saved over the folder: prompt_encoder.safetensors is that of the old prompt."""
    theirs, mine = pair("Llama", "CAUSAL_LM", "MLP")
    mine.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.add_(1)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"prompt_encoder.safetensors: expected the encoder of the prompt"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)
    fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)


def test_saving_for_inference_removes_the_encoder_of_the_adapter_before(tmp_path: Path) -> None:
    ours("Llama", method="MLP").save_pretrained(tmp_path)
    fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path).save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_encoder.safetensors").exists()


class Crash(BaseException):
    """A process that dies."""


def _crash(*_: Any, **__: Any) -> None:
    raise Crash


def _crash_on_call(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    original, calls = getattr(module, name), [0]

    def crashing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, crashing)


CRASHES = [
    (safetensors.torch, "save_file", 1, "old"),
    (safetensors.torch, "save_file", 2, "old"),
    (os, "fsync", 1, "old"),
    (os, "fsync", 3, "old"),
    (os, "rename", 1, "old"),
    (os, "replace", 1, "new"),
    (os, "replace", 2, "new"),
    (os, "replace", 3, "new"),
]


@pytest.mark.parametrize(
    ("module", "name", "call", "whole"), CRASHES, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_crash_at_any_moment_of_saving_leaves_one_whole_adapter(
    module: Any, name: str, call: int, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ours("Llama", method="MLP"), ours("Llama", method="MLP", rows=6)
    old.save_pretrained(tmp_path)
    with monkeypatch.context() as patched:
        _crash_on_call(patched, module, name, call)
        with pytest.raises(Crash):
            new.save_pretrained(tmp_path)
    expected = {"old": old, "new": new}[whole]
    for trainable in (False, True):
        loaded = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=trainable).eval()
        assert torch.equal(output(loaded, "CAUSAL_LM"), output(expected, "CAUSAL_LM"))
    new.save_pretrained(tmp_path)  # the next save tidies up
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".fusedprompt-saving-")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "prompt_encoder.safetensors",
    ]


def test_a_disk_that_refuses_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = ours("Llama", method="MLP"), ours("Llama", method="MLP", rows=6)
    old.save_pretrained(tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(tmp_path)
    loaded = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    assert torch.equal(output(loaded, "CAUSAL_LM"), output(old, "CAUSAL_LM"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "prompt_encoder.safetensors",
    ]


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _rewrite(change: Any, name: str = "adapter_model.safetensors") -> Any:
    def damage(folder: Path) -> None:
        file = folder / name
        tensors, metadata = checkpoint.read_tensors(file)
        change(tensors)
        safetensors.torch.save_file(tensors, str(file), metadata=metadata)

    return damage


def _pickle_only(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save({"prompt_embeddings": torch.zeros(4, 32)}, file.with_suffix(".bin"))
    file.unlink()


DAMAGE = [
    (_truncate, ValueError, r"adapter_model.safetensors: expected a whole safetensors file"),
    (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"hello"),
        ValueError,
        r"expected a whole safetensors file",
    ),
    (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        r"adapter_model.safetensors: no such file",
    ),
    (_pickle_only, FileNotFoundError, r"adapter_model.bin is there, but only safetensors files are read"),
    (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, r"adapter_config.json: no such file"),
    (_rewrite(lambda t: t.pop("prompt_embeddings")), ValueError, r"expected the tensor 'prompt_embeddings', got \["),
    (
        _rewrite(lambda t: t.update(prompt_embeddings=torch.zeros(4, 31))),
        ValueError,
        r"tensor 'prompt_embeddings': expected shape \(4, 32\), got \(4, 31\)",
    ),
    (
        _rewrite(lambda t: t.update(prompt_embeddings=torch.zeros(4, 32, dtype=torch.int32))),
        ValueError,
        r"tensor 'prompt_embeddings': expected a floating-point dtype",
    ),
    (
        _rewrite(lambda t: t.update({"a.lora_A": torch.zeros(1)})),
        ValueError,
        r"tensors \['a.lora_A'\] belong to no part",
    ),
    (
        _rewrite(lambda t: t.pop("base_model.score.weight")),
        ValueError,
        r"expected the tensor 'base_model.score.weight'",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_damaged_files_are_named_and_the_model_stays_as_it_was(
    damage: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    ours("Llama", "SEQ_CLS", "MLP", seed=3).save_pretrained(tmp_path)
    damage(tmp_path)
    model = ours("Llama", "SEQ_CLS", "MLP")
    before, state = output(model, "SEQ_CLS"), list(model.state_dict())
    for name in ("default", "second"):
        with pytest.raises(error, match=message):
            model.load_adapter(tmp_path, name)
    assert torch.equal(output(model, "SEQ_CLS"), before) and list(model.state_dict()) == state
    base = build("Llama", "SEQ_CLS")
    with pytest.raises(error, match=message):
        fusedprompt.PromptModel.from_pretrained(base, tmp_path)
    assert all(p.requires_grad for p in base.parameters())


def test_a_damaged_encoder_file_is_named(tmp_path: Path) -> None:
    ours("Llama", method="LSTM").save_pretrained(tmp_path)
    intact = tmp_path.with_name("intact")
    shutil.copytree(tmp_path, intact)
    for change, message in (
        (lambda t: t.pop("mlp_head.0.bias"), "prompt_encoder.safetensors: expected the tensor 'mlp_head.0.bias'"),
        (
            lambda t: t.update({"lstm_head.bias_hh_l1": torch.zeros(3)}),
            r"tensor 'lstm_head.bias_hh_l1': expected shape \(96,\), got \(3,\)",
        ),
    ):
        shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
        _rewrite(change, "prompt_encoder.safetensors")(tmp_path)
        with pytest.raises(ValueError, match=message):
            fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path: expected the folder of an adapter, got"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="path: expected a local folder or a repository on the Hub"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), "nobody/nothing")


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="save_directory: expected a folder, got the file"):
        ours("Llama").save_pretrained(tmp_path / "file")


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    ours("Llama", method="MLP").save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"x"


def test_saving_does_not_change_training(tmp_path: Path) -> None:
    model = ours("Llama", method="CPT").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert model.training and model.prompt_encoder["default"].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(p.requires_grad for p in model.parameters())
    model(**task_inputs("CAUSAL_LM", tokens())).loss.backward()
