"""`fusedprompt inspect`: rows that are words, keys and values, files of PEFT, and what is no adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fusedprompt as fp
from byte_models import FIRST, save_byte_model
from fusedprompt.commands.inspect import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("byte-model"))


def load(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model)


def report(capsys: Any, *arguments: Any) -> Any:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_that_are_words_are_nearest_to_these(model: Path, tmp_path: Path, capsys: Any) -> None:
    base = load(model)
    ours = fp.get_prompt_model(base, fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    table = base.get_input_embeddings().weight.detach()
    vocabulary = {index: word for word, index in load_vocabulary(model).items()}
    ids = [FIRST + 3, FIRST + 70, FIRST + 40]
    with torch.no_grad():
        ours.prompt_encoder["default"].embedding.weight.copy_(table[ids] * torch.tensor([[1.0], [4.0], [0.5]]))
    ours.save_pretrained(tmp_path)
    (told,) = report(capsys, tmp_path, "--words", 2)
    assert (told["method"], told["task"], told["base"]) == ("PROMPT_TUNING", "CAUSAL_LM", str(model))
    assert told["tensors"] == {"prompt_embeddings": [3, 32]} and told["dtype"] == "float32"
    assert told["can be trained on"] is True and told["template"] is False
    assert [row["words"][0][0] for row in told["rows"]] == [vocabulary[index] for index in ids]
    cosine = torch.nn.CosineSimilarity(dim=-1)
    for row, index, scale in zip(told["rows"], ids, (1.0, 4.0, 0.5)):
        others = cosine(table[index].double(), table.double())
        assert row["norm"] == pytest.approx(scale * float(table[index].norm()), rel=1e-5)
        assert [value for _, value in row["words"]] == pytest.approx(others.topk(2).values.tolist(), rel=1e-5)
    assert told["median norm of words"] == pytest.approx(float(table.norm(dim=1).quantile(0.5)), rel=1e-3)
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"row   1  norm {told['rows'][1]['norm']:.3f}  {vocabulary[ids[1]]!r} 1.00" in text


def load_vocabulary(model: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return found


def test_norms_of_keys_and_values_are_told_by_layer(model: Path, tmp_path: Path, capsys: Any) -> None:
    ours = fp.get_prompt_model(load(model), fp.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    ours.save_pretrained(tmp_path)
    rows = ours.prompt_encoder["default"].embedding.weight.detach()  # (2, 2 · 1 layer · 32): keys, then values
    (told,) = report(capsys, tmp_path)
    expected = {"keys": float(rows[:, :32].norm(dim=1).mean()), "values": float(rows[:, 32:].norm(dim=1).mean())}
    assert told["layers"] == [pytest.approx(expected, rel=1e-5)] and "rows" not in told


def test_what_peft_saved_of_p_tuning_cannot_be_trained_on(model: Path, tmp_path: Path, capsys: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    peft.get_peft_model(load(model), config).save_pretrained(tmp_path / "theirs")
    ours = fp.get_prompt_model(load(model), {**config.to_dict(), "peft_type": "P_TUNING"})
    ours.save_pretrained(tmp_path / "ours")
    theirs, same = report(capsys, tmp_path / "theirs", "--no-words"), report(capsys, tmp_path / "ours", "--no-words")
    assert theirs[0]["can be trained on"] is False and same[0]["can be trained on"] is True
    assert theirs[0]["tensors"] == same[0]["tensors"] and "words" not in theirs[0]["rows"][0]
    assert [Path(one["folder"]).name for one in report(capsys, tmp_path, "--no-words")] == ["ours", "theirs"]


def test_without_the_base_model_the_rest_is_told(model: Path, tmp_path: Path, capsys: Any) -> None:
    base = load(model)
    base.config._name_or_path = base.name_or_path = "gone/elsewhere/model"
    ours = fp.get_prompt_model(base, fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    ours.save_pretrained(tmp_path)
    (told,) = report(capsys, tmp_path)
    assert told["words"].startswith("none: --model: expected a causal language model with a tokenizer, got 'gone")
    (told,) = report(capsys, tmp_path, "--model", model)
    assert len(told["rows"][0]["words"]) == 5 and told["base"] == str(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "expected the folder of an adapter, with adapter_config.json in it"),
        ({"peft_type": "LORA"}, "expected a peft_type in PROMPT_TUNING, "),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "adapter_model.safetensors: no such file"),
    ],
)
def test_what_is_no_adapter_is_told(fields: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    if fields is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err


def test_a_reader_that_reads_no_further_is_no_error(model: Path, tmp_path: Path) -> None:
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    fp.get_prompt_model(load(model), config).save_pretrained(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fusedprompt", "inspect", str(tmp_path), "--no-words"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
