"""Configuration dataclasses: the fields, defaults and JSON of PEFT 0.21's classes of the same names.

A configuration written by either package loads in the other. What PEFT leaves unchecked (a negative number of virtual
tokens, an unknown encoder type, a dropout of 1.5) is refused here with a message that names the field.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..base.tasks import TaskType, task_of
from .checkpoint import atomic_writes, read_json

CONFIG_NAME = "adapter_config.json"

# The PEFT release whose file format is written; PEFT reads it back as a hint only.
PEFT_FORMAT_VERSION = "0.21.2"


class PeftType(str, enum.Enum):
    """The prompt-learning methods of this package, under PEFT's names."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    CPT = "CPT"
    PREFIX_TUNING = "PREFIX_TUNING"
    CARTRIDGE = "CARTRIDGE"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"


EnumType = TypeVar("EnumType", bound=enum.Enum)
ConfigType = TypeVar("ConfigType", bound="PromptLearningConfig")
CONFIG_CLASSES: dict[str, type[PromptLearningConfig]] = {}  # by method; `register_method` fills it


def as_enum(kind: type[EnumType], field: str, value: Any) -> EnumType:
    """A member of an enumeration, or its value, as the member."""
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ValueError(f"{field}: expected one of {names}, got {value!r}") from None


def check_count(field: str, value: Any) -> None:
    """Refuse anything but None (to be derived later) and positive integers."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field}: expected a positive int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{field}: expected a positive int, got {value}")


def check_number(field: str, value: Any, low: float, high: float, rule: str) -> None:
    """Refuse anything but a number in [low, high)."""
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

    method: ClassVar[PeftType | str | None] = None
    # Arguments that PEFT's class has not, by their keys in a file; PEFT warns of these and drops them.
    own_arguments: ClassVar[Mapping[str, str]] = {}

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
            name = task_of(self.task_type).name
            self.task_type = TaskType(name) if name in TaskType.__members__ else name
        for field in ("num_virtual_tokens", "num_transformer_submodules", *_DERIVED):
            check_count(field, getattr(self, field))
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save: expected a list of module names, got the string {self.modules_to_save!r}"
            )

    @property
    def _submodules(self) -> int:
        if self.num_transformer_submodules is not None:
            return self.num_transformer_submodules
        return 1 if self.task_type is None else task_of(self.task_type).submodules

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, as PEFT's `to_dict`."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The text of `adapter_config.json`, formatted as PEFT formats it."""
        return format_json(self.to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into `save_directory`, which is made if missing. The write is atomic."""
        with atomic_writes(save_directory) as stage:
            (stage / CONFIG_NAME).write_text(self.to_json())

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
        ours = {name: fields[key] for key, name in kind.own_arguments.items() if key in fields}
        unknown = sorted(set(fields) - known - set(kind.own_arguments))
        if unknown:
            warnings.warn(
                f"{origin}: {kind.__name__} has no fields {unknown}; they are ignored. The file was probably written "
                "by a newer version.",
                stacklevel=2,
            )
        return kind(**{key: value for key, value in fields.items() if key in known}, **ours)

    @classmethod
    def from_pretrained(
        cls: type[ConfigType], path: str | os.PathLike[str], subfolder: str | None = None
    ) -> ConfigType:
        """Read `adapter_config.json` from a local folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not JSON, names another method, or breaks a field's rule.
        """
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
        text_config = _text_config(base_config)
        for field, names in _DERIVED.items():
            if getattr(filled, field) is None:
                setattr(filled, field, _first_attribute(text_config, field, names))
        filled.num_transformer_submodules = filled._submodules
        filled.derive(text_config)
        filled.validate()
        return filled

    def derive(self, base_config: Any) -> None:
        """Fill or correct fields by rules of a method's own; all that the base configuration tells is there."""

    def blank(self: ConfigType) -> ConfigType:
        """A configuration whose module may begin with any values, because they are about to be replaced."""
        return self


# Where transformers configurations keep what PEFT derives, in PEFT's order of preference. Only prefixes of keys and
# values depend on layers and heads: where a configuration does not tell them (Mamba, DistilBERT), they stay None.
_DERIVED = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def _text_config(base_config: Any) -> Any:
    """The part about the text that a prompt stands in: of several, the encoder's (T5Gemma)."""
    if not hasattr(base_config, "get_text_config"):
        return base_config
    try:
        return base_config.get_text_config()
    except ValueError:  # transformers: it has more than one
        return base_config.get_text_config(encoder=True)


def _first_attribute(base_config: Any, field: str, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(base_config, name, None)
        if isinstance(value, int):  # heterogeneous models have lists
            return value
    if field != "token_dim":
        return None
    raise ValueError(
        f"{field}: expected a value, because {type(base_config).__name__} has none of {', '.join(names)}, got None"
    )


def config_class(peft_type: Any, origin: str = "peft_type") -> type[PromptLearningConfig]:
    """The configuration class of a PEFT method; raises ValueError for methods that this package does not implement."""
    name = getattr(peft_type, "value", peft_type)
    if name not in CONFIG_CLASSES:
        names = ", ".join(dict.fromkeys([*(member.value for member in PeftType), *CONFIG_CLASSES]))
        raise ValueError(f"{origin}: expected a peft_type in {names}, got {name!r}")
    return CONFIG_CLASSES[name]


def as_config(config: Any, kind: type[ConfigType]) -> ConfigType:
    """One of `kind`, from a configuration of this package, PEFT's of the same name, or a dictionary of its fields."""
    if not isinstance(config, PromptLearningConfig):
        if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
            config = config.to_dict()
        if not isinstance(config, Mapping):
            raise TypeError(f"config: expected a prompt-learning configuration, got {type(config).__name__}")
        config = PromptLearningConfig.from_dict(config, origin="config")
    if not isinstance(config, kind):
        raise TypeError(f"config: expected a {kind.__name__}, got {type(config).__name__}")
    return config
