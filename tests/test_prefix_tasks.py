"""Prefixes of keys and values beside an adapter with a prompt for each task: what is served, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedprompt as fp
from mixtures import assert_close
from models import config_fields, tokens
from test_multitask import TASKS, multitask


def model_with_prefixes(family: str = "Llama", task: str = "CAUSAL_LM") -> Any:
    """Active: "default", of several tasks. "short" and "long": prefixes."""
    model = multitask(family, task)
    for name, method, rows in (("short", "PREFIX", 3), ("long", "CARTRIDGE", 5)):
        kind, given = config_fields(method, task, rows)
        model.add_adapter(name, getattr(fp, kind)(**given))
    return model.eval()


@torch.no_grad()
def test_rows_of_prefixes_are_served_while_the_adapter_of_tasks_is_active() -> None:
    model, ids = model_with_prefixes(), tokens(2)
    names = ["long", "short"]
    mixed, new = model(input_ids=ids, adapter_names=names).logits, model.generate(input_ids=ids, adapter_names=names)
    of_tasks = model(input_ids=ids, task_ids=[3, 1], route="shared").logits
    assert {*model.prompt_cache._entries} == {("long", None), ("short", None), ("default", 1), ("default", 3)}
    assert torch.equal(model(input_ids=ids, task_ids=[3, 1], route="shared").logits, of_tasks)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert_close({"logits": mixed[row : row + 1]}, {"logits": model(input_ids=ids[row : row + 1]).logits})
        assert torch.equal(new[row : row + 1], model.generate(input_ids=ids[row : row + 1]))
    model.prompt_cache.clear("default")
    assert {*model.prompt_cache._entries} == {("long", None), ("short", None)}


def test_task_ids_of_rows_with_a_prefix_are_refused_by_name() -> None:
    model, ids = model_with_prefixes(), tokens(2)
    for call in (model, model.generate):
        refused = r"task_ids: expected None for row {}, whose {} is the same for all tasks, got {}"
        model.set_adapter("short")
        for task_ids in ([0, 1], torch.tensor([0, 1])):
            with pytest.raises(ValueError, match=refused.format(0, "PREFIX_TUNING", 0)):
                call(input_ids=ids, task_ids=task_ids)
        with pytest.raises(ValueError, match=refused.format(1, "CARTRIDGE", 2)):
            call(input_ids=ids, adapter_names=["short", "long"], task_ids=[None, 2])
        model.set_adapter("default")
        with pytest.raises(ValueError, match="adapter_names: expected prompts of input embeddings, or prefixes of key"):
            call(input_ids=ids, adapter_names=["default", "long"], task_ids=[1, None])
        unasked = {"input_ids": ids, "adapter_names": ["short", "long"]}
        assert torch.equal(_result(call(**unasked, task_ids=torch.tensor([-1, -1]))), _result(call(**unasked)))


def _result(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else output.logits


def test_places_of_rows_are_refused_by_generate_too() -> None:
    model, ids = model_with_prefixes(), tokens(2)
    model.set_adapter("long")
    with pytest.raises(ValueError, match="slots: expected None with CARTRIDGE, whose keys and values stand in front"):
        model.generate(input_ids=ids, slots=torch.arange(7).expand(2, -1))
    with pytest.raises(ValueError, match="fields: expected None with CARTRIDGE, whose keys and values stand in front"):
        model.generate(fields={"text": ids})


@torch.no_grad()
def test_a_decoder_behind_its_cache_takes_no_names_and_no_tasks() -> None:
    model, ids = model_with_prefixes("T5", "SEQ_2_SEQ_LM"), tokens(2)
    model.set_adapter("short")
    start = torch.ones(2, 3, dtype=torch.int64)
    whole = model(input_ids=ids, decoder_input_ids=start)
    begun = model(input_ids=ids, decoder_input_ids=start[:, :2], use_cache=True).past_key_values
    given = {"input_ids": ids, "decoder_input_ids": start[:, 2:], "past_key_values": begun}
    for name, value in (("adapter_names", ["short", "short"]), ("task_ids", [0, 0])):
        with pytest.raises(ValueError, match=f"{name}: expected None for tokens that follow a cache"):
            model(**given, **{name: value})
    assert_close({"logits": model(**given).logits}, {"logits": whole.logits[:, 2:]})


@torch.no_grad()
def test_a_prefix_begins_with_the_prompt_of_one_task() -> None:
    model, ids = model_with_prefixes(), tokens(2)
    expected = model(input_ids=ids, task_ids=[2, 2], logits="text").logits
    with pytest.raises(ValueError, match=rf"task_ids: expected one in \[0, {TASKS}\) for row 0"):
        fp.initialize_kv_prefix_from_adapter(model, source="default", adapter_name="short")
    fp.initialize_kv_prefix_from_adapter(model, source="default", adapter_name="short", task_id=2)
    model.set_adapter("short")
    assert_close({"logits": model(input_ids=ids).logits}, {"logits": expected})
    with pytest.raises(ValueError, match="task_ids: expected None for row 0, whose CARTRIDGE is the same for all tas"):
        fp.initialize_kv_prefix_from_adapter(model, source="long", adapter_name="short", task_id=2)
