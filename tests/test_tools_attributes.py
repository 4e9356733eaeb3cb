"""What tools read of a prompt model and set on it: its class, its signature, its attributes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fusedprompt
from models import build, ours, task_inputs, tokens
from test_apply_results import peft_model

TASKS = [
    ("Llama", "CAUSAL_LM"),
    ("T5", "SEQ_2_SEQ_LM"),
    ("Bert", "SEQ_CLS"),
    ("Roberta", "TOKEN_CLS"),
    ("Bert", "QUESTION_ANS"),
    ("Bert", "FEATURE_EXTRACTION"),
]


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_the_class_has_the_base_model_s_name_and_arguments(family: str, task: str) -> None:
    from transformers.utils.generic import find_labels

    base, model = build(family, task), ours(family, task)
    assert isinstance(model, fusedprompt.PromptModel) and type(model).__name__ == type(base).__name__
    assert repr(model).startswith("PromptModel(\n  (base_model): " + type(base).__name__)
    arguments = inspect.signature(model.forward).parameters
    theirs = {
        name for name, one in inspect.signature(base.forward).parameters.items() if one.kind is not one.VAR_KEYWORD
    }
    added = {"route", "logits", "slots", "pool_index", "fields", "adapter_names", "task_ids", "input_type_mask"}
    added |= {"shared_prefix", "shared_prefix_place"}
    assert set(arguments) - {"kwargs"} == theirs | added
    assert find_labels(type(model)) == find_labels(type(base))
    assert type(ours(family, task)) is type(model)


def test_arguments_by_position_are_those_that_the_signature_says() -> None:
    model, ids = ours("Llama"), tokens()
    mask = torch.ones_like(ids)
    bound = inspect.signature(model.forward).bind(ids, mask)
    assert list(bound.arguments) == ["input_ids", "attention_mask"]
    assert torch.equal(model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy],
    ids=["deep", "pickle", "copy"],
)
def test_copies_are_of_the_same_class(copied: Any) -> None:
    model = ours("Llama")
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(other(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_a_subclass_stays_one() -> None:
    class Mine(fusedprompt.PromptModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return "mine"

    model = Mine(build("Llama"))
    assert isinstance(model, Mine) and type(model).__name__ == "LlamaForCausalLM" and model() == "mine"
    assert isinstance(type(model)(build("GPT2")), Mine)


def test_generation_config_and_all_that_is_read_is_written() -> None:
    model = ours("GPT2")
    model.generation_config = transformers.GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=None)
    assert model.generate(input_ids=tokens()).shape[1] == 7 + 5
    assert model.base_model.generation_config is model.generation_config
    for name in ("config", "main_input_name", "name_or_path", "model_tags", "_no_split_modules"):
        value = copy.copy(getattr(model, name))
        setattr(model, name, value)
        assert getattr(model.base_model, name) is value and name not in vars(model)
    head = nn.Linear(32, 67, bias=False)
    model.lm_head = head
    assert model.base_model.lm_head is head and "lm_head" not in model._modules
    model.notes = 3
    assert vars(model)["notes"] == 3 and not hasattr(model.base_model, "notes")
    with pytest.raises(AttributeError):
        model.device = "cpu"


@pytest.mark.parametrize("route", ["splice", "shared", "auto"])
def test_a_loss_function_that_is_set_makes_the_loss(route: str) -> None:
    model = ours("Llama")
    inputs = task_inputs("CAUSAL_LM", tokens())
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().mean() + vocab_size
    output = model(**inputs, route=route)
    torch.testing.assert_close(output.loss, output.logits.mean() + 67)


def test_a_head_with_copies_is_not_replaced() -> None:
    model = ours("Bert", "SEQ_CLS")
    with pytest.raises(
        AttributeError, match=r"classifier: there is a copy for each adapter; set one of .*modules_to_save"
    ):
        model.classifier = nn.Linear(32, 3)


def test_what_means_this_model_is_not_the_base_s() -> None:
    model = ours("Llama", method="MLP")
    own = sum(parameter.numel() for parameter in model.prompt_encoder.parameters())
    base = model.base_model
    assert model.num_parameters() == base.num_parameters() + own
    assert model.num_parameters(only_trainable=True) == own
    assert model.get_memory_footprint() == base.get_memory_footprint() + 4 * own
    for name in ("push_to_hub", "save_pretrained", "num_parameters", "get_memory_footprint"):
        assert getattr(model, name).__self__ is model, name
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.bfloat16().dtype == torch.bfloat16
    assert model.active_adapters == ["default"]
    for name in ("register_for_auto_class", "get_adapter_state_dict", "disable_adapters", "init_weights"):
        assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=r"init_weights: a PromptModel has none; the base model's is"):
        model.init_weights()


def test_hooks_of_accelerate_on_the_base_model_are_its_own() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = ours("Llama")
    expected = model(input_ids=tokens()).logits
    hook = ModelHook()
    add_hook_to_module(model.base_model, hook)
    assert not hasattr(model, "_hf_hook") and not hasattr(model, "_old_forward")
    add_hook_to_module(model, ModelHook())
    assert model.base_model._hf_hook is hook
    assert torch.equal(model(input_ids=tokens()).logits, expected)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(input_ids=tokens()).logits, expected)


def test_a_generation_config_set_on_a_patched_model_is_honoured() -> None:
    for fix in (None, False, True):
        model = peft_model("GPT2")
        if fix is not None:
            fusedprompt.apply(model, fix=fix)
        model.generation_config = transformers.GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=None)
        assert model.generate(input_ids=tokens()).shape[1] == 7 + 5


def test_a_model_wrapped_by_torch_compile_is_named_after_the_inner_one() -> None:
    base = torch.compile(build("Llama"), backend="eager")
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(base, config)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "_orig_mod")
    model.generation_config = transformers.GenerationConfig(max_new_tokens=3)
    assert base._orig_mod.generation_config.max_new_tokens == 3
    assert model.num_parameters() > build("Llama").num_parameters()
