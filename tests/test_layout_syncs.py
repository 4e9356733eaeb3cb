"""Layouts never make the host wait for a device: run on the meta device, whose tensors have no values to look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedprompt
from fusedprompt import Template
from models import build, tokens
from tolerance import one_thread  # noqa: F401
from word_tokenizers import word_tokenizer

# Reading a value, a size that depends on values, and copying from the host (torch.tensor).
_WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh", "unique")


class Waits(TorchDispatchMode):
    """Lists the operators for which a host would wait for its GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        result = func(*args, **(kwargs or {}))
        devices = {value.device.type for value in (*args, result) if isinstance(value, torch.Tensor)}
        if name in _WAITS or (name in ("_to_copy", "copy_") and len(devices) > 1):
            self.names.append(func.name())
        return result


def model_on_meta(task: str, template: str | None) -> Any:
    config = fusedprompt.PromptTuningConfig(task_type=task, num_virtual_tokens=4)
    bound = None if template is None else Template.parse(template).bind(word_tokenizer("llama"))
    model = fusedprompt.get_prompt_model(build("Llama", task), config, template=bound).eval()
    return model.to("meta")


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


IDS, MASK = meta(tokens(2, 5)), meta(torch.ones(2, 5, dtype=torch.int64))
SLOTS, WIDE = meta(torch.zeros(2, 9, dtype=torch.int64)), meta(torch.ones(2, 9, dtype=torch.int64))
TEXT = '[prompt 1] [text] [prompt 1] [anchor "is"] [prompt 2]'
PAIR = "[prompt 1] [a] [prompt 2] [sep] [b] [prompt 1]"
FIELDS = {"a": (IDS, MASK), "b": (IDS, MASK)}
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "slots": ("CAUSAL_LM", None, {"input_ids": IDS, "slots": SLOTS, "attention_mask": WIDE, "labels": WIDE}),
    "slots of a classifier": ("SEQ_CLS", None, {"input_ids": IDS, "slots": SLOTS, "attention_mask": WIDE}),
    "ids in a template": ("CAUSAL_LM", TEXT, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}),
    "ids without a mask": ("CAUSAL_LM", TEXT, {"input_ids": IDS}),
    "fields": ("CAUSAL_LM", PAIR, {"fields": FIELDS, "labels": {"b": IDS}}),
    "classified fields": ("SEQ_CLS", PAIR, {"fields": FIELDS}),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_a_batch_is_laid_out_without_a_wait(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, template, inputs = CASES[case]
    model = model_on_meta(task, template)
    monkeypatch.setattr(model.base_model, "forward", lambda **given: given)  # what transformers does is not ours
    if task == "SEQ_CLS":
        model.base_model.config.pad_token_id = 0
    expected = model(**inputs)  # constants are copied to the device once
    with Waits() as waits:
        found = model(**inputs)
    assert waits.names == []
    assert {name: value.shape for name, value in found.items() if isinstance(value, torch.Tensor)} == {
        name: value.shape for name, value in expected.items() if isinstance(value, torch.Tensor)
    }
    assert found["inputs_embeds"].shape[1] == (9 if "slots" in inputs else sum_of(template, inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_a_batch_is_laid_out_whatever_the_default_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.set_default_device` is the user's: a batch stays where its model is, and the host's tables on the host."""
    task, template, inputs = CASES[case]
    model = model_on_meta(task, template)
    monkeypatch.setattr(model.base_model, "forward", lambda **given: given)
    expected = model(**inputs)
    for device in ("cpu", "meta"):
        with torch.device(device):
            found = model(**inputs)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert (found[name].shape, found[name].device.type) == (value.shape, "meta")


def sum_of(template: str | None, inputs: dict[str, Any]) -> int:
    """Columns: 4 prompt rows, the ids, and the anchor or the special tokens of a pair."""
    return 4 + 10 + 2 if template == PAIR else 4 + 5 + 1


def test_a_wait_is_noticed() -> None:
    with Waits() as waits:
        torch.tensor([1])
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
        torch.ones(2).to("meta")
    assert len(waits.names) == 4
