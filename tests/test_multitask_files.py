"""Multitask prompt tuning on disk: PEFT's files both ways, and adapters that begin with another's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

import fusedprompt as fp
from models import WIDTH, build, tokens
from test_multitask import IDS, RANKS, ROWS, TASKS, draw, fields, multitask, pair
from tolerance import assert_identical, one_thread  # noqa: F401

INITS = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
FILE = "adapter_model.safetensors"


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=tokens(5, 6), task_ids=torch.tensor(IDS), **given).logits)


@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("Bert", "SEQ_CLS")])
def test_either_side_loads_what_the_other_saved(family: str, task: str, tmp_path: Path) -> None:
    theirs, mine = pair(family, task)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    found, wanted = (safetensors.torch.load_file(tmp_path / side / FILE) for side in ("mine", "theirs"))
    assert_identical(found, wanted)
    assert {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"} <= found.keys()
    assert not (tmp_path / "mine" / "prompt_encoder.safetensors").exists()
    for side in ("mine", "theirs"):
        ours = fp.PromptModel.from_pretrained(build(family, task), tmp_path / side)
        peft_side = peft.PeftModel.from_pretrained(build(family, task), str(tmp_path / side))
        assert torch.equal(logits(ours), logits(mine))
        torch.testing.assert_close(logits(peft_side), logits(mine), rtol=1e-4, atol=1e-4)
        assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_training_goes_on_exactly_and_a_live_adapter_is_replaced(tmp_path: Path) -> None:
    model = multitask()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    resumed = fp.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)
    trained = {name for name, parameter in resumed.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 and torch.equal(logits(resumed), expected)
    parameters = list(resumed.prompt_encoder["default"].parameters())
    for name in trained:
        with torch.no_grad():
            resumed.get_parameter(name).add_(1.0)
    resumed.load_adapter(tmp_path, is_trainable=True)
    assert torch.equal(logits(resumed), expected)
    assert all(one is other for one, other in zip(resumed.prompt_encoder["default"].parameters(), parameters))


def test_a_file_without_a_tasks_matrices_is_refused(tmp_path: Path) -> None:
    multitask().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / FILE)
    for broken, message in (
        ({"prompt_embeddings": tensors["prompt_embeddings"]}, "expected the tensor 'prefix_task_cols'"),
        (
            {**tensors, "prefix_task_rows": tensors["prefix_task_rows"][:1]},
            r"'prefix_task_rows': expected shape \(4, 2",
        ),
    ):
        safetensors.torch.save_file({name: one.contiguous() for name, one in broken.items()}, tmp_path / FILE)
        with pytest.raises(ValueError, match=message):
            fp.PromptModel.from_pretrained(build("Llama"), tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The file of an adapter that was trained on four tasks."""
    model = multitask()
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source" / FILE


def begun(init: str, source: Path, package: Any = fp, **changes: Any) -> Any:
    """A model whose adapter begins with the source's values."""
    own = {"prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": str(source), "prompt_tuning_init_task": 2}
    config = package.MultitaskPromptTuningConfig(**fields(**{"num_tasks": 1, **own, **changes}))
    torch.manual_seed(3)
    return (fp.get_prompt_model if package is fp else peft.get_peft_model)(build("Llama"), config)


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_begins_with_a_sources_values_as_in_peft(init: str, source: Path) -> None:
    mine, theirs = (begun(init, source, package).prompt_encoder["default"] for package in (fp, peft))
    assert_identical(mine.state_dict(), theirs.state_dict())
    tensors = safetensors.torch.load_file(source)
    assert torch.equal(mine.embedding.weight, tensors["prompt_embeddings"])
    if init == "EXACT_SOURCE_TASK":
        assert torch.equal(mine.prefix_task_cols[0], tensors["prefix_task_cols"][2])


@pytest.mark.parametrize("init", INITS)
def test_every_one_of_several_tasks_begins_with_a_sources_values(init: str, source: Path) -> None:
    """PEFT takes a source's matrices for one task alone."""
    one, several = (begun(init, source, num_tasks=count).prompt_encoder["default"] for count in (1, 3))
    assert torch.equal(several.embedding.weight, one.embedding.weight)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        own, expected = several.get_parameter(name), one.get_parameter(name)
        assert torch.equal(own, expected.expand_as(own)) == (init != "ONLY_SOURCE_SHARED")


@pytest.mark.parametrize("init", INITS)
def test_a_source_is_read_when_an_adapter_is_made_and_never_when_it_is_loaded(
    init: str, source: Path, tmp_path: Path
) -> None:
    model = begun(init, source)
    draw(model)
    model.save_pretrained(tmp_path / "adapter")
    source.unlink()  # as on another machine
    given = {"input_ids": tokens(2, 5), "task_ids": [0, 0]}
    for trainable in (False, True):
        loaded = fp.PromptModel.from_pretrained(build("Llama"), tmp_path / "adapter", is_trainable=trainable)
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    with pytest.raises(FileNotFoundError):
        peft.PeftModel.from_pretrained(build("Llama"), str(tmp_path / "adapter"))
    with pytest.raises(FileNotFoundError, match=FILE):
        begun(init, source)


def test_a_source_that_does_not_fit_is_told_of(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"expected shape \({ROWS}, 5\) of a task, got \({ROWS}, {RANKS}\)"):
        begun("EXACT_SOURCE_TASK", source, num_ranks=5)
    with pytest.raises(ValueError, match=rf"expected shape \(7, {WIDTH}\) of a task, got \({ROWS}, {WIDTH}\)"):
        begun("ONLY_SOURCE_SHARED", source, num_virtual_tokens=7)
    with pytest.raises(ValueError, match=rf"prompt_tuning_init_task: expected a task in \[0, {TASKS}\) of .*, got 9"):
        begun("EXACT_SOURCE_TASK", source, prompt_tuning_init_task=9)
    plain = fp.get_prompt_model(build("Llama"), fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"expected the tensor 'prefix_task_cols', got \['prompt_embeddings'\]"):
        begun("AVERAGE_SOURCE_TASKS", tmp_path / "plain" / FILE)
    shared = begun("ONLY_SOURCE_SHARED", tmp_path / "plain" / FILE).prompt_encoder["default"].embedding.weight
    assert torch.equal(shared, plain.prompt_rows())
    (tmp_path / "x.bin").touch()
    with pytest.raises(
        ValueError, match=r"expected a \.safetensors file, got '.*x\.bin'\. x\.bin is there, but only saf"
    ):
        begun("ONLY_SOURCE_SHARED", tmp_path / "x.bin")
