"""What a forward pass dispatches outside the base model, counted: ATen ops that are not views, ours and PEFT's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedprompt
from fusedprompt.ops.cpt import reference as cpt_reference
from fusedprompt.ops.splice import reference as splice_reference
from models import build, pair, tokens


class Counter(TorchDispatchMode):
    """Lists the operators that compute or copy. Views move nothing; neither does an allocation that is not filled."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fusedprompt" and not func.is_view and "empty" not in func.name():
            self.names.append(func.name())
        if func.namespace == "fusedprompt" and not func.name().startswith("fusedprompt::lstm"):
            with self:  # an op of ours counts for what it dispatches itself
                return _IMPLEMENTATIONS[func.name()](*args, **(kwargs or {}))
        if func.namespace == "fusedprompt":
            self.names.append(func.name())  # one call for the whole stack, as mkldnn_rnn_layer is one for PEFT
        return func(*args, **(kwargs or {}))


_IMPLEMENTATIONS = {"fusedprompt::splice": splice_reference._splice, "fusedprompt::cpt": cpt_reference._cpt}


def count(model: Any, **given: Any) -> list[str]:
    model(**given)  # constants are made once
    with Counter() as counter:
        model(**given)
    return counter.names


BATCH = {"input_ids": tokens(4), "attention_mask": torch.ones(4, 7, dtype=torch.long), "labels": tokens(4)}


@pytest.mark.parametrize(("method", "most", "of_peft"), [("PROMPT", 4, 8), ("MLP", 9, 13), ("LSTM", 14, 21)])
def test_ops_outside_the_base_model(method: str, most: int, of_peft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", method)
    for model in (theirs, mine):
        monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: kwargs)
    assert len(count(theirs, **BATCH)) == of_peft
    names = count(mine, **BATCH)
    assert len(names) <= most, names


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize(("method", "of_projection"), [("PREFIX", 0), ("PROJECTED", 3), ("CARTRIDGE", 1)])
def test_a_prefix_costs_the_same_ops_for_every_depth(
    method: str, of_projection: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", method, num_hidden_layers=layers)
    for model in (theirs, mine):
        monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: kwargs)
    assert len(count(theirs, **BATCH)) == 3 + 2 * layers + of_projection
    names = count(mine, **BATCH)
    assert len(names) == 1 + of_projection, names  # the mask


@pytest.mark.parametrize(
    ("tasks", "most"), [([1, 1, 1, 1], 6), ([2, 0, 2, 1], 6), ([0, 2, 2, 0], 6), ([3, 1, 3, 1], 6), ([0, 3, 1, 0], 8)]
)
def test_ops_of_prompts_by_task(tasks: list[int], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product and its multiplication with the table; stack and cat of ids, mask and labels; words; and the prompts,
    each row's own chosen as they are written. The matrices of tasks that are equally far apart, such as any two, are
    views; others are gathered, which takes two ops."""
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 4, "num_ranks": 2}
    theirs = peft.get_peft_model(build("Llama"), peft.MultitaskPromptTuningConfig(**fields))
    mine = fusedprompt.get_prompt_model(build("Llama"), fusedprompt.MultitaskPromptTuningConfig(**fields))
    for model in (theirs, mine):
        monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: kwargs)
    assert len(count(theirs, **BATCH, task_ids=torch.tensor(tasks))) == 13
    names = count(mine, **BATCH, task_ids=tasks)
    assert len(names) <= most, names
    assert len(count(mine, **BATCH, task_ids=torch.tensor(tasks))) <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_costs_no_further_op(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("Llama").to(dtype)
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(base, config)
    monkeypatch.setattr(base, "forward", lambda **kwargs: kwargs)
    assert len(count(model, **BATCH)) <= 4


def test_no_forward_copies_from_the_host_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made from Python numbers is what becomes a blocking copy on a GPU."""
    _, model = pair("Llama", "CAUSAL_LM", "LSTM")
    monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: kwargs)
    model(**BATCH)
    made: list[Any] = []
    for name in ("tensor", "as_tensor", "from_numpy"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _o=original, **k: made.append(a) or _o(*a, **k))
    names = count(model, **BATCH)
    assert made == [] and not [name for name in names if "_to_copy" in name or "lift_fresh" in name]


def test_the_mask_keeps_its_integer_dtype_and_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("Llama", "CAUSAL_LM", "PROMPT")
    monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: kwargs)
    given = model(**BATCH)
    assert given["attention_mask"].dtype == torch.int64 and given["attention_mask"].shape == (4, 11)
    assert set(model(input_ids=tokens())) == {"inputs_embeds"}


def test_the_batch_is_written_once() -> None:
    """Bytes allocated by a splice: the (B, S, D) result, and the three integer fields twice, (B, T) and (B, S)."""
    batch, length, rows, width = 4, 64, 16, 128
    table, prompt = torch.randn(50, width), torch.randn(rows, width)
    ids = torch.randint(0, 50, (batch, length))
    layout = fusedprompt.Layout.prefix(rows)
    allocated = 0

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal allocated
            if func.name() == "fusedprompt::splice":
                with self:
                    return splice_reference._splice(*args)
            out = func(*args, **(kwargs or {}))
            if not func.is_view and isinstance(out, torch.Tensor) and not func.name().endswith("_"):
                allocated += out.numel() * out.element_size()
            return out

    fusedprompt.ops.splice_batch(prompt, layout, input_ids=ids, table=table, attention_mask=ids, labels=ids)
    with torch.no_grad(), Allocations():
        fusedprompt.ops.splice_batch(prompt, layout, input_ids=ids, table=table, attention_mask=ids, labels=ids)
    embeddings = batch * (rows + length) * width * 4
    fields = 3 * 8 * batch * (length + rows + length)
    assert embeddings <= allocated <= embeddings + fields
