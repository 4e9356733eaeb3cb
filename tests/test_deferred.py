"""Outputs that are completed when they are looked at."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusedprompt.base.outputs import defer, replaced


def deferred(calls: list[int] | None = None) -> Any:
    def finish() -> dict[str, Any]:
        (calls if calls is not None else []).append(1)
        return {"logits": torch.ones(3)}

    return defer(CausalLMOutputWithPast(loss=torch.tensor(1.0), logits=torch.zeros(1)), finish)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda output: output.logits,
    "getattr": lambda output: getattr(output, "logits"),  # noqa: B009
    "key": lambda output: output["logits"],
    "index": lambda output: output[1],
    "slice": lambda output: output[1:][0],
    "get": lambda output: output.get("logits"),
    "dict": lambda output: dict(output)["logits"],
    "keywords": lambda output: dict(**output)["logits"],
    "values": lambda output: list(output.values())[1],
    "items": lambda output: dict(output.items())["logits"],
    "iteration": lambda output: [output[name] for name in output][1],
    "to_tuple": lambda output: output.to_tuple()[1],
    "rebuilt": lambda output: type(output)(**output).logits,
    "copy": lambda output: copy.copy(output).logits,
    "deepcopy": lambda output: copy.deepcopy(output).logits,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)).logits,
    "pytree": lambda output: torch.utils._pytree.tree_flatten(output)[0][1],
    "mapped": lambda output: torch.utils._pytree.tree_map(lambda leaf: leaf, output).logits,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_every_way_of_looking_sees_the_finished_field(look: Callable[[Any], Any]) -> None:
    calls: list[int] = []
    output = deferred(calls)
    assert torch.equal(look(output), torch.ones(3))
    assert type(output) is CausalLMOutputWithPast
    assert torch.equal(output.logits, torch.ones(3)) and calls == [1]


def test_the_loss_is_read_as_a_trainer_reads_it_without_finishing() -> None:
    calls: list[int] = []
    output = deferred(calls)
    assert isinstance(output, dict) and isinstance(output, CausalLMOutputWithPast)
    assert "loss" in output and output["loss"].item() == output.loss.item() == 1.0
    assert calls == []
    assert "logits" in output and calls == [1]


def test_without_a_loss_looking_for_one_finishes() -> None:
    output = defer(CausalLMOutputWithPast(logits=torch.zeros(1)), lambda: {"logits": torch.ones(3)})
    assert "loss" not in output
    assert torch.equal(output[0], torch.ones(3))


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_the_field_has_a_gradient_if_the_output_was_made_with_gradients(made: bool, read: bool) -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(made):
        output = defer(CausalLMOutputWithPast(logits=torch.zeros(1)), lambda: {"logits": weight * 2})
    with torch.set_grad_enabled(read):
        assert output.logits.requires_grad is made
        assert torch.is_grad_enabled() is read


def test_replaced_fields_stand_in_the_order_of_the_class() -> None:
    output = CausalLMOutputWithPast(logits=torch.zeros(1), hidden_states=(torch.zeros(2),))
    with_loss = replaced(output, loss=torch.tensor(1.0))
    assert list(with_loss) == ["loss", "logits", "hidden_states"]
    assert list(output) == ["logits", "hidden_states"]
