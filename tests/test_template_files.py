"""Adapters with a template on disk: beside PEFT's files, atomically, and refused by PEFT where PEFT cannot use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fusedprompt
from fusedprompt import Template
from models import build, config_fields, ours, task_inputs, tokens
from tolerance import one_thread  # noqa: F401
from word_tokenizers import word_tokenizer

TEXT = '[prompt 2] [text] [anchor "is the"] [prompt 2]'


def with_template(text: str = TEXT, method: str = "MLP") -> Any:
    name, fields = config_fields(method)
    template = Template.parse(text).bind(word_tokenizer("gpt2"))
    base = build("Llama")
    torch.manual_seed(7)
    return fusedprompt.get_prompt_model(base, getattr(fusedprompt, name)(**fields), template=template)


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_template_comes_back_from_the_folder_and_gives_the_same_outputs(
    method: str, trainable: bool, tmp_path: Path
) -> None:
    model = with_template(method=method).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "prompt_template.json").read_text())
    assert stored["template"] == TEXT
    loaded = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=trainable).eval()
    assert loaded.templates == model.templates
    assert loaded.peft_config["default"].peft_type == model.peft_config["default"].peft_type
    inputs = task_inputs("CAUSAL_LM", tokens(2, 3))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_training_resumes_exactly(tmp_path: Path) -> None:
    inputs = task_inputs("CAUSAL_LM", tokens(2, 3))

    def steps(model: Any, count: int) -> float:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        return float(model(**inputs).loss)

    model = with_template()
    steps(model, 2)
    model.save_pretrained(tmp_path)
    resumed = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)
    assert steps(resumed, 2) == steps(model, 2)


def test_peft_refuses_a_folder_with_a_template_and_says_why(tmp_path: Path) -> None:
    with_template().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["fusedprompt_peft_type"] == "P_TUNING"
    for load in (
        lambda: peft.PeftModel.from_pretrained(build("Llama"), str(tmp_path)),
        lambda: peft.PeftConfig.from_pretrained(str(tmp_path)),
        lambda: ours_as_peft().load_adapter(str(tmp_path), "other"),
    ):
        with pytest.raises((KeyError, ValueError), match=r"a fusedprompt adapter with the template .* PEFT only puts"):
            load()


def ours_as_peft() -> Any:
    return peft.get_peft_model(build("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.filterwarnings("error:.*ignored")
def test_peft_loads_a_plain_prefix_and_runs_it_alike(tmp_path: Path) -> None:
    model = with_template("[prompt 4] [text]").eval()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("Llama"), str(tmp_path)).eval()
    inputs = task_inputs("CAUSAL_LM", tokens(2, 3))
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    loaded = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    assert loaded.templates == model.templates


def test_a_template_of_an_adapter_that_was_replaced_does_not_stay(tmp_path: Path) -> None:
    with_template().save_pretrained(tmp_path)
    ours("Llama").save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_template.json").exists()
    assert fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path).templates == {}
    peft.PeftModel.from_pretrained(build("Llama"), str(tmp_path))


def test_a_template_left_over_by_a_crash_is_not_used(tmp_path: Path) -> None:
    """The files are committed together, but an old file is removed after that."""
    ours("Llama").save_pretrained(tmp_path)
    (tmp_path / "prompt_template.json").write_text(Template.parse("[text] [prompt 4]").to_json())
    assert fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path).templates == {}


def test_a_folder_whose_template_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    with_template().save_pretrained(tmp_path)
    file = tmp_path / "prompt_template.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"prompt_template.json: template: expected the JSON object of a template"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    file.write_text(Template.parse("[text] [prompt 3]").to_json())
    with pytest.raises(ValueError, match=r"template part 1 '\[prompt 3\]': is the last of 3 prompt rows"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"prompt_template.json: no such file; adapter_config.json says"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)


def test_a_save_that_fails_leaves_the_old_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_template()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = with_template("[text] [prompt 4]")
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        other.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
