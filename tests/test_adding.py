"""A method, a task and an op from outside of the package, as a stranger adds them: all that is served serves them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusedprompt as fp
from fusedprompt.base import tasks
from fusedprompt.methods import Method, PromptModule, config, method, register_method
from fusedprompt.ops import _library
from fusedprompt.ops._backend import Op, never_objects
from mixtures import BASE, PADDED, ROUTES, assert_close, check_language_model, gradients, padded
from models import build, task_inputs, tokens
from tolerance import assert_identical, one_thread  # noqa: F401


class Gated(torch.autograd.Function):  # an op: rows[p] * sigmoid(gate[p])
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor) -> Any:
        ctx.save_for_backward(rows, gate)
        return _library.below_autograd("gated", rows, gate)

    @staticmethod
    def backward(ctx: Any, *d_outs: Any) -> Any:
        (rows, gate), (d_out,) = ctx.saved_tensors, d_outs
        return d_out * gate.sigmoid().unsqueeze(1), (d_out * rows).sum(1) * gate.sigmoid() * (-gate).sigmoid()


OP = Op("gated")
OP.add("reference", lambda rows, gate: torch.ops.fusedprompt.gated(rows, gate), never_objects)
OP.add(
    "native",
    lambda rows, gate: rows / (1 + torch.exp(-gate)).unsqueeze(1),
    lambda rows, gate=None: None if len(rows) <= 8 else f"takes at most 8 rows, got {len(rows)}",
)


def gated(rows: Tensor, gate: Tensor, backend: str | None = None) -> Any:
    return OP.select(backend, rows, gate).call(rows, gate)


@dataclass
class GatedConfig(fp.PromptLearningConfig):
    gate_start: float = 0.5
    method: ClassVar[Any] = "GATED"

    def validate(self) -> None:
        super().validate()
        config.check_number("gate_start", self.gate_start, -9.0, 9.0, "a number in [-9, 9)")


class GatedPrompt(PromptModule):
    def __init__(self, config: GatedConfig, word_embeddings: nn.Module) -> None:
        super().__init__(config)
        if not config.inference_mode:
            self.gate = nn.Parameter(torch.full((self.total_virtual_tokens,), config.gate_start))

    def encode(self) -> Any:
        return self.embedding.weight if self.inference_mode else gated(self.embedding.weight, self.gate)


SCORES = tasks.Task("TOKEN_SCORES", labels="tokens", token_outputs=("logits",), shares=True, heads=("score",))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("fusedprompt", "FRAGMENT") as library:
        patch.setattr(method, "_METHODS", dict(method._METHODS))
        patch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
        patch.setattr(_library, "LIBRARY", library)
        patch.setitem(fp.ops.OPS, "gated", OP)
        schema, fake = "gated(Tensor rows, Tensor gate) -> Tensor", lambda rows, gate: torch.empty_like(rows)
        _library.define(schema, lambda rows, gate: rows * gate.sigmoid().unsqueeze(1), fake, Gated.apply)
        register_method(Method(GatedConfig, GatedPrompt, ops=lambda module: ("gated",)))
        tasks.register_task(SCORES)
        yield
        config.CONFIG_CLASSES.pop("GATED")


def gated_model(task: str = "CAUSAL_LM") -> Any:
    """With a prompt of 4 rows, and one of prompt tuning, "tuned", of 2."""
    base = build("Llama", "TOKEN_CLS" if task == SCORES.name else task)
    model: Any = fp.get_prompt_model(base, GatedConfig(task_type=task, num_virtual_tokens=4))
    model.add_adapter("tuned", fp.PromptTuningConfig(task_type=task, num_virtual_tokens=2))
    with torch.no_grad():
        model.prompt_encoder["default"].gate.copy_(torch.linspace(-1, 2, 4))
    return model.eval()


def step(model: Any, route: str, **inputs: Any) -> dict[str, Tensor]:
    """Loss, logits at tokens and every gradient."""
    model.zero_grad()
    output = model(**inputs, route=route, **({"logits": "text"} if model.prompts["default"].task.predicts_next else {}))
    output.loss.backward()
    logits = output.logits.detach()[inputs["attention_mask"] != 0]
    return {"loss": output.loss.detach(), "logits": logits, **gradients(model)}


@pytest.mark.parametrize("padding", PADDED)
def test_a_new_method_takes_the_same_step_on_both_routes_alone_and_mixed(padding: str) -> None:
    model, batch = gated_model(), padded(*PADDED[padding])
    spliced, shared = (step(model, route, **task_inputs("CAUSAL_LM", *batch)) for route in ROUTES)
    assert spliced.keys() == {"loss", "logits", *(f"prompt_encoder.default.{n}" for n in ("gate", "embedding.weight"))}
    assert all(value.any() for value in spliced.values())
    assert_close(shared, spliced)
    model.set_adapter(["default", "tuned"])
    for route in ROUTES:
        check_language_model(model, ["default", BASE, "tuned", "default", "tuned"], *batch, route)


@pytest.mark.parametrize("route", ROUTES)
def test_a_new_method_learns_and_comes_back_from_its_files(route: str, tmp_path: Path) -> None:
    model, inputs, losses = gated_model().train(), task_inputs("CAUSAL_LM", tokens()), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        losses.append(float(step(model, route, **inputs)["loss"]))
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path)
    load = fp.PromptModel.from_pretrained
    served, resumed = (load(build("Llama"), tmp_path, is_trainable=trains) for trains in (False, True))
    assert all(torch.equal(loaded(**inputs).logits, model(**inputs).logits) for loaded in (served, resumed))
    trained = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in (resumed, model)]
    assert len(trained[0]) == 2
    assert_identical(*trained)


def test_a_new_method_generates_the_same_tokens_on_both_routes_and_is_named_by_explain() -> None:
    model, (ids, mask) = gated_model(), padded(*PADDED["left"])
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    spliced, shared = (model.generate(**given, route=route) for route in ROUTES)
    assert torch.equal(shared, spliced) and shared.shape[1] > ids.shape[1]
    with model.disable_adapter():
        assert not torch.equal(model.generate(**given), spliced)
    assert "default, active: GATED, 4 virtual tokens, route shared where it pays, gated: native" in model.explain()


def test_a_new_configuration_is_json_and_its_wrong_fields_are_named() -> None:
    made = GatedConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, gate_start=-2.0)
    fields = json.loads(made.to_json())
    assert fp.PromptLearningConfig.from_dict(fields) == made and fields["peft_type"] == "GATED"
    with pytest.raises(ValueError, match=r"gate_start: expected a number in \[-9, 9\), got 9.5"):
        GatedConfig(gate_start=9.5)
    with pytest.raises(TypeError, match="'gate_strat'"):
        GatedConfig(gate_strat=1.0)  # type: ignore[call-arg]
    with pytest.warns(UserWarning, match=r"GatedConfig has no fields \['gate_strat'\]"):
        fp.PromptLearningConfig.from_dict({**fields, "gate_strat": 1.0})


@pytest.mark.parametrize("padding", PADDED)
def test_a_step_of_a_new_task_is_that_of_rows_alone_joined_by_hand(padding: str) -> None:
    model, inputs = gated_model(SCORES.name), task_inputs("TOKEN_CLS", *padded(*PADDED[padding]))
    base, real, logits = model.base_model, inputs["attention_mask"] != 0, []
    for row, mask in zip(inputs["input_ids"], real):
        joined = torch.cat((model.prompt_rows(), base.get_input_embeddings()(row[mask]))).unsqueeze(0)
        logits.append(base.score.modules_to_save["default"](base.model(inputs_embeds=joined)[0][0, 4:]))
    loss = nn.functional.cross_entropy(torch.cat(logits), inputs["labels"][real])
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {"loss": loss.detach(), "logits": torch.cat(logits).detach(), **gradients(model)}
    assert sum(".score." in name for name in expected) == 2 and len(expected) == 6
    for route in ROUTES:
        for use_cache in (None, False):
            assert_close(step(model, route, **inputs, use_cache=use_cache), expected)
        assert model(**inputs, route=route).logits.shape == (*inputs["input_ids"].shape, 3)


@torch.no_grad()
def test_a_new_tasks_prompts_are_kept_and_its_rows_mix() -> None:
    model, inputs = gated_model(SCORES.name), {"input_ids": tokens(20, 9)}
    for options in ({}, {"adapter_names": ["default", "tuned"] * 10}):
        assert model.explain(**inputs, **options).startswith("route shared\n")
        found, expected = (model(**inputs, **options, route=route).logits for route in ("auto", "splice"))
        assert_close({"logits": found}, {"logits": expected})
    assert len(model.prompt_cache) == 2


def test_a_new_op_runs_the_backend_that_is_asked_for_or_says_why_not() -> None:
    rows, gate, refusal = torch.randn(9, 3), torch.randn(9), "'native' of op 'gated' cannot run: it takes at most 8 row"
    for count, first in ((8, "native"), (9, "reference")):
        assert OP.select("auto", rows[:count], gate[:count]).name == first
        expected = rows[:count] * gate[:count].sigmoid().unsqueeze(1)
        torch.testing.assert_close([gated(rows[:count], gate[:count], b) for b in ("auto", first)], [expected] * 2)
    with fp.use_backend("reference"):
        assert OP.select(None, rows[:8], gate[:8]).name == "reference"
    with pytest.raises(fp.BackendUnavailable, match=refusal):
        gated(rows, gate, "native")
    assert fp.explain("gated", rows) == {"native": "takes at most 8 rows, got 9", "reference": "runs"}
    arguments = rows.double().requires_grad_(), gate.double().requires_grad_()
    torch.library.opcheck(torch.ops.fusedprompt.gated.default, arguments)
    assert torch.autograd.gradcheck(torch.ops.fusedprompt.gated, arguments)


def test_what_cannot_be_registered_says_why() -> None:
    with pytest.raises(ValueError, match="a configuration class with a new `method`, got 'GATED'"):
        register_method(Method(GatedConfig, GatedPrompt, ops=lambda module: ()))

    class Other(GatedConfig):
        method: ClassVar[Any] = "OTHER"

    with pytest.raises(ValueError, match="product: expected 'rows' or 'cache', got 'waves'"):
        register_method(Method(Other, GatedPrompt, ops=lambda module: (), product="waves"))
    with pytest.raises(ValueError, match=r"peft_type: expected one of .*GATED.*, got 'OTHER'; see register_method"):
        fp.get_prompt_model(build("Llama"), Other(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="task: expected a new name, got 'TOKEN_SCORES'"):
        tasks.register_task(SCORES)
    for field, error in (("labels", ValueError), ("token_types", ValueError), ("token_outputs", TypeError)):
        with pytest.raises(error, match=rf"task.{field}: expected "):
            tasks.register_task(tasks.Task("OTHER", **{field: "logits"}))
    with pytest.raises(ValueError, match=r"name: expected one of \(.*\) that op 'gated' has not yet, got 'cuda'"):
        OP.add("cuda", gated, never_objects)
