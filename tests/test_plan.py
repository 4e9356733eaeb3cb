"""Plans: what is decided about a call is what is done with it, at the same cost whatever the model's depth."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fusedprompt
from fusedprompt.base.state import BaseState
from fusedprompt.integrations.peft import patch_of
from fusedprompt.routes.call import PEFT, Call, Plan
from fusedprompt.routes.plan import plan
from fusedprompt.routes.run import run
from mixtures import BASE, mixed
from models import build, config_fields, ours, pad, tokens

ROWS = 20
IDS = tokens(8, 10)


def planned(model: Any, **given: Any) -> Plan:
    return plan(model, Call.of(given, model.route))


def first_pass(model: Any) -> list[tuple[int, ...]]:
    """The shapes of the calls of a base model's first layer, from now on."""
    shapes: list[tuple[int, ...]] = []
    model.base_model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def prefix_slots(size: int = 8, length: int = 10) -> Tensor:
    return torch.tensor([[*range(-1, -ROWS - 1, -1), *range(length)]] * size)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"input_ids": IDS},
    "labels": {"input_ids": IDS, "labels": IDS},
    "spliced": {"input_ids": IDS, "route": "splice"},
    "small": {"input_ids": IDS[:1], "labels": IDS[:1]},
    "slots of the prefix": {"input_ids": IDS, "slots": prefix_slots()},
    "other slots": {"input_ids": IDS, "slots": prefix_slots().flip(1)},
    "argument": {"input_ids": IDS, "output_attentions": True},
    "right": {"input_ids": pad(IDS, 0, 3)[0], "attention_mask": pad(IDS, 0, 3)[1]},
}


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_explain_says_the_route_that_forward_takes(case: str, disabled: bool) -> None:
    model, given = ours("Llama", rows=ROWS, attn_implementation="eager"), CASES[case]
    if disabled:
        given = {name: value for name, value in given.items() if name != "slots"}
    model.prompt_encoder["default"].embedding.requires_grad_(True)
    shapes = first_pass(model)
    model._disabled = disabled
    said = model.explain(**given).split("\n")[0].split(":")[0]
    assert not shapes  # nothing runs to find out
    model(**given)
    length = given["input_ids"].shape[1]
    took = "base" if disabled else "shared" if (1, ROWS) in shapes else "splice"
    assert said == f"route {took}" and shapes[-1][1] == (length + ROWS if took == "splice" else length)


def test_a_plan_is_not_changed_by_running_it_and_runs_again() -> None:
    model = ours("Llama", rows=ROWS)
    found = planned(model, input_ids=IDS, labels=IDS)
    assert found.route == "shared" and found.why is None and found.table == (model.prompts["default"],)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.route = "splice"  # type: ignore[misc]
    losses = [run(model, found).loss.detach() for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], model(input_ids=IDS, labels=IDS, route="splice").loss.detach())


@pytest.mark.parametrize("given", [{}, {"route": "splice"}, {"past_key_values": "full"}])
def test_generate_is_explained(given: dict[str, Any]) -> None:
    model = ours("Llama", rows=ROWS)
    arguments = {"input_ids": IDS, **given}
    if "past_key_values" in given:
        arguments["past_key_values"] = model(input_ids=IDS, use_cache=True).past_key_values
    text = model.explain("generate", **arguments)
    route = "splice" if given else "shared"
    assert text.startswith(f"route {route}") and ("the cache is not empty" in text) == ("past_key_values" in given)
    with model.disable_adapter():
        assert model.explain("generate", input_ids=IDS).startswith("route base: ")
    with pytest.raises(ValueError, match="method: expected 'forward' or 'generate', got 'train'"):
        model.explain("train", input_ids=IDS)


def test_a_route_that_cannot_run_is_explained_and_refused_by_its_own_error() -> None:
    model, ids = ours("Bert", "SEQ_CLS", rows=ROWS), tokens(2, 3)
    assert model.explain(input_ids=ids, route="shared").startswith("route shared, which cannot run: the base model's")
    with pytest.raises(fusedprompt.RouteUnavailable, match=r"^route 'shared' cannot run: the base model's") as caught:
        model(input_ids=ids, route="shared")
    assert isinstance(caught.value, fusedprompt.BackendUnavailable) and caught.value.objection in str(caught.value)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("method", ["explain", "__call__"])
def test_logits_must_be_full_or_text(method: str, disabled: bool) -> None:
    model = ours("Llama", rows=ROWS)
    model._disabled = disabled
    with pytest.raises(ValueError, match="logits: expected 'full' or 'text', got 'nonsense'"):
        getattr(model, method)(input_ids=IDS, logits="nonsense")


def test_a_base_that_answers_with_another_cache_is_spliced_and_says_so_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ours("Llama", rows=ROWS)
    expected = model(input_ids=IDS, labels=IDS, route="splice").loss
    forward = model.base_model.forward

    def without(**given: Any) -> Any:
        output = forward(**given)
        output.past_key_values = None
        return output

    monkeypatch.setattr(model.base_model, "forward", without)
    assert planned(model, input_ids=IDS, labels=IDS).route == "shared"
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)
    assert "does not hold the prompt" in str(planned(model, input_ids=IDS, labels=IDS).why)


# What deciding costs


