"""`apply(peft_model)` gives PEFT users batches of several adapters; PEFT itself, adapter by adapter, is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedprompt
from models import build, config_fields, tokens
from tolerance import largest, one_thread

peft = pytest.importorskip("peft")

__all__ = ["one_thread"]
BASE = "__base__"
ADAPTERS = {"short": ("MLP", 2), "mlp": ("MLP", 5), "lstm": ("LSTM", 3)}
NAMES = ["mlp", BASE, "short", "mlp", "lstm"]


def peft_model(family: str, task: str) -> Any:
    model: Any = None
    for name, (method, rows) in ADAPTERS.items():
        kind, fields = config_fields(method, task, rows)
        config = getattr(peft, kind)(**fields)
        if model is None:
            model = peft.get_peft_model(build(family, task), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():  # heads that differ visibly
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def alone(model: Any, name: str, call: Any) -> Any:
    """PEFT's own result."""
    if name == BASE:
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    return call(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("route", ["splice", "shared"])
def test_language_model_rows_equal_peft_alone(route: str) -> None:
    model, ids = peft_model("Llama", "CAUSAL_LM"), tokens(5, 6)
    logits, losses, count = [], [], 0
    for row, name in enumerate(NAMES):
        own = alone(model, name, lambda m, row=row: m(input_ids=ids[row : row + 1], labels=ids[row : row + 1]))
        predicted = 5 if name == BASE else 6
        logits.append(own.logits[0, -6:].detach())
        losses.append(own.loss * predicted)
        count += predicted
    loss = torch.stack(losses).sum() / count
    loss.backward()
    expected = {"loss": loss.detach(), "logits": torch.stack(logits), **gradients(model)}
    model.zero_grad()
    with fusedprompt.apply(model, route=route) as patch:
        output = model(input_ids=ids, labels=ids, adapter_names=NAMES)
        output.loss.backward()
        assert not patch.refused
    found = {"loss": output.loss.detach(), "logits": output.logits[:, -6:].detach(), **gradients(model)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert largest(found[name] - value) <= 2e-5 * max(largest(value), 1e-2), name
    model.zero_grad()


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_rows_go_through_their_own_adapters_heads(family: str) -> None:
    model, ids = peft_model(family, "SEQ_CLS"), tokens(5, 6)
    mask = torch.ones_like(ids)
    names = ["mlp", "short", "short", "lstm", "mlp"]  # PEFT's disable_adapter needs a model that generates
    rows = enumerate(names)
    logits = [alone(model, name, lambda m, row=row: m(input_ids=ids[row : row + 1]).logits) for row, name in rows]
    forwards = [vars(module).get("forward") for module in model.modules()]
    with fusedprompt.apply(model):
        found = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    torch.testing.assert_close(found, torch.cat(logits), rtol=1e-4, atol=1e-4)
    assert [vars(module).get("forward") for module in model.modules()] == forwards


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_are_continued_as_peft_does_alone(beams: int) -> None:
    model, ids = peft_model("Llama", "CAUSAL_LM"), tokens(5, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    expected = [
        alone(model, name, lambda m, row=row: m.generate(input_ids=ids[row : row + 1], **options))[0, -4:].tolist()
        for row, name in enumerate(NAMES)
    ]
    with fusedprompt.apply(model):
        found = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    assert found[:, -4:].tolist() == expected


def test_wrong_names_are_refused() -> None:
    model, ids = peft_model("Llama", "CAUSAL_LM"), tokens(2, 4)
    with fusedprompt.apply(model):
        with pytest.raises(ValueError, match=r"expected names among \['short', 'mlp', 'lstm', '__base__'\]"):
            model.generate(input_ids=ids, adapter_names=["other", "mlp"])
        with pytest.raises(ValueError, match="adapter_names: expected B = 2 names, one per row, got 1"):
            model(input_ids=ids, adapter_names=["mlp"])
