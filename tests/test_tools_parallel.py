"""DataParallel's replicas run their own weights: of prompt models, and of patched PEFT models."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import fusedprompt
from models import ours, task_inputs, tokens
from test_apply_results import peft_model


def replica_of(model: nn.Module, factor: float) -> Any:
    """What `torch.nn.parallel.replicate` makes of a model, on its own device, with other weights."""
    modules = list(model.modules())
    copies: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        replica._former_parameters = OrderedDict()
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
                continue
            copied = parameter * factor
            setattr(replica, key, copied)
            replica._former_parameters[key] = copied
    return copies[model]


def scaled(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("route", ["splice", "shared"])
@pytest.mark.parametrize("kind", ["prompt model", "apply", "fix"])
def test_a_replica_runs_its_own_weights_and_trains_the_original_s(kind: str, route: str) -> None:
    if kind == "prompt model":
        model = ours("Llama", method="MLP")
        model.route = route
    else:
        model = peft_model("Llama", method="MLP")
        fusedprompt.apply(model, route=route, fix=kind == "fix")
    inputs = task_inputs("CAUSAL_LM", tokens())
    before = model(**inputs)
    output = replica_of(model, 1.25)(**inputs)
    output.loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad is not None
    assert torch.equal(model(**inputs).loss, before.loss)
    scaled(model, 1.25)
    expected = model(**inputs)
    assert not torch.allclose(expected.loss, before.loss, rtol=1e-3)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits, expected.logits)
    with torch.no_grad():
        torch.testing.assert_close(replica_of(model, 1.0)(**inputs).logits, expected.logits.detach())


def test_a_replica_of_an_unpatched_model_is_peft_s_own() -> None:
    model = peft_model("Llama", method="MLP")
    fusedprompt.apply(model).revert()
    assert "_replicate_for_data_parallel" not in vars(model)


def test_what_replicas_met_stands_in_the_model_s_report() -> None:
    model = peft_model("Llama", method="MLP")
    patch = fusedprompt.apply(model)
    replica = replica_of(model, 1.0)
    ids = tokens()
    replica(input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand_as(ids))
    assert any("position_ids" in reason for reason in patch.refused)
