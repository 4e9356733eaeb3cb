"""Configurations: PEFT's fields, defaults and JSON, and errors for what PEFT lets pass."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import transformers

import fusedprompt
from models import CPT_FIELDS

FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("PromptEncoderConfig", {}),
    ("PromptEncoderConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 7, "encoder_hidden_size": 9}),
    (
        "PromptEncoderConfig",
        {
            "task_type": "SEQ_CLS",
            "num_virtual_tokens": 3,
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 3,
            "encoder_dropout": 0.25,
            "modules_to_save": ["classifier"],
            "inference_mode": True,
            "base_model_name_or_path": "x/y",
            "revision": "main",
        },
    ),
    ("PromptTuningConfig", {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4, "num_transformer_submodules": 2}),
    (
        "PromptTuningConfig",
        {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": 4,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "hello",
            "tokenizer_name_or_path": "somewhere",
            "tokenizer_kwargs": {"use_fast": True},
        },
    ),
    ("MultitaskPromptTuningConfig", {}),
    (
        "MultitaskPromptTuningConfig",
        {
            "task_type": "SEQ_2_SEQ_LM",
            "num_virtual_tokens": 4,
            "prompt_tuning_init": "EXACT_SOURCE_TASK",
            "prompt_tuning_init_state_dict_path": "source/adapter_model.safetensors",
            "prompt_tuning_init_task": 2,
            "num_ranks": 3,
            "num_tasks": 5,
        },
    ),
    ("CPTConfig", {"task_type": "CAUSAL_LM"}),
    ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}),
    (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 4, "init_weights": "zero", "prefix_projection": True, "encoder_hidden_size": 9},
    ),
    ("CartridgeConfig", {"task_type": "SEQ_CLS", "num_virtual_tokens": 4}),
    ("CartridgeConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_frozen_tokens": 0}),
    ("CPTConfig", {"task_type": "CAUSAL_LM", **CPT_FIELDS, "opt_weighted_loss_type": "decay", "token_dim": 64}),
]


def both(name: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    fields = copy.deepcopy(fields)
    return getattr(peft, name)(**copy.deepcopy(fields)), getattr(fusedprompt, name)(**fields)


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_json_equals_what_peft_writes(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs, mine = both(name, fields)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine.save_pretrained(tmp_path / "mine")
    written = (tmp_path / "mine" / "adapter_config.json").read_text()
    assert written == (tmp_path / "theirs" / "adapter_config.json").read_text()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_either_side_reads_what_the_other_wrote(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs, mine = both(name, fields)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine.save_pretrained(tmp_path / "mine")
    assert fusedprompt.PromptLearningConfig.from_pretrained(tmp_path / "theirs") == mine
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "mine")).to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    "name", ["PromptEncoderConfig", "PromptTuningConfig", "MultitaskPromptTuningConfig", "CPTConfig"]
)
def test_fields_and_defaults_are_those_of_peft(name: str) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(getattr(peft, name))}
    mine = {field.name: field.default for field in dataclasses.fields(getattr(fusedprompt, name))}
    assert mine == theirs
    assert list(mine) == list(theirs)  # positional arguments too


def test_names_become_enum_members() -> None:
    config = fusedprompt.PromptEncoderConfig(task_type="SEQ_CLS", encoder_reparameterization_type="LSTM")
    assert config.task_type is fusedprompt.TaskType.SEQ_CLS
    assert config.encoder_reparameterization_type is fusedprompt.PromptEncoderReparameterizationType.LSTM
    assert config.peft_type is fusedprompt.PeftType.P_TUNING
    assert config.is_prompt_learning and not config.is_adaption_prompt
    tuning = fusedprompt.PromptTuningConfig(prompt_tuning_init=fusedprompt.PromptTuningInit.SAMPLE_VOCAB)
    assert tuning.prompt_tuning_init is fusedprompt.PromptTuningInit.SAMPLE_VOCAB


def test_unknown_keys_are_listed_in_a_warning(tmp_path: Path) -> None:
    config = fusedprompt.PromptTuningConfig(num_virtual_tokens=3)
    fields = {**config.to_dict(), "zeta": 1, "alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match=r"no fields \['alpha', 'zeta'\]"):
        assert fusedprompt.PromptTuningConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "adapter_config.json: no such file"),
        ("{", ValueError, "adapter_config.json: expected a JSON object, but it cannot be read"),
        ("[1]", ValueError, "adapter_config.json: expected a JSON object, got list"),
        ("{}", ValueError, "adapter_config.json: expected the key 'peft_type'"),
        ('{"peft_type": "LORA"}', ValueError, "peft_type in PROMPT_TUNING, P_TUNING, CPT, .*, got 'LORA'"),
    ],
)
def test_unreadable_files_are_named(content: str | None, error: type[Exception], message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(error, match=message):
        fusedprompt.PromptLearningConfig.from_pretrained(tmp_path)


def test_a_file_of_another_method_is_refused(tmp_path: Path) -> None:
    fusedprompt.PromptTuningConfig(num_virtual_tokens=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a PromptEncoderConfig, got peft_type PROMPT_TUNING"):
        fusedprompt.PromptEncoderConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        (
            "PromptEncoderConfig",
            {"num_virtual_tokens": 0},
            ValueError,
            "num_virtual_tokens: expected a positive int, got 0",
        ),
        ("PromptEncoderConfig", {"num_virtual_tokens": -3}, ValueError, "num_virtual_tokens"),
        (
            "PromptEncoderConfig",
            {"num_virtual_tokens": 2.0},
            TypeError,
            "num_virtual_tokens: expected a positive int, got 2.0",
        ),
        ("PromptEncoderConfig", {"num_virtual_tokens": True}, TypeError, "num_virtual_tokens"),
        ("PromptEncoderConfig", {"num_virtual_tokens": "20"}, TypeError, "num_virtual_tokens"),
        (
            "PromptEncoderConfig",
            {"task_type": "CAUSAL"},
            ValueError,
            "task_type: expected one of .*CAUSAL_LM.*, got 'CAUSAL'",
        ),
        (
            "PromptEncoderConfig",
            {"encoder_reparameterization_type": "GRU"},
            ValueError,
            "encoder_reparameterization_type: expected one of MLP, LSTM, got 'GRU'",
        ),
        (
            "PromptEncoderConfig",
            {"encoder_num_layers": 0},
            ValueError,
            "encoder_num_layers: expected a positive int, got 0",
        ),
        ("PromptEncoderConfig", {"encoder_num_layers": None}, TypeError, "encoder_num_layers"),
        ("PromptEncoderConfig", {"encoder_hidden_size": 0}, ValueError, "encoder_hidden_size"),
        (
            "PromptEncoderConfig",
            {"encoder_dropout": 1.0},
            ValueError,
            r"encoder_dropout: expected a number in \[0, 1\), got 1.0",
        ),
        ("PromptEncoderConfig", {"encoder_dropout": -0.1}, ValueError, "encoder_dropout"),
        ("MultitaskPromptTuningConfig", {"num_tasks": 0}, ValueError, "num_tasks: expected a positive int, got 0"),
        (
            "MultitaskPromptTuningConfig",
            {"num_ranks": None},
            ValueError,
            "num_ranks: expected a positive int, got None",
        ),
        (
            "MultitaskPromptTuningConfig",
            {"prompt_tuning_init": "SAMPLE_VOCAB"},
            ValueError,
            "prompt_tuning_init: expected one of TEXT, RANDOM, AVERAGE_SOURCE_TASKS, .*, got 'SAMPLE_VOCAB'",
        ),
        (
            "MultitaskPromptTuningConfig",
            {"prompt_tuning_init": "ONLY_SOURCE_SHARED"},
            ValueError,
            "prompt_tuning_init_state_dict_path: expected a file with .*'ONLY_SOURCE_SHARED', got None",
        ),
        (
            "MultitaskPromptTuningConfig",
            {"prompt_tuning_init_task": "x"},
            TypeError,
            "prompt_tuning_init_task: expected",
        ),
        ("PromptEncoderConfig", {"encoder_dropout": float("nan")}, ValueError, "encoder_dropout"),
        ("PromptEncoderConfig", {"encoder_dropout": "0.1"}, TypeError, "encoder_dropout"),
        ("PromptEncoderConfig", {"modules_to_save": "classifier"}, TypeError, "modules_to_save: expected a list"),
        (
            "PromptTuningConfig",
            {"prompt_tuning_init": "ZEROS"},
            ValueError,
            "prompt_tuning_init: expected one of TEXT, SAMPLE_VOCAB, RANDOM, got 'ZEROS'",
        ),
        (
            "PromptTuningConfig",
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"},
            ValueError,
            "tokenizer_name_or_path",
        ),
        (
            "PromptTuningConfig",
            {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
            ValueError,
            "prompt_tuning_init_text",
        ),
        (
            "PromptTuningConfig",
            {"tokenizer_kwargs": {"a": 1}},
            ValueError,
            "tokenizer_kwargs: expected None unless prompt_tuning_init='TEXT'",
        ),
        ("CPTConfig", {}, ValueError, "only supports task_type = CAUSAL_LM"),
        ("CPTConfig", {"task_type": "SEQ_CLS"}, ValueError, "only supports task_type = CAUSAL_LM"),
        (
            "CPTConfig",
            {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]},
            ValueError,
            "must have the same length",
        ),
        (
            "CPTConfig",
            {"task_type": "CAUSAL_LM", "cpt_token_ids": []},
            ValueError,
            "num_virtual_tokens: expected a positive int, got 0",
        ),
        ("CPTConfig", {"task_type": "CAUSAL_LM", "cpt_tokens_type_mask": [-1]}, ValueError, "cpt_tokens_type_mask"),
        (
            "CPTConfig",
            {"task_type": "CAUSAL_LM", "opt_weighted_loss_type": "linear"},
            ValueError,
            "opt_weighted_loss_type",
        ),
        ("CPTConfig", {"task_type": "CAUSAL_LM", "opt_projection_epsilon": -1.0}, ValueError, "opt_projection_epsilon"),
    ],
)
def test_bad_fields_are_named(name: str, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(fusedprompt, name)(**fields)


def test_a_field_changed_after_construction_is_checked_when_it_is_used() -> None:
    config = fusedprompt.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    config.encoder_dropout = 2.0
    with pytest.raises(ValueError, match="encoder_dropout"):
        config.resolved(transformers.LlamaConfig())


def test_missing_fields_come_from_the_base_model_and_the_original_stays() -> None:
    config = fusedprompt.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    before = copy.deepcopy(config)
    filled = config.resolved(transformers.T5Config(d_model=24, num_layers=5, num_heads=3))
    assert config == before
    assert (filled.token_dim, filled.num_layers, filled.num_attention_heads) == (24, 5, 3)
    assert (filled.num_transformer_submodules, filled.encoder_hidden_size) == (2, 24)
    gpt2 = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=99).resolved(
        transformers.GPT2Config(n_embd=24, n_layer=5, n_head=3)
    )
    assert (gpt2.token_dim, gpt2.num_layers, gpt2.num_transformer_submodules) == (24, 99, 1)


def test_multimodal_models_are_asked_for_their_text_configuration() -> None:
    text = SimpleNamespace(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    base = SimpleNamespace(get_text_config=lambda: text, hidden_size=999)
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert config.resolved(base).token_dim == 24


def test_what_the_base_model_does_not_tell_must_be_given() -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="token_dim: expected a value, because SimpleNamespace has none of"):
        config.resolved(SimpleNamespace(num_hidden_layers=4))


def test_layers_and_heads_are_not_asked_of_models_that_do_not_tell_them() -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    filled = config.resolved(SimpleNamespace(hidden_size=4, num_attention_heads=[2, 4]))
    assert (filled.num_layers, filled.num_attention_heads) == (None, None)
