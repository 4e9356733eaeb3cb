"""A prompt-learning method: one record, which is all that the rest of the package knows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layouts.batch import Batch
from ..layouts.layout import Layout
from .config import CONFIG_CLASSES, PromptLearningConfig
from .module import PromptModule

Part = tuple[str, nn.Module, type[nn.Module]]
# What a method's module makes: rows of input embeddings, or keys and values of every layer.
ROWS, CACHE = "rows", "cache"


@dataclass(frozen=True)
class Targets:
    """What a method's own loss is made of: next-token cross entropy as of `ops.cpt_loss`.

    labels: (B, S), -100 where nothing counts. types: (B, S) type codes, which decide with decay about weights.
    or_nan: the loss is NaN, and not 0, in a batch without labels.
    """

    labels: Tensor
    types: Tensor
    decay: float = 1.0
    or_nan: bool = False


@dataclass(frozen=True)
class PeftEncoder:
    """A method's module in PEFT, run on ops of this package.

    class_name: of the module, in `peft`.
    parts: parts with the class that each must be, for ops to read their weights.
    run: (module, indices (1, R)) to rows (R, D).
    run_sharded: the same for weights that are there only while their module runs (ZeRO-3), if PEFT's code reads them
        before that; None for others.
    targets: as of `Method`, in PEFT's arithmetic; the second configuration is that of the adapter "default".
    side_effect: what PEFT's loss does to its caller's tensors.
    """

    class_name: str
    parts: Callable[[Any], Iterator[Part]]
    run: Callable[[Any, Tensor], Tensor]
    run_sharded: Callable[[Any, Tensor], Tensor | None] | None = None
    targets: Callable[[Any, Any, Layout, Batch], Targets] | None = None
    side_effect: Callable[[Any, Batch], None] | None = None


@dataclass(frozen=True)
class Method:
    """A prompt-learning method.

    config: its configuration class, whose `method` names it.
    module: (resolved configuration, word embeddings) to the module that owns its parameters.
    ops: (module) to names of the ops that make its product, in the order in which they run.
    product: what its module makes: "rows" of input embeddings, or a "cache": keys and values of every layer.
    frozen: parts of its module that are never trained.
    saves_encoder: whether training goes on from more than the product, so that it is saved too; or a function that
        tells it of a configuration.
    from_prompt: (module, rows) sets a module that is to be trained from its product alone; None where nothing can.
    targets: (configuration, layout, batch with prompts in their places) to what its own loss counts; None for the base
        model's loss. The batch's labels are the tokens' where the layout has no slots, else the output's.
    num_tasks: (configuration) to the number of prompts that its module makes, one for each of a call's `task_ids`;
        None for one prompt. Such a module is called with distinct tasks, `module(task_ids=(0, 2))`, for (2, R, D).
    kept: (configuration) to the rows of its product that are put in; None for all.
    in_file: parameters of its module that are saved beside the product, and loaded with it.
    peft: its module in PEFT; None where that is called as PEFT calls it.
    """

    config: type[PromptLearningConfig]
    module: Callable[[Any, nn.Module], PromptModule]
    ops: Callable[[Any], tuple[str, ...]]
    product: str = ROWS
    frozen: tuple[str, ...] = ()
    saves_encoder: bool | Callable[[Any], bool] = True
    from_prompt: Callable[[Any, Tensor], None] | None = None
    targets: Callable[[Any, Layout, Batch], Targets] | None = None
    num_tasks: Callable[[Any], int] | None = None
    kept: Callable[[Any], tuple[int, ...] | None] | None = None
    in_file: tuple[str, ...] = ()
    peft: PeftEncoder | None = None

    @property
    def name(self) -> str:
        """Its name, in PEFT's terms if PEFT has it."""
        return name_of(self.config.method)

    def keeps_encoder(self, config: Any) -> bool:
        """`saves_encoder`, of a configuration."""
        return self.saves_encoder if isinstance(self.saves_encoder, bool) else self.saves_encoder(config)


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Make a method known: configurations of its class, and files that name it, build its module.

    Raises:
        ValueError: there is one of that name, or its configuration class has none; or its product is unknown.
    """
    if method.config.method is None or method.name in _METHODS:
        raise ValueError(f"method: expected a configuration class with a new `method`, got {method.config.method!r}")
    if method.product not in (ROWS, CACHE):
        raise ValueError(f"product: expected 'rows' or 'cache', got {method.product!r}")
    _METHODS[method.name], CONFIG_CLASSES[method.name] = method, method.config


def name_of(method: Any) -> str:
    """A method's name: PEFT's enumerations come back from a file as plain strings."""
    return str(getattr(method, "value", method))


def find_method(peft_type: Any) -> Method | None:
    """The method of a configuration's `peft_type`, or None."""
    return _METHODS.get(name_of(peft_type))


def method_of(config: Any) -> Method:
    """The method of a configuration of this package, or of one of PEFT's that this package has too.

    Raises:
        ValueError: it was not registered.
    """
    method = find_method(config.peft_type)
    if method is None:
        raise ValueError(f"peft_type: expected one of {[*_METHODS]}, got {config.peft_type!r}; see register_method")
    return method
