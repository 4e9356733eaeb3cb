"""The patch itself: what it touches, what it says, how it goes away, and what it survives."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fusedprompt
from fusedprompt.integrations import peft as integration
from fusedprompt.methods.method import _METHODS
from models import build, tokens
from test_apply_results import METHODS, inputs_of, peft_model, run
from tolerance import one_thread  # noqa: F401

# Older ones fail in delete_adapter, whatever the prompt method.
DELETES = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)


def state(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Every module's own attributes, by identity, and its hooks and parameters by name."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(part).items()}
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_revert_restores_every_attribute_of_every_module(method: str, fix: bool) -> None:
    model, inputs = peft_model("Llama", method=method), inputs_of("CAUSAL_LM")
    model(**inputs)
    model.generate(input_ids=tokens(), max_new_tokens=2, pad_token_id=0)  # PEFT leaves attributes on the base model
    before, classes = state(model), {part: dict(vars(type(part))) for part in model.modules()}
    patch = fusedprompt.apply(model, fix=fix)
    assert state(model) != before
    assert {name for name, part in state(model).items() if part != before[name]} == {""}
    model(**inputs)
    model.generate(input_ids=tokens(), max_new_tokens=2, pad_token_id=0)
    patch.revert()
    patch.revert()
    assert state(model) == before
    assert classes == {part: dict(vars(type(part))) for part in model.modules()}
    assert integration.patch_of(model) is None
    assert "reverted" in patch.report()


def test_the_context_manager_reverts_also_after_an_error() -> None:
    model = peft_model("Llama")
    before = dict(vars(model))
    with pytest.raises(ZeroDivisionError), fusedprompt.apply(model) as patch:
        assert integration.patch_of(model) is patch
        raise ZeroDivisionError
    assert dict(vars(model)) == before


def test_a_second_patch_is_refused_with_the_remedy() -> None:
    model = peft_model("Llama")
    patch = fusedprompt.apply(model)
    with pytest.raises(ValueError, match=r"revert first: .*patch_of\(peft_model\)\.revert\(\)"):
        fusedprompt.apply(model)
    assert patch.active
    integration.patch_of(model).revert()
    fusedprompt.apply(model).revert()


def lora_model() -> Any:
    return peft.get_peft_model(build("Llama"), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: build("Llama"), {}, TypeError, r"expected a peft.PeftModel, .* got LlamaForCausalLM"),
        (lambda: torch.compile(peft_model("Llama")), {}, TypeError, "before anything wraps it, got OptimizedModule"),
        (lora_model, {}, ValueError, "expected prompt learning, got LORA"),
        (lambda: peft_model("Llama"), {"backend": "fast"}, ValueError, r"backend: expected one of .* got 'fast'"),
        (lambda: peft_model("Llama"), {"route": "fast"}, ValueError, r"route: expected one of .* got 'fast'"),
        (
            lambda: peft_model("Llama", method="MLP"),
            {"backend": "triton"},
            fusedprompt.BackendUnavailable,
            "backend 'triton' of op 'mlp' cannot run: it needs",
        ),
        (
            lambda: peft_model("Bert", "SEQ_CLS"),
            {"route": "shared"},
            fusedprompt.BackendUnavailable,
            "route 'shared' cannot run: the base model's attention looks to the right",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_and_left_as_it_was(
    model: Any, options: dict[str, str], error: type[Exception], message: str
) -> None:
    given = model()
    before = dict(vars(given))
    with pytest.raises(error, match=message):
        fusedprompt.apply(given, **options)
    assert dict(vars(given)) == before


@pytest.mark.parametrize(("library", "version"), [("peft", "0.16.2"), ("peft", "0.22.0"), ("transformers", "6.0.1")])
def test_versions_that_are_not_known_are_refused(library: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model("Llama")
    before = dict(vars(model))
    monkeypatch.setattr(f"{library}.__version__", version)
    with pytest.raises(RuntimeError, match=rf"expected {library} >= .* got {version}; the model is as it was"):
        fusedprompt.apply(model)
    assert dict(vars(model)) == before


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "MultitaskPromptTuningConfig"])
def test_other_methods_are_left_alone_with_the_reason_and_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(build("Llama"), getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    # All of this PEFT's are known here; one of a later PEFT's would not be.
    monkeypatch.delitem(_METHODS, str(model.peft_type.value))
    inputs: dict[str, Any] = inputs_of("CAUSAL_LM")
    if name.startswith("Multi"):
        inputs["task_ids"] = torch.zeros(3, dtype=torch.int64)
    before, expected = dict(vars(model)), model(**inputs).loss
    with fusedprompt.apply(model) as patch:
        assert {key for key in vars(model) if key not in before} == {"_fusedprompt_patch"}
        assert torch.equal(model(**inputs).loss, expected)
        kind = str(model.peft_type.value)
        assert f"adapter default: {kind} is unknown here" in patch.report()
        assert f"default, active: {kind}, left alone" in patch.report()
        assert "defects" not in patch.report()


def test_the_report_names_ops_backends_routes_and_what_is_left_alone() -> None:
    model = peft_model("Llama", method="LSTM")
    with fusedprompt.apply(model, backend="reference") as patch:
        text = patch.report()
        assert text == str(patch)
        assert "backend reference, route auto, as PEFT" in text
        assert "default, active: P_TUNING, 4 virtual tokens, lstm: reference, mlp: reference, splice: reference" in text
        assert "route shared where it pays, else splice" in text
        assert "generate: PEFT's own" in text
        assert "left padding stands between prompt and text" in text
        inputs = inputs_of("CAUSAL_LM")
        with pytest.warns(UserWarning, match="Position ids are not supported"):
            model(**inputs, position_ids=torch.arange(7).expand(3, -1))
        assert "calls that went to PEFT: PEFT ignores position_ids, with a warning" in patch.report()
    model.train()
    model.base_model.config.attention_dropout = 0.1
    with fusedprompt.apply(model, route="splice") as patch:
        assert "lstm: " in patch.report()
        assert "route splice (asked for)" in patch.report()


def test_routes_are_what_the_report_says() -> None:
    model, inputs = peft_model("Llama"), inputs_of("CAUSAL_LM")
    passes: list[int] = []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    for route, number in (("splice", 1), ("shared", 2), ("auto", 1)):  # 3 x 11 tokens are too few to pay
        with fusedprompt.apply(model, route=route):
            passes.clear()
            model(**inputs)
            assert len(passes) == number
    large = {name: torch.cat([value] * 16) for name, value in inputs.items()}
    with fusedprompt.apply(model):
        passes.clear()
        model(**large)
        assert len(passes) == 2
        model.train()
        model.base_model.gradient_checkpointing_enable()
        passes.clear()
        model(**large)
        assert len(passes) == 1
        assert "route splice (gradient checkpointing" in str(integration.patch_of(model))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_come_and_go_as_in_peft(method: str) -> None:
    models = [peft_model("Llama", method=method).double() for _ in range(2)]
    inputs = inputs_of("CAUSAL_LM")
    patch = fusedprompt.apply(models[1], route="splice")
    seen: list[list[torch.Tensor]] = [[], []]
    for model, losses in zip(models, seen):

        def look(model: Any = model, losses: list[torch.Tensor] = losses) -> None:
            losses.append(model(**inputs).loss.detach())

        look()
        torch.manual_seed(11)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.double().set_adapter("second")
        if method == "CPT":
            nn.init.normal_(model.prompt_encoder["second"].delta_embedding.weight)
        look()
        with model.disable_adapter():
            look()
        look()
        model.set_adapter("default")
        look()
        if DELETES:
            model.delete_adapter("second")
            look()
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=0)
    assert len({round(float(loss), 4) for loss in seen[0]}) == 3
    assert patch.active and ("second" in patch.report()) != DELETES


def test_an_adapter_loaded_later_is_served(tmp_path: Path) -> None:
    model, inputs = peft_model("Llama", method="MLP").double(), inputs_of("CAUSAL_LM")
    model.save_pretrained(tmp_path)
    with fusedprompt.apply(model) as patch:
        model.load_adapter(str(tmp_path), "loaded")
        model.set_adapter("loaded")
        loaded = model(**inputs).loss
        assert "loaded, active: P_TUNING, 4 virtual tokens, splice: reference" in patch.report()
        assert "encoder of loaded: inference mode: the prompt is the table itself" in patch.report()
    torch.testing.assert_close(model(**inputs).loss, loaded)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_work(method: str) -> None:
    model, inputs = peft_model("Llama", method=method), inputs_of("CAUSAL_LM")
    patch = fusedprompt.apply(model)
    expected = model(**inputs).loss
    twin = copy.deepcopy(model)
    other = integration.patch_of(twin)
    assert other is not None and other is not patch and other.model is twin
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(**inputs).loss, expected)
    loaded = pickle.loads(pickle.dumps(twin))
    assert integration.patch_of(loaded) is None
    torch.testing.assert_close(loaded(**inputs).loss, expected)
    with fusedprompt.apply(loaded):
        torch.testing.assert_close(loaded(**inputs).loss, expected)
    other.revert()
    assert not any(callable(value) and name in patch.replaced for name, value in vars(twin).items())
    torch.testing.assert_close(twin(**inputs).loss, expected)


@pytest.mark.parametrize("part", ["", "mlp_head", "mlp_head.0", "lstm_head", "embedding"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_an_encoder_see_its_calls(part: str, kind: str) -> None:
    model, inputs = peft_model("Llama", method="LSTM").double(), inputs_of("CAUSAL_LM")
    target, calls = model.prompt_encoder["default"].get_submodule(part), []
    register = {
        "forward": target.register_forward_hook,
        "pre": target.register_forward_pre_hook,
        "backward": target.register_full_backward_hook,
    }[kind]
    register(lambda *_: calls.append(part))
    expected = run(model, inputs)
    number = len(calls)
    with fusedprompt.apply(model) as patch:
        actual = run(model, inputs)
        if part != "embedding":
            assert f"encoder of default: {part or 'encoder'} has hooks" in patch.report()
    assert number > 0 and len(calls) == 2 * number
    torch.testing.assert_close(actual, expected)
    if kind != "backward":
        with fusedprompt.apply(model, route="shared"), torch.no_grad():  # whose prompt would be kept
            for calls_before in (len(calls), len(calls) + number):
                assert len(calls) == calls_before
                model(**inputs)
            model.generate(input_ids=tokens(), max_new_tokens=2, pad_token_id=0)
            assert len(calls) == 5 * number


def test_the_arguments_that_trainer_looks_for_are_peft_s() -> None:
    import inspect

    model = peft_model("Bert", "SEQ_CLS")
    expected = inspect.signature(model.forward)
    with fusedprompt.apply(model):
        assert inspect.signature(model.forward) == expected


def test_a_forward_that_was_wrapped_before_is_left_alone_and_one_wrapped_later_keeps_working() -> None:
    model, inputs = peft_model("Llama", method="MLP"), inputs_of("CAUSAL_LM")
    expected = model(**inputs).loss
    plain = model.forward
    model.forward = lambda **kwargs: plain(**kwargs)
    with fusedprompt.apply(model) as patch:
        assert "forward: another library has wrapped it" in patch.report()
        torch.testing.assert_close(model(**inputs).loss, expected)
    del model.forward
    patch = fusedprompt.apply(model)
    ours = model.forward
    model.forward = lambda **kwargs: ours(**kwargs)
    patch.revert()
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_sharded_parameters_are_read_inside_their_modules_alone() -> None:
    """As ZeRO-3 does: parameters are empty but while their module runs."""
    for method in ("PROMPT", "MLP", "LSTM", "CPT"):
        model, inputs = peft_model("Llama", method=method), inputs_of("CAUSAL_LM")
        expected = model(**inputs).logits.detach()
        for module in [part for part in model.modules() if part._parameters]:
            full = {name: value.data for name, value in module._parameters.items() if value is not None}

            def gather(module: nn.Module, *_: Any, full: dict[str, torch.Tensor] = full) -> None:
                for name, value in full.items():
                    module._parameters[name].data = value

            def shard(module: nn.Module, *_: Any, full: dict[str, torch.Tensor] = full) -> None:
                for name in full:
                    module._parameters[name].data = torch.empty(0)

            module.register_forward_pre_hook(gather)
            module.register_forward_hook(shard)
            shard(module)
        # PEFT itself reads CPT's delta_embedding outside of its forward, and fails.
        with fusedprompt.apply(model):
            torch.testing.assert_close(model(**inputs).logits, expected)
            large = {name: torch.cat([value] * 16) for name, value in inputs.items()}
            with torch.no_grad():  # the shared route, whose keys and values cannot be kept: nobody sees weights change
                torch.testing.assert_close(model(**large).logits[:3], expected, rtol=1e-4, atol=1e-5)
            assert not len(fusedprompt.integrations.peft.patch_of(model).host.prompt_cache)


def test_the_switch_patches_new_models_and_nothing_else(tmp_path: Path) -> None:
    before = (peft.get_peft_model, vars(peft.PeftModel)["from_pretrained"])
    peft_model("Llama", method="MLP").save_pretrained(tmp_path)
    integration.enable(route="splice")
    try:
        with pytest.raises(ValueError, match=r"call disable\(\) first"):
            integration.enable()
        made, loaded = peft_model("Llama"), peft.PeftModel.from_pretrained(build("Llama"), tmp_path)
        for model in (made, loaded):
            patch = integration.patch_of(model)
            assert patch is not None and patch.route == "splice"
        assert type(loaded) is peft.PeftModelForCausalLM
        assert integration.patch_of(lora_model()) is None
    finally:
        integration.disable()
    assert (peft.get_peft_model, vars(peft.PeftModel)["from_pretrained"]) == before
    assert integration.patch_of(peft_model("Llama")) is None
    integration.disable()
