"""Which batches take the shared route, what stands against the others, and how the model says so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fusedprompt
from fusedprompt.routes.choice import cost_rule
from models import build, ours, task_inputs, tokens

LARGE = task_inputs("CAUSAL_LM", tokens(8, 10))  # with a prompt of 20 rows, worth sharing


def layer_tokens(model: Any, **inputs: Any) -> list[int]:
    """Tokens that the first layer computes in each of its passes."""
    seen: list[int] = []
    layer = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    model(**inputs)
    hook.remove()
    return seen


SHARED, SPLICED = [20, 80], [240]


def test_auto_shares_where_it_pays_and_the_route_can_be_said() -> None:
    model = ours("Llama", rows=20)
    assert model.route == "auto" and layer_tokens(model, **LARGE) == SHARED
    assert layer_tokens(model, **LARGE, route="splice") == SPLICED
    assert layer_tokens(model, **task_inputs("CAUSAL_LM", tokens(1, 10))) == [30]
    assert layer_tokens(model, **task_inputs("CAUSAL_LM", tokens(1, 10)), route="shared") == [20, 10]
    model.route = "splice"
    assert layer_tokens(model, **LARGE) == SPLICED
    assert layer_tokens(model, **LARGE, route="shared") == SHARED


@pytest.mark.parametrize(
    "set_route", [lambda model: setattr(model, "route", "fast"), lambda m: m(**LARGE, route="fast")]
)
def test_an_unknown_route_is_refused(set_route: Any) -> None:
    with pytest.raises(ValueError, match=r"route: expected one of \('auto', 'shared', 'splice'\), got 'fast'"):
        set_route(ours("Llama", rows=20))


def test_the_route_is_chosen_where_the_model_is_made() -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    model = fusedprompt.get_prompt_model(build("Llama"), config, route="splice")
    assert layer_tokens(model, **LARGE) == SPLICED


@pytest.mark.parametrize(
    ("rows", "size", "length", "kept", "shares"),
    [
        (200, 4, 210, False, True),
        (100, 8, 64, False, True),
        (50, 16, 100, False, True),
        (20, 1, 512, False, False),
        (1, 4, 210, False, False),
        (100, 8, 64, True, True),
        (20, 1, 512, True, False),
    ],
)
def test_the_cost_rule_at_measured_shapes(rows: int, size: int, length: int, kept: bool, shares: bool) -> None:
    assert (cost_rule(rows, size, length, kept) is None) is shares


# Objections. Each is a reason for `auto` to splice, and an error where "shared" was asked for by name.


def training_with_dropout(model: Any) -> None:
    model.base_model.train()
    model.base_model.config.attention_dropout = 0.1


def dropout_module(model: Any) -> None:
    model.base_model.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.2), model.base_model.lm_head).train()


def checkpointing(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()


def attentions(model: Any) -> None:
    model.base_model.set_attn_implementation("eager")
    model.base_model.config.output_attentions = True


STATES = {
    "attention_dropout = 0.1": training_with_dropout,
    "lm_head.0 = 0.2": dropout_module,
    "gradient checkpointing": checkpointing,
    "config.output_attentions": attentions,
}


@pytest.mark.parametrize(("message", "change"), STATES.items(), ids=STATES.keys())
def test_a_state_of_the_base_model_that_is_not_exact_is_spliced(message: str, change: Any) -> None:
    model = ours("Llama", rows=20)
    change(model)
    assert layer_tokens(model, **LARGE)[0] == 240
    with pytest.raises(fusedprompt.BackendUnavailable, match=f"route 'shared' cannot run: .*{message}"):
        model(**LARGE, route="shared")
    assert message in model.explain() and "route splice (" in model.explain()


def test_dropout_does_not_matter_in_evaluation() -> None:
    model = ours("GPT2", rows=20)
    assert layer_tokens(model, **LARGE) == SHARED
    assert layer_tokens(model.train(), **LARGE) == SPLICED  # GPT-2's own default is 0.1
    model.base_model.eval()
    assert layer_tokens(model, **LARGE) == SHARED


ARGUMENTS: dict[str, dict[str, Any]] = {
    "past_key_values": {"past_key_values": "empty"},
    "output_attentions": {"output_attentions": True},
    "logits_to_keep": {"logits_to_keep": 3},
    "cache_position": {"cache_position": torch.arange(30)},
}


@pytest.mark.parametrize(("name", "given"), ARGUMENTS.items(), ids=ARGUMENTS.keys())
def test_an_argument_that_would_have_to_cover_the_prompt_is_spliced(name: str, given: dict[str, Any]) -> None:
    from transformers import DynamicCache

    model = ours("Llama", rows=20, attn_implementation="eager")
    inputs = {key: value for key, value in LARGE.items() if key != "labels"}
    given = {key: DynamicCache() if value == "empty" else value for key, value in given.items()}
    assert layer_tokens(model, **inputs, **given) == SPLICED
    given = {key: DynamicCache() if key == "past_key_values" else value for key, value in given.items()}
    with pytest.raises(fusedprompt.BackendUnavailable, match=name):
        model(**inputs, **given, route="shared")


def test_position_ids_that_may_pack_several_texts_are_spliced() -> None:
    model = ours("Llama", rows=20)
    packed = {"input_ids": tokens(8, 10), "position_ids": torch.arange(5).repeat(1, 2), "use_cache": False}
    assert layer_tokens(model, **packed) == SPLICED
    with pytest.raises(fusedprompt.BackendUnavailable, match="several texts in a row"):
        model(**packed, route="shared")


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_other_tasks_are_spliced(task: str) -> None:
    model = ours("Llama", task, rows=20)
    inputs = task_inputs(task, tokens(8, 10))
    assert layer_tokens(model, **inputs) == SPLICED
    with pytest.raises(fusedprompt.BackendUnavailable, match=f"the adapter's task is {task}|takes no key/value cache"):
        model(**inputs, route="shared")


@pytest.mark.parametrize(("family", "task"), [("Bert", "SEQ_CLS"), ("T5", "SEQ_2_SEQ_LM")])
def test_models_that_look_to_the_right_are_spliced(family: str, task: str) -> None:
    model = ours(family, task, rows=20)
    inputs = task_inputs(task, tokens(8, 10))
    assert model(**inputs).loss.isfinite()
    assert "looks to the right" in model.explain()
    with pytest.raises(fusedprompt.BackendUnavailable, match="looks to the right"):
        model(**inputs, route="shared")


def test_a_prompt_behind_text_is_spliced() -> None:
    base = build("Llama")
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    model = fusedprompt.get_prompt_model(base, config, prompt_start=2)
    assert layer_tokens(model, **LARGE) == SPLICED
    assert "route splice (the prompt stands behind 2 tokens of text (prompt_start))" in model.explain()


@pytest.mark.parametrize(("window", "route"), [(30, SHARED), (29, SPLICED)])
@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
def test_a_window_must_hold_prompt_and_text(family: str, window: int, route: list[int]) -> None:
    model = ours(family, rows=20, sliding_window=window)
    assert layer_tokens(model, **LARGE) == route
    shared, spliced = (model(**LARGE, route=name).loss for name in ("auto", "splice"))
    torch.testing.assert_close(shared, spliced, rtol=1e-5, atol=1e-5)


def test_rotary_embeddings_that_depend_on_the_length_are_spliced() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    parameters = (
        {"rope_parameters": scaling} if hasattr(build("Llama").config, "rope_parameters") else {"rope_scaling": scaling}
    )
    assert "rotary embeddings of type 'dynamic'" in ours("Llama", rows=20, **parameters).explain()


def test_states_that_are_not_keys_and_values_are_spliced() -> None:
    import transformers

    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=67, state_size=4)
    prompt = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, num_attention_heads=1)
    model = fusedprompt.get_prompt_model(transformers.MambaForCausalLM(config), prompt)
    assert "route splice" in model.explain()
    assert model(input_ids=tokens(8, 10)).logits.shape == (8, 30, 67)


def test_a_model_of_unknown_code_is_spliced() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = build("Llama")
            self.config, self.table = inner.config, inner.get_input_embeddings()
            self.score = torch.nn.Linear(1, 1)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.table

        def forward(self, inputs_embeds: torch.Tensor, **given: Any) -> torch.Tensor:
            return inputs_embeds

    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    model = fusedprompt.get_prompt_model(Own(), config)
    assert model(input_ids=tokens(8, 10)).shape == (8, 30, 32)
    assert "Own is no model of transformers" in model.explain()


def test_an_answer_without_a_shareable_cache_is_spliced_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("Llama", rows=20)
    forward = model.base_model.forward

    def without_cache(**given: Any) -> Any:
        return forward(**{**given, "use_cache": False})

    monkeypatch.setattr(model.base_model, "forward", without_cache)
    # First use asks for the loss of 2 rows of 4 tokens, of the code that was put into this instance.
    assert layer_tokens(model, **LARGE) == [8, 20, 240]
    assert layer_tokens(model, **LARGE) == SPLICED
    with pytest.raises(fusedprompt.BackendUnavailable, match="answers with a NoneType"):
        model(**LARGE, route="shared")


def test_explain_says_what_happens_to_a_batch() -> None:
    model = ours("Llama", rows=20)
    assert "route shared where it pays" in model.explain()
    route, row, computed, first_use = model.explain(**LARGE).splitlines()
    assert (route, row) == ("route shared", "row 0: 20P 10t")
    assert computed == "the prompt is computed once, not in every row: 100 of 240 tokens"  # 20 + 8 * 10, 8 * 30
    with torch.no_grad():
        kept = "the prompt is kept between calls: 80 of 240 tokens are computed, and 20 more the first time"
        assert model.explain(**LARGE).splitlines()[2] == kept
    assert re.fullmatch(r"first use: rows are as they are alone \(\d+ ms\)", first_use)
    assert model.explain(**LARGE, output_attentions=True).startswith("route splice: output_attentions is an argument")
    small = model.explain(**task_inputs("CAUSAL_LM", tokens(1, 10)))
    assert small.startswith("route splice: sharing would save 0 of 30 tokens, which is too few to pay\n")
    model.route = "splice"
    assert "route splice (asked for)" in model.explain()
    assert model.explain(**LARGE).startswith("route splice: it was asked for\n")
    model.route = "shared"
    assert "route shared," in model.explain()


@pytest.mark.parametrize(
    ("task", "logits", "message"),
    [("CAUSAL_LM", "some", "'full' or 'text', got 'some'"), ("SEQ_CLS", "text", "'full' for task SEQ_CLS, got 'text'")],
)
def test_logits_that_cannot_be_given_are_refused(task: str, logits: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"logits: expected {message}"):
        ours("Llama", task)(**task_inputs(task, tokens()), logits=logits)