def python_calls(function: Any) -> int:
    """Functions of Python, and steps of generators, that run meanwhile."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def model_of(layers: int, training: bool) -> Any:
    return ours("Llama", rows=ROWS, num_hidden_layers=layers).train(training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["labels", "plain", "small", "generate"])
def test_deciding_takes_the_same_steps_for_every_depth(case: str, training: bool) -> None:
    counts = []
    for layers in (2, 16):
        model = model_of(layers, training)
        given = {"input_ids": IDS} if case == "generate" else CASES[case]
        call = Call.of(given, "auto", generates=case == "generate")
        plan(model, call)
        counts.append(python_calls(lambda model=model, call=call: plan(model, call)))
    assert counts[0] == counts[1] < 420, counts


def test_deciding_for_a_patched_model_takes_the_same_steps_for_every_depth() -> None:
    kind, fields = config_fields("MLP", rows=ROWS)
    counts = []
    for layers in (2, 16):
        base = build("Llama", num_hidden_layers=layers).train()
        model = peft.get_peft_model(base, getattr(peft, kind)(**fields))
        fusedprompt.apply(model)
        patch = patch_of(model)
        assert patch is not None
        call = Call.of({"input_ids": IDS, "labels": IDS}, "auto")
        plan(patch.host, call, PEFT)
        counts.append(python_calls(lambda patch=patch, call=call: plan(patch.host, call, PEFT)))
    assert counts[0] == counts[1] < 420, counts


def test_a_small_batch_asks_the_base_model_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest question first: one row of text saves nothing, whatever the base model is."""
    model = model_of(2, True)
    planned(model, **CASES["labels"])
    monkeypatch.setattr(BaseState, "findings", lambda self: pytest.fail("asked for its settings"))
    assert "too few to pay" in str(planned(model, input_ids=IDS[:1]).why)


# What may change of a base model is seen


def noise(model: Any) -> str | None:
    return BaseState(model).findings().noise


def test_every_change_of_a_base_model_is_seen() -> None:
    model = build("GPT2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    state = BaseState(model)
    layer = model.transformer.h[1]
    steps: list[Any] = [
        lambda: model.train(),
        lambda: setattr(layer.mlp.dropout, "p", 0.5),
        lambda: layer.eval(),
        lambda: layer.train(),
        lambda: setattr(layer.mlp.dropout, "p", 0.0),
        lambda: setattr(model.transformer.h[0].attn, "new_dropout", 0.25),
        lambda: delattr(model.transformer.h[0].attn, "new_dropout"),
        lambda: setattr(model.config, "attention_dropout", 0.1),
        lambda: delattr(model.config, "attention_dropout"),
        lambda: setattr(layer, "mlp", nn.Sequential(nn.Dropout(0.3), layer.mlp)),
        lambda: model.gradient_checkpointing_enable(),
        lambda: layer.mlp.__setitem__(0, nn.Identity()),
        lambda: layer.ln_1.weight.requires_grad_(False),
        lambda: model.requires_grad_(False),
        lambda: layer.attn.c_attn.weight.requires_grad_(True),
    ]
    seen = set()
    for step in steps:
        step()
        fresh = BaseState(model)
        assert state.findings() == fresh.findings()
        assert state.trains() == fresh.trains() == any(p.requires_grad for p in model.parameters())
        assert state.of_kind(nn.Dropout) == [part for part in model.modules() if isinstance(part, nn.Dropout)]
        seen.add((*state.findings(), state.trains()))
    assert len(seen) > 6


def test_an_empty_mixture_and_disabled_adapters_have_reasons() -> None:
    model = mixed("Llama", adapters=("short", "long"))
    found = planned(model, input_ids=IDS, adapter_names=[BASE] * 8)
    assert found.route == "splice" and found.why == "no row has a prompt"
    with model.disable_adapter():
        found = planned(model, input_ids=IDS)
    assert found.route == "base" and found.why == "the model has no prompt, or it is disabled"


@pytest.mark.parametrize("names", [{}, {"adapter_names": ["default"] * 8}], ids=["one", "mixed"])
@pytest.mark.parametrize("route", ["auto", "splice"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": IDS[:, :5]}, r"labels: expected shape \(B, T\) = \(8, 10\), got \(8, 5\)"),
        ({"labels": IDS[:3]}, "labels: expected shape"),
        ({"labels": IDS[0]}, "labels: expected shape"),
        ({"labels": IDS.float()}, "labels: expected an integer dtype, got torch.float32"),
        ({"attention_mask": torch.ones(8, 12)}, "attention_mask: expected shape"),
        ({"attention_mask": IDS.tolist()}, "attention_mask: expected a tensor of shape .*, got list"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids: expected shape \(B, T\) = \(8, 10\), got \(1, 4\)"),
        ({"position_ids": torch.zeros(8, 10)}, "position_ids: expected an integer dtype"),
        ({"input_ids": IDS[0]}, "input_ids: expected shape|adapter_names: expected B"),
        ({"input_ids": IDS.tolist()}, "input_ids: expected a tensor of shape .*, got list"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(8, 10, 3)}, "inputs_embeds: expected shape"),
    ],
)
def test_what_does_not_fit_the_tokens_is_named(given: Any, message: str, route: str, names: Any) -> None:
    model = ours("Llama", rows=ROWS)
    for call in (model, model.explain):
        with pytest.raises((ValueError, TypeError), match=message):
            call(**{"input_ids": IDS, "labels": IDS, **names, **given}, route=route)


def test_explain_and_generate_take_inputs_alike_and_a_model_without_adapters_is_checked() -> None:
    model = ours("Llama", rows=ROWS)
    assert model.explain("generate", inputs=IDS) == model.explain("generate", input_ids=IDS)
    with pytest.raises(ValueError, match="inputs, input_ids: expected one of the two"):
        model.explain("generate", inputs=IDS, input_ids=IDS)
    model.delete_adapter("default")
    assert model.explain(input_ids=IDS).startswith("route base: the model has no prompt")
    with pytest.raises(ValueError, match="logits: expected 'full' or 'text'"):
        model.explain(input_ids=IDS, logits="nonsense")
