"""Configuration dataclasses: the fields, defaults and JSON of PEFT 0.21's classes of the same names.

A configuration written by either package loads in the other. What PEFT leaves unchecked (a negative number of virtual
tokens, an unknown encoder type, a dropout of 1.5) is refused here with a message that names the field.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

CONFIG_NAME = "adapter_config.json"

# The PEFT release whose file format is written; PEFT reads it back as a hint only.
PEFT_FORMAT_VERSION = "0.21.2"


class PeftType(str, enum.Enum):
    """The prompt-learning methods implemented here, under PEFT's names."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    CPT = "CPT"


class TaskType(str, enum.Enum):
    """What the base model is used for, under PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The networks that can stand between the prompt embedding and the base model in P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


class PromptTuningInit(str, enum.Enum):
    """Where the first value of a prompt-tuning table comes from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


EnumType = TypeVar("EnumType", bound=enum.Enum)
ConfigType = TypeVar("ConfigType", bound="PromptLearningConfig")


def _as_enum(kind: type[EnumType], field: str, value: Any) -> EnumType:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ValueError(f"{field}: expected one of {names}, got {value!r}") from None


def _check_count(field: str, value: Any) -> None:
    """Refuse anything but None (to be derived later) and positive integers."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: expected a positive int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{field}: expected a positive int, got {value}")


def _check_number(field: str, value: Any, low: float, high: float, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field}: expected {rule}, got {value!r} of type {type(value).__name__}")
    if not (low <= value < high):  # also refuses NaN
        raise ValueError(f"{field}: expected {rule}, got {value}")


def format_json(fields: Mapping[str, Any]) -> str:
    """Fields of a configuration as PEFT writes them: sorted, indented by two, sets as lists."""
    listed = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    return json.dumps(listed, indent=2, sort_keys=True)


@dataclass
class PromptLearningConfig:
    """Fields shared by every prompt-learning method; PEFT class `PromptLearningConfig`.

    Args:
        task_type: what the base model does, a `TaskType` or its name.
        peft_type: set by each subclass.
        auto_mapping: PEFT's note on how to find the base model class; carried along, never read.
        peft_version: version of PEFT whose format the file follows.
        base_model_name_or_path: the base model's name, filled by `get_prompt_model`.
        revision: the base model's revision.
        inference_mode: hold only the final prompt rows, without an encoder to train.
        num_virtual_tokens: prompt rows per transformer submodule, at least 1.
        token_dim: width of a prompt row; None takes the base model's hidden size.
        num_transformer_submodules: 2 for SEQ_2_SEQ_LM, else 1, when None.
        num_attention_heads: attention heads of the base model, when None.
        num_layers: layers of the base model, when None.
        modules_to_save: names of base modules that are trained and saved in full beside the prompt.

    Raises:
        ValueError, TypeError: when a field breaks its rule; the message names the field and the value.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    method: ClassVar[PeftType | None] = None

    def __post_init__(self) -> None:
        self.peft_type = self.method
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION
        self.validate()

    @property
    def is_prompt_learning(self) -> bool:
        """True for every class of this module (PEFT asks)."""
        return True

    @property
    def is_adaption_prompt(self) -> bool:
        """False for every class of this module (PEFT asks)."""
        return False

    def validate(self) -> None:
        """Check every field and turn names into enum members; called at construction and when a model is built."""
        if self.task_type is not None:
            self.task_type = _as_enum(TaskType, "task_type", self.task_type)
        for field in (
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
        ):
            _check_count(field, getattr(self, field))
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save: expected a list of module names, got the string {self.modules_to_save!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, as PEFT's `to_dict`."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The text of `adapter_config.json`, formatted as PEFT formats it."""
        return format_json(self.to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into `save_directory`, which is made if missing. The write is atomic."""
        from .checkpoint import write_files

        write_files(save_directory, {CONFIG_NAME: self.to_json().encode()})

    @classmethod
    def from_dict(cls: type[ConfigType], fields: Mapping[str, Any], origin: str = "fields") -> ConfigType:
        """Build the configuration class named by `fields["peft_type"]` (or `cls`).

        Keys that the class does not know are dropped with a warning that lists them, as PEFT does.
        """
        kind = config_class(fields["peft_type"], origin) if "peft_type" in fields else cls
        if kind is PromptLearningConfig:
            raise ValueError(f"{origin}: expected the key 'peft_type', got {sorted(fields)}")
        if not issubclass(kind, cls):
            raise ValueError(f"{origin}: expected a {cls.__name__}, got peft_type {fields['peft_type']}")
        known = {field.name for field in dataclasses.fields(kind)}
        unknown = sorted(set(fields) - known)
        if unknown:
            warnings.warn(
                f"{origin}: {kind.__name__} has no fields {unknown}; they are ignored. The file was probably written "
                "by a newer version.",
                stacklevel=2,
            )
        return kind(**{key: value for key, value in fields.items() if key in known})

    @classmethod
    def from_pretrained(
        cls: type[ConfigType], path: str | os.PathLike[str], subfolder: str | None = None
    ) -> ConfigType:
        """Read `adapter_config.json` from a local folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not JSON, names another method, or breaks a field's rule.
        """
        from .checkpoint import read_json

        file = os.path.join(path, subfolder or "", CONFIG_NAME)
        return cls.from_dict(read_json(file), origin=file)

    def resolved(self: ConfigType, base_config: Any, **overrides: Any) -> ConfigType:
        """A validated copy whose missing fields are filled from a transformers configuration; `self` is unchanged.

        Args:
            base_config: the base model's configuration (its `text_config` is used for multimodal models).
            overrides: fields to set on the copy first.

        Raises:
            ValueError: a field is missing and the base configuration does not tell it either.
        """
        filled = copy.deepcopy(self)
        for key, value in overrides.items():
            setattr(filled, key, value)
        filled.validate()
        if filled.num_virtual_tokens is None:
            raise ValueError("num_virtual_tokens: expected a positive int, got None")
        text_config = base_config.get_text_config() if hasattr(base_config, "get_text_config") else base_config
        for field, names in _DERIVED.items():
            if getattr(filled, field) is None:
                setattr(filled, field, _first_attribute(text_config, field, names))
        if filled.num_transformer_submodules is None:
            filled.num_transformer_submodules = 2 if filled.task_type == TaskType.SEQ_2_SEQ_LM else 1
        filled.validate()
        return filled


# Where transformers configurations keep what PEFT derives, in PEFT's order of preference.
_DERIVED = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def _first_attribute(base_config: Any, field: str, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(base_config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(
        f"{field}: expected a value, because {type(base_config).__name__} has none of {', '.join(names)}, got None"
    )


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (Liu et al., arXiv 2103.10385); PEFT class `PromptEncoderConfig`.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: hidden width of the encoder; None takes `token_dim`.
        encoder_num_layers: hidden layers of the MLP, or layers of the LSTM; 2 is PEFT's MLP.
        encoder_dropout: dropout after each hidden ReLU (MLP) or between layers (LSTM), in training, in [0, 1).
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    method: ClassVar[PeftType | None] = PeftType.P_TUNING

    def validate(self) -> None:
        super().validate()
        self.encoder_reparameterization_type = _as_enum(
            PromptEncoderReparameterizationType,
            "encoder_reparameterization_type",
            self.encoder_reparameterization_type,
        )
        _check_count("encoder_hidden_size", self.encoder_hidden_size)
        if self.encoder_num_layers is None:
            raise TypeError("encoder_num_layers: expected a positive int, got None")
        _check_count("encoder_num_layers", self.encoder_num_layers)
        _check_number("encoder_dropout", self.encoder_dropout, 0.0, 1.0, "a number in [0, 1)")

    def resolved(self, base_config: Any, **overrides: Any) -> PromptEncoderConfig:
        filled = super().resolved(base_config, **overrides)
        if filled.encoder_hidden_size is None:
            filled.encoder_hidden_size = filled.token_dim
        return filled


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (Lester et al., arXiv 2104.08691); PEFT class `PromptTuningConfig`.

    Args:
        prompt_tuning_init: RANDOM draws N(0, 1), SAMPLE_VOCAB copies random word embeddings, TEXT a text's.
        prompt_tuning_init_text: the text, for TEXT.
        tokenizer_name_or_path: the tokenizer to read it with, for TEXT.
        tokenizer_kwargs: arguments for `AutoTokenizer.from_pretrained`, only with TEXT; `trust_remote_code` is dropped.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    method: ClassVar[PeftType | None] = PeftType.PROMPT_TUNING

    def validate(self) -> None:
        super().validate()
        self.prompt_tuning_init = _as_enum(PromptTuningInit, "prompt_tuning_init", self.prompt_tuning_init)
        if self.prompt_tuning_init is PromptTuningInit.TEXT:
            for field in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, field):
                    raise ValueError(
                        f"{field}: expected a non-empty string with prompt_tuning_init='TEXT', "
                        f"got {getattr(self, field)!r}"
                    )
        elif self.tokenizer_kwargs:
            raise ValueError(
                "tokenizer_kwargs: expected None unless prompt_tuning_init='TEXT', "
                f"got {self.tokenizer_kwargs!r} with {self.prompt_tuning_init.value!r}"
            )


@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (Blau et al., arXiv 2410.17222); PEFT class `CPTConfig`.

    `num_virtual_tokens` is always `len(cpt_token_ids)`. Type codes: 0 separators, and with `k` the number of the
    example, 4k+1 input template, 4k+2 input, 4k+3 output template, 4k+4 label.

    Args:
        cpt_token_ids: ids of the context that the prompt starts from.
        cpt_mask: 1 per token; PEFT stores it and never reads it.
        cpt_tokens_type_mask: type code of each token.
        opt_weighted_loss_type: "none", or "decay" to weigh the labels of older examples less.
        opt_loss_decay_factor: weight ratio from one example to the one before it, with "decay".
        opt_projection_epsilon: largest L2 norm of an input token's change, times sqrt(token_dim / 2048).
        opt_projection_format_epsilon: the same for template tokens.
        tokenizer_name_or_path: stored for the reader; not used here.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    method: ClassVar[PeftType | None] = PeftType.CPT

    def __post_init__(self) -> None:
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        if self.cpt_mask is None:
            self.cpt_mask = [1] * len(self.cpt_token_ids)
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * len(self.cpt_token_ids)
        # As PEFT does: these follow from the context and the base model, whatever was passed.
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        self.num_layers = self.token_dim = self.num_attention_heads = None
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"task_type: CPTConfig only supports task_type = CAUSAL_LM, got {self.task_type!r}")
        assert self.cpt_token_ids is not None and self.cpt_mask is not None and self.cpt_tokens_type_mask is not None
        lengths = {
            "cpt_token_ids": len(self.cpt_token_ids),
            "cpt_mask": len(self.cpt_mask),
            "cpt_tokens_type_mask": len(self.cpt_tokens_type_mask),
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, got {lengths}"
            )
        if self.num_virtual_tokens != lengths["cpt_token_ids"]:
            raise ValueError(
                f"num_virtual_tokens: expected len(cpt_token_ids) = {lengths['cpt_token_ids']}, "
                f"got {self.num_virtual_tokens}"
            )
        if any(code < 0 for code in self.cpt_tokens_type_mask):
            raise ValueError(f"cpt_tokens_type_mask: expected codes >= 0, got {min(self.cpt_tokens_type_mask)}")
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f"opt_weighted_loss_type: expected 'none' or 'decay', got {self.opt_weighted_loss_type!r}")
        for field in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            _check_number(field, getattr(self, field), 0.0, math.inf, "a finite number >= 0")


_CLASSES = {config.method: config for config in (PromptEncoderConfig, PromptTuningConfig, CPTConfig)}


def config_class(peft_type: Any, origin: str = "peft_type") -> type[PromptLearningConfig]:
    """The configuration class of a PEFT method; raises ValueError for methods that this package does not implement."""
    try:
        return _CLASSES[PeftType(peft_type)]
    except ValueError:
        names = ", ".join(member.value for member in PeftType)
        raise ValueError(f"{origin}: expected a peft_type in {names}, got {peft_type!r}") from None


def as_config(config: Any) -> PromptLearningConfig:
    """Accept a configuration of this package, PEFT's class of the same name, or a dictionary of its fields."""
    if isinstance(config, PromptLearningConfig):
        return config
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return PromptLearningConfig.from_dict(config, origin="config")
    raise TypeError(f"config: expected a prompt-learning configuration, got {type(config).__name__}")
