"""`apply` on a PEFT model with multitask prompt tuning: PEFT's results, and what `fix=True` corrects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fusedprompt
from mixtures import ROUTES, assert_close, gradients, padded
from models import build, pad, task_inputs, tokens
from test_multitask import IDS, draw, fields, multitask
from tolerance import one_thread  # noqa: F401


def peft_model(family: str, task: str = "CAUSAL_LM", **changes: Any) -> Any:
    torch.manual_seed(7)
    model = peft.get_peft_model(build(family, task), peft.MultitaskPromptTuningConfig(**fields(task, **changes)))
    draw(model)
    return model.eval()


def step(model: Any, **given: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients(model)}


@pytest.mark.parametrize("ids", [IDS, [1] * 5])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("GPT2", "SEQ_CLS")])
@pytest.mark.parametrize("left", [0, 2])
def test_steps_are_those_of_peft(family: str, task: str, route: str, ids: list[int], left: int) -> None:
    model = peft_model(family, task)
    batch, mask = pad(tokens(5, 6), left, 0)
    given = {**task_inputs(task, batch, mask), "task_ids": torch.tensor(ids)}
    expected = step(model, **given)
    with fusedprompt.apply(model, route=route) as patch:
        assert_close(step(model, **given), expected, 1e-4)
        assert not patch.refused
        assert "for each of 4 tasks, splice: reference" in patch.report()
    assert_close(step(model, **given), expected, 0)


def test_classified_sequences_of_an_encoder_are_those_of_peft() -> None:
    model = peft_model("Bert", "SEQ_CLS")
    given = {**task_inputs("SEQ_CLS", tokens(5, 6)), "task_ids": torch.tensor(IDS)}
    given["token_type_ids"] = torch.ones(5, 6, dtype=torch.int64)
    expected = step(model, **given)
    with fusedprompt.apply(model) as patch:
        assert_close(step(model, **given), expected, 1e-4)
        assert not patch.refused


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("beams", [1, 2])
def test_generated_tokens_are_those_of_peft_and_prompts_are_kept_per_task(beams: int, left: int) -> None:
    model, passes = peft_model("Llama"), list[Any]()
    ids, mask = pad(tokens(5, 6), left, 0)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    given = {"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor(IDS), **options}
    expected = model.generate(**given)
    assert not torch.equal(model.generate(**{**given, "task_ids": torch.tensor([1, 1, 1, 1, 1])}), expected)
    with fusedprompt.apply(model) as patch:
        hook = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(kwargs.get("past_key_values") is None), with_kwargs=True
        )
        for count in (3, 0):
            passes.clear()
            assert torch.equal(model.generate(**given), expected)
            assert sum(passes) == count and len(patch.host.prompt_cache) == 3
        hook.remove()
        assert not patch.generated_alone
        assert "PEFT's own, behind a prompt that is computed once and kept" in patch.report()


@pytest.mark.parametrize(("task", "family"), [("QUESTION_ANS", "Bert"), ("FEATURE_EXTRACTION", "Bert")])
def test_tasks_that_peft_cannot_serve_raise_as_there_and_are_fixed(task: str, family: str) -> None:
    model, given = peft_model(family, task), task_inputs(task, tokens(5, 6))
    ids = torch.tensor(IDS)
    with fusedprompt.apply(model) as patch:
        with pytest.raises(ValueError, match="task_ids cannot be None"):
            model(**given, task_ids=ids)
        assert patch.refused == {f"PEFT hands no task_ids on for {task}"}
        assert "QUESTION_ANS and FEATURE_EXTRACTION never hand task_ids on, and raise\n" in patch.report() + "\n"
    with fusedprompt.apply(model, fix=True) as patch:
        found = model(**given, task_ids=ids)
        expected = multitask(family, task)(**given, task_ids=IDS)
        for name in ("start_logits", "loss") if task == "QUESTION_ANS" else ("last_hidden_state",):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
        assert "never hand task_ids on, and raise: each row's prompt is its own task's" in patch.report()


def test_encoder_decoders_are_served_by_peft_and_with_fix_by_us() -> None:
    model = peft_model("T5", "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    given = {**task_inputs("SEQ_2_SEQ_LM", tokens(5, 6)), "task_ids": torch.tensor(IDS)}
    expected = step(model, **given)
    with fusedprompt.apply(model) as patch:
        assert_close(step(model, **given), expected, 0)
        assert patch.refused == {"PEFT has a forward of its own for prompts of tasks in encoder-decoders"}
    with fusedprompt.apply(model, fix=True) as patch:
        assert_close(step(model, **given), expected, 1e-4)
        decoder = {"decoder_input_ids": tokens(5, 3)}
        labelled = {name: value for name, value in given.items() if name != "labels"}
        assert model(**labelled, **decoder).logits.shape[:2] == (5, 3)
        assert "SEQ_2_SEQ_LM drops decoder_input_ids, or raises for them without labels: they are" in patch.report()


def test_left_padding_is_out_of_the_way_with_fix_in_forward_and_generate() -> None:
    model, (ids, mask) = peft_model("Llama"), padded([6, 3, 5, 1, 4], [0, 3, 1, 5, 2], 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with fusedprompt.apply(model, fix=True):
        found = model(input_ids=ids, attention_mask=mask, task_ids=torch.tensor(IDS)).logits
        made = model.generate(input_ids=ids, attention_mask=mask, task_ids=torch.tensor(IDS), **options)
        for row, task_id in enumerate(IDS):
            text = {"input_ids": ids[row : row + 1, mask[row] != 0], "task_ids": torch.tensor([task_id])}
            torch.testing.assert_close(found[row, -1], model(**text).logits[0, -1], rtol=1e-4, atol=1e-4)
            assert made[row, -4:].tolist() == model.generate(**text, **options)[0, -4:].tolist()


def test_missing_or_wrong_tasks_are_told_of_and_files_stay_pefts(tmp_path: Path) -> None:
    model, ids = peft_model("Llama"), tokens(2, 4)
    model.save_pretrained(str(tmp_path / "before"))
    with fusedprompt.apply(model):
        with pytest.raises(ValueError, match="task_ids cannot be None"):
            model(input_ids=ids)
        with pytest.raises(ValueError, match=r"task_ids: expected one in \[0, 4\) for row 1"):
            model(input_ids=ids, task_ids=torch.tensor([0, 4]))
        model.save_pretrained(str(tmp_path / "patched"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    plain = peft.get_peft_model(build("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    expected = plain.eval()(input_ids=ids, task_ids=torch.tensor([0, 0])).logits
    for fix in (False, True):  # PEFT takes task_ids of other methods, and ignores them
        with fusedprompt.apply(plain, fix=fix):
            torch.testing.assert_close(plain(input_ids=ids, task_ids=torch.tensor([0, 0])).logits, expected)
