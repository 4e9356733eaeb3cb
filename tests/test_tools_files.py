"""Adapters from and to the Hugging Face Hub, model cards, permissions, and pipelines."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import fusedprompt
from fusedprompt.methods import checkpoint
from models import build, ours
from pages import text_of
from word_tokenizers import word_tokenizer


def test_a_repository_is_downloaded_with_the_caller_s_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = ours("Llama", method="MLP"), []
    model.save_pretrained(tmp_path / "inner")

    def snapshot_download(name: str, *, allow_patterns: Any, **kwargs: Any) -> str:
        seen.append((name, allow_patterns, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"revision": "v2", "token": "secret", "cache_dir": "/x", "force_download": True, "local_files_only": None}
    loaded = fusedprompt.PromptModel.from_pretrained(
        build("Llama"), "me/prompts", subfolder="inner", torch_device="cpu", **options
    )
    assert torch.equal(loaded.prompt_rows(), model.prompt_rows())
    name, patterns, given = seen[0]
    assert name == "me/prompts" and given == {key: value for key, value in options.items() if value is not None}
    assert "inner/adapter_config.json" in patterns and "inner/adapter_model.safetensors" in patterns
    loaded.load_adapter("me/prompts", "second", subfolder="inner", revision="main")
    assert seen[1][2] == {"revision": "main"} and list(loaded.peft_config) == ["default", "second"]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_argument_that_is_not_known_is_named(place: str, tmp_path: Path) -> None:
    ours("Llama").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"unexpected argument 'revison'.*revision"):
        fusedprompt.PromptModel.from_pretrained(
            build("Llama"), tmp_path if place == "folder" else "me/prompts", revison="v2"
        )
    with pytest.raises(TypeError, match=r"unexpected argument.*'shards'"):
        ours("Llama").save_pretrained(tmp_path, shards=3)


def test_an_adapter_goes_to_the_device_that_is_asked_for(tmp_path: Path) -> None:
    ours("Llama").save_pretrained(tmp_path)
    loaded = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, torch_device="meta")
    assert {p.device.type for p in loaded.prompt_encoder.parameters()} == {"meta"}
    assert loaded.device.type == "cpu"


def test_a_pickled_adapter_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    import peft

    import fusedprompt as fp

    model = peft.get_peft_model(build("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(FileNotFoundError, match=r"only safetensors files.*convert it: (.*)") as error:
        fp.PromptModel.from_pretrained(build("Llama"), tmp_path)
    import safetensors.torch

    exec(str(error.value).partition("convert it: ")[2], {"safetensors": safetensors, "torch": torch})
    assert fp.PromptModel.from_pretrained(build("Llama"), tmp_path).prompt_rows().shape == (4, 32)


def test_a_pickled_adapter_of_a_repository_is_refused_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours("Llama").save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "adapter_model.safetensors").rename(tmp_path / "whole" / "adapter_model.bin")

    def snapshot_download(name: str, *, allow_patterns: Any, **kwargs: Any) -> str:
        folder = tmp_path / "downloaded"
        folder.mkdir(exist_ok=True)
        for file in (tmp_path / "whole").iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin .*convert it"):
        fusedprompt.PromptModel.from_pretrained(build("Llama"), "me/prompts")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask: int, tmp_path: Path) -> None:
    model, before = ours("Llama", method="MLP"), os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "saved")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    files = list((tmp_path / "saved").iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {usual}


def test_a_model_card_is_written_once_and_completed(tmp_path: Path) -> None:
    model = ours("Llama")
    model.active_config.base_model_name_or_path = "big/llama"
    model.add_model_tags(["trl"])
    model.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "big/llama"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["fusedprompt", "base_model:adapter:big/llama", "trl"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My words\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("# My words\n")
    model.create_or_update_model_card(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.tags[0] == "mine" and "fusedprompt" in card.data.tags
    assert card.data.library_name == "peft" and "# My words" in card.text


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_the_adapter_and_keeps_a_card_that_is_there(
    by: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def create_repo(self: Any, name: str, exist_ok: bool = False, **kwargs: Any) -> Any:
        if there and not exist_ok:
            raise huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self: Any, **kwargs: Any) -> str:
        seen.update(kwargs, files={file.name for file in Path(kwargs["folder_path"]).iterdir()}, token=self.token)
        return "committed"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda self, *args, **kwargs: True)
    model = ours("Llama", method="MLP")
    options = {"token": "secret", "revision": "v2", "private": True}
    if by == "push_to_hub":
        assert model.push_to_hub("me/prompts", **options) == "committed"
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/prompts", **options)
    own = {"adapter_config.json", "adapter_model.safetensors", "prompt_encoder.safetensors", "README.md"}
    assert seen["files"] == own and seen["repo_id"] == "me/prompts"
    assert seen["token"] == "secret" and seen["revision"] == "v2"
    assert seen["ignore_patterns"] == (["README.md"] if there else None)


@pytest.mark.parametrize(
    ("pipeline", "family", "task", "kind"),
    [
        ("text-generation", "Llama", "CAUSAL_LM", "gpt2"),
        ("text-classification", "Bert", "SEQ_CLS", "bert"),
        ("token-classification", "Roberta", "TOKEN_CLS", "roberta"),
        ("question-answering", "Bert", "QUESTION_ANS", "bert"),
        ("document-question-answering", "Bert", "QUESTION_ANS", "bert"),
        ("text2text-generation", "T5", "SEQ_2_SEQ_LM", "gpt2"),
        ("summarization", "T5", "SEQ_2_SEQ_LM", "gpt2"),
        ("feature-extraction", "Bert", "FEATURE_EXTRACTION", "bert"),
    ],
)
def test_pipelines_know_the_model(pipeline: str, family: str, task: str, kind: str, monkeypatch: Any) -> None:
    if pipeline not in transformers.pipelines.get_supported_tasks() or pipeline.startswith("document"):
        pytest.skip("transformers has no such pipeline, or it needs pictures")
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        run = transformers.pipeline(pipeline, model=ours(family, task), tokenizer=word_tokenizer(kind), device="cpu")
        options: dict[str, Any] = {}
        if "question" in pipeline:
            result = run(question="the capital", context="paris is the capital of france")
        else:
            if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
                options = {"generation_config": transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0)}
            result = run("paris is the capital of france", **options)
    finally:
        logger.removeHandler(handler)
    assert result is not None and logged == []


def test_each_row_of_the_page_on_tools_has_a_test() -> None:
    text = text_of("docs/tools.md")
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_tools_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 25 and all(f"def {name}(" in tests for name in named)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert all(re.search(r"`test_\w+` \|$", row) for row in rows)


def test_saving_elsewhere_than_in_the_main_process_writes_nothing(tmp_path: Path) -> None:
    model = ours("Llama")
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        model.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize(("family", "task", "method"), [("Llama", "CAUSAL_LM", "LSTM"), ("Bert", "SEQ_CLS", "MLP")])
def test_values_that_were_gathered_are_saved(family: str, task: str, method: str, tmp_path: Path) -> None:
    model, other = ours(family, task, method), ours(family, task, method, seed=9)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    other.save_pretrained(tmp_path / "own")
    for name in ("adapter_model.safetensors", "prompt_encoder.safetensors"):
        expected, found = (checkpoint.read_tensors(tmp_path / place / name) for place in ("own", "given"))
        assert found[1] == expected[1] and list(found[0]) == list(expected[0])
        assert all(torch.equal(found[0][key], value) for key, value in expected[0].items())
    assert not torch.equal(model.prompt_rows(), other.prompt_rows())
