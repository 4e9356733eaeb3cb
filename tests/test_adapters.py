"""Several adapters on one model: adding, choosing, deleting, disabling, and the heads they carry."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import fusedprompt
from models import build, config_fields, ours, task_inputs, tokens


def two_adapters(task: str = "CAUSAL_LM", family: str = "Llama") -> Any:
    model = ours(family, task, "MLP")
    name, fields = config_fields("PROMPT", task, rows=6)
    model.add_adapter("other", getattr(fusedprompt, name)(**fields))
    return model


def output(model: Any, task: str = "CAUSAL_LM") -> torch.Tensor:
    with torch.no_grad():
        return model(**task_inputs(task, tokens())).logits


def test_each_adapter_gives_its_own_output() -> None:
    model = two_adapters()
    first = output(model)
    assert first.shape[1] == 4 + 7
    model.set_adapter("other")
    second = output(model)
    assert second.shape[1] == 6 + 7
    model.set_adapter("default")
    assert torch.equal(output(model), first)


def test_only_the_active_adapter_is_trainable() -> None:
    model = two_adapters()
    for active in ("default", "other"):
        model.set_adapter(active)
        for name, encoder in model.prompt_encoder.items():
            assert {p.requires_grad for p in encoder.parameters()} == {name == active}
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_disabled_adapters_give_the_base_model() -> None:
    model = two_adapters()
    expected = build("Llama")(input_ids=tokens()).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, expected)
        generated = model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, build("Llama").generate(input_ids=tokens(), max_new_tokens=3, do_sample=False))
    assert model(input_ids=tokens()).logits.shape[1] == 4 + 7


def test_disabling_survives_an_error_and_nests() -> None:
    model = two_adapters()
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter(), model.disable_adapter():
        raise RuntimeError("inside")
    assert model(input_ids=tokens()).logits.shape[1] == 4 + 7


def test_deleting_the_active_adapter_activates_another_and_then_none() -> None:
    model = two_adapters()
    model.delete_adapter("default")
    assert model.active_adapter == "other" and list(model.prompt_encoder) == ["other"]
    assert model(input_ids=tokens()).logits.shape[1] == 6 + 7
    model.delete_adapter("other")
    assert model.active_adapter is None
    assert torch.equal(model(input_ids=tokens()).logits, build("Llama")(input_ids=tokens()).logits)
    name, fields = config_fields("PROMPT")
    model.add_adapter("again", getattr(fusedprompt, name)(**fields))
    assert model.active_adapter == "again"


@pytest.mark.parametrize("bad", ["default", "with.dot", "", 3])
def test_a_bad_adapter_name_is_refused_and_nothing_changes(bad: Any) -> None:
    model = two_adapters()
    before = list(model.state_dict())
    name, fields = config_fields("PROMPT")
    with pytest.raises(ValueError, match=r"already exists|adapter_name"):
        model.add_adapter(bad, getattr(fusedprompt, name)(**fields))
    assert list(model.state_dict()) == before and list(model.peft_config) == ["default", "other"]


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter", "get_prompt_embedding_to_save"])
def test_an_unknown_adapter_is_named(call: str) -> None:
    with pytest.raises(ValueError, match=r"adapter_name: expected one of \['default', 'other'\], got 'nobody'"):
        getattr(two_adapters(), call)("nobody")


def test_a_failing_add_leaves_the_model_as_it_was() -> None:
    model = two_adapters("SEQ_CLS")
    before = list(model.state_dict())
    config = fusedprompt.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, modules_to_save=["nowhere"])
    with pytest.raises(
        ValueError, match="modules_to_save: expected the name of a module of the base model, got 'nowhere'"
    ):
        model.add_adapter("bad", config)
    assert list(model.state_dict()) == before


def test_a_failing_first_adapter_leaves_the_base_model_as_it_was() -> None:
    base = build("Llama", "SEQ_CLS")
    before = list(base.state_dict())
    config = fusedprompt.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, modules_to_save=["nowhere"])
    with pytest.raises(ValueError, match="modules_to_save"):
        fusedprompt.get_prompt_model(base, config)
    assert list(base.state_dict()) == before and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    ("family", "task", "head"),
    [
        ("Llama", "SEQ_CLS", "score"),
        ("Bert", "SEQ_CLS", "classifier"),
        ("Roberta", "TOKEN_CLS", "classifier"),
        ("Bert", "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_task_heads_are_copied_per_adapter_and_trained(family: str, task: str, head: str) -> None:
    model = two_adapters(task, family)
    original = build(family, task).state_dict()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**task_inputs(task, tokens())).loss.backward()
    optimizer.step()
    stand_in = model.base_model.get_submodule(head)
    trained, other = stand_in.modules_to_save["default"], stand_in.modules_to_save["other"]
    for key, value in trained.state_dict().items():
        assert torch.equal(other.state_dict()[key], original[f"{head}.{key}"])
        if value.dim() > 1:
            assert not torch.equal(value, original[f"{head}.{key}"])
    with model.disable_adapter():
        inputs = task_inputs(task, tokens())
        expected, found = build(family, task)(**inputs), model(**inputs)
    for name in ("logits", "start_logits"):
        if found.get(name) is not None:
            assert torch.equal(found[name], expected[name])
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert list(model.base_model.state_dict()) == list(original)


def test_modules_to_save_can_name_the_word_embeddings() -> None:
    config = fusedprompt.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["embed_tokens"]
    )
    model = fusedprompt.get_prompt_model(build("Llama", tie_word_embeddings=False), config)
    model(**task_inputs("CAUSAL_LM", tokens())).loss.backward()
    grad = model.word_embeddings.modules_to_save["default"].weight.grad
    assert grad is not None and grad[tokens()[0, 0]].abs().sum() > 0


def test_parameter_counts_are_those_of_peft(capsys: pytest.CaptureFixture[str]) -> None:
    from models import pair

    theirs, mine = pair("Llama", "SEQ_CLS", "LSTM")
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    mine.print_trainable_parameters()
    assert capsys.readouterr().out == expected


def test_a_table_narrower_than_the_model_gives_the_prompts_width() -> None:
    base = build("OPT", word_embed_proj_dim=16)
    model = fusedprompt.get_prompt_model(
        base, fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert model.prompt_rows().shape == (3, 16) and output(model).shape[1] == 10


def test_a_prompt_model_is_not_a_base_model() -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match="base_model: expected a transformers model, got a PromptModel"):
        fusedprompt.get_prompt_model(ours("Llama"), config)


def test_explain_names_method_route_and_backends() -> None:
    text = ours("Llama", method="LSTM").explain()
    runs = [name for name, reason in fusedprompt.explain("lstm", torch.zeros(1, 4, 16)).items() if reason == "runs"]
    assert (
        text == "default, active: P_TUNING, 4 virtual tokens, route shared where it pays, "
        f"lstm: {runs[0]}, mlp: reference, splice: reference, head_loss: reference"
    )


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_copies_and_pickles_give_the_same_output(method: str) -> None:
    model = ours("Llama", method=method)
    expected = output(model)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), expected)


def test_the_callers_configuration_is_not_changed() -> None:
    config = fusedprompt.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    before = copy.deepcopy(config)
    model = fusedprompt.get_prompt_model(build("Bert", "SEQ_CLS"), config)
    assert config == before
    assert model.peft_config["default"].token_dim == 32 and model.peft_config["default"].encoder_hidden_size == 32


def test_a_peft_configuration_or_a_dictionary_serves_as_well() -> None:
    import peft

    theirs = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for config in (theirs, theirs.to_dict()):
        assert isinstance(
            fusedprompt.get_prompt_model(build("Llama"), config).active_config, fusedprompt.PromptEncoderConfig
        )


@pytest.mark.parametrize(
    ("base", "config", "error", "message"),
    [
        (
            torch.nn.Linear(2, 2),
            {"peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2},
            TypeError,
            "base_model",
        ),
        ("llama", None, TypeError, "config: expected a prompt-learning configuration, got None"),
        ("llama", 3, TypeError, "config: expected a prompt-learning configuration, got int"),
        ("llama", {"peft_type": "LORA"}, ValueError, "peft_type in PROMPT_TUNING, P_TUNING, CPT, .*, got 'LORA'"),
        ("llama", {"peft_type": "P_TUNING", "num_virtual_tokens": 2}, ValueError, "task_type: expected one of"),
        (
            "llama",
            {"peft_type": "P_TUNING", "task_type": "CAUSAL_LM"},
            ValueError,
            "num_virtual_tokens: expected a positive int, got None",
        ),
        (
            "llama",
            {"peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 64},
            ValueError,
            "token_dim: expected the width of the word embeddings, 32, got 64",
        ),
    ],
)
def test_bad_models_and_configurations_are_named(base: Any, config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedprompt.get_prompt_model(build("Llama") if base == "llama" else base, config)
