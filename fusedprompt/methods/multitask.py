"""Multitask prompt tuning: one table for all tasks, times a matrix of low rank for each."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base import check
from . import checkpoint
from .config import PeftType, as_config, check_count
from .method import Method, register_method
from .prompt_tuning import PromptEmbedding, PromptTuningConfig

_MATRICES = ("prefix_task_cols", "prefix_task_rows")
_DEVIATION = 0.02  # of the matrices' first values, as in PEFT


class MultitaskPromptTuningInit(str, enum.Enum):
    """Where the first values of table and matrices come from."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_OF_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (Wang et al., arXiv 2303.02861); PEFT class `MultitaskPromptTuningConfig`.

    A batch of such an adapter says its rows' tasks: `task_ids`.

    Args:
        prompt_tuning_init: of the shared table, RANDOM or TEXT as for prompt tuning; or of an adapter that was trained
            on other tasks: ONLY_SOURCE_SHARED takes its table, AVERAGE_SOURCE_TASKS its tasks' mean matrices too,
            EXACT_SOURCE_TASK those of one of them. Each task begins with the same ones then.
        prompt_tuning_init_state_dict_path: that adapter's safetensors file. Read when an adapter is made, and never
            when one is loaded.
        prompt_tuning_init_task: the task that EXACT_SOURCE_TASK takes.
        num_ranks: rank of each task's matrix.
        num_tasks: how many tasks there are; ids count from 0.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    method: ClassVar[PeftType | str | None] = PeftType.MULTITASK_PROMPT_TUNING
    inits: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit

    def validate(self) -> None:
        super().validate()
        for field in ("num_ranks", "num_tasks"):
            if getattr(self, field) is None:
                raise ValueError(f"{field}: expected a positive int, got None")
            check_count(field, getattr(self, field))
        task, path = self.prompt_tuning_init_task, self.prompt_tuning_init_state_dict_path
        if isinstance(task, bool) or not isinstance(task, (int, type(None))):
            raise TypeError(f"prompt_tuning_init_task: expected an int >= 0, got {task!r}")
        if self.prompt_tuning_init in _OF_SOURCE and not path:
            init = MultitaskPromptTuningInit(self.prompt_tuning_init).value
            raise ValueError(
                f"prompt_tuning_init_state_dict_path: expected a file with prompt_tuning_init={init!r}, got {path!r}"
            )


class MultitaskPromptEmbedding(PromptEmbedding):
    """A table that all tasks share, and a matrix for each (arXiv 2303.02861); PEFT class `MultitaskPromptEmbedding`.

    The prompt of task t is embedding.weight * (prefix_task_cols[t] @ prefix_task_rows[t]), (R, D).

    Attributes:
        embedding: `nn.Embedding` (R, D) fp32, as of `PromptEmbedding`.
        prefix_task_cols: (T, R, ranks) fp32, prefix_task_rows: (T, ranks, D) fp32, N(0, 0.02) at first.

    Args:
        config: `MultitaskPromptTuningConfig` with `token_dim` and `num_virtual_tokens`.
        word_embeddings: the base model's input embedding.

    Raises:
        ValueError: the source of the first values does not fit.
        FileNotFoundError: it is not there.
    """

    prefix_task_cols: nn.Parameter
    prefix_task_rows: nn.Parameter

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        config = as_config(config, MultitaskPromptTuningConfig)
        super().__init__(config, word_embeddings)
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        sizes = ((self.total_virtual_tokens, self.num_ranks), (self.num_ranks, self.token_dim))
        for name, size in zip(_MATRICES, sizes):
            values = torch.normal(mean=0.0, std=_DEVIATION, size=(self.num_tasks, *size))
            self.register_parameter(name, nn.Parameter(values))
        if config.prompt_tuning_init in _OF_SOURCE and not config.inference_mode:
            self._begin_with_source(config)

    def forward(self, indices: Tensor | None = None, task_ids: Any = None) -> Tensor:
        """Prompts of tasks.

        Args:
            indices: (B, P) in [0, R), with task_ids (B,) int64: rows of each task's prompt, (B, P, D); as in PEFT.
            task_ids: without indices, k ints: the whole prompts of these tasks, (k, R, D). Without both, the table that
                all share, (R, D).
        """
        if indices is None:
            return self.embedding.weight if task_ids is None else self.encode_tasks(task_ids)
        check.tensor("indices", indices, "(B, P)", 2)
        check.token_ids("indices", indices)
        check.tensor("task_ids", task_ids, "(B,)", 1)
        matrices: Tensor = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        rows: Tensor = self.embedding(indices)
        return rows * matrices

    def encode_tasks(self, task_ids: Sequence[int]) -> Tensor:
        """The prompts (k, R, D) of k tasks."""
        first, count = task_ids[0], len(task_ids)
        step = task_ids[1] - first if count > 1 else 1
        matrices = (self.prefix_task_cols, self.prefix_task_rows)
        if step > 0 and [*task_ids] == [*range(first, first + count * step, step)]:  # a view, as of any two tasks
            cols, rows = (matrix[first : task_ids[-1] + 1 : step] for matrix in matrices)
        else:
            which = _index(tuple(task_ids), self.embedding.weight.device)
            cols, rows = (matrix.index_select(0, which) for matrix in matrices)
        return self.embedding.weight * torch.bmm(cols, rows)

    def _begin_with_source(self, config: Any) -> None:
        path, init = Path(config.prompt_tuning_init_state_dict_path), config.prompt_tuning_init
        if path.suffix != ".safetensors":
            raise ValueError(
                f"prompt_tuning_init_state_dict_path: expected a .safetensors file, got {str(path)!r}"
                + checkpoint.how_to_convert(path)
            )
        source, _ = checkpoint.read_tensors(path)
        given = {checkpoint.PROMPT_KEY: source.get(checkpoint.PROMPT_KEY)}
        parameters = {checkpoint.PROMPT_KEY: self.embedding.weight}
        if init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            given |= {name: source.get(name) for name in _MATRICES}
            parameters |= {name: self.get_parameter(name) for name in _MATRICES}
        for name, parameter in parameters.items():
            value = given[name]
            if value is None:
                raise ValueError(f"{path}: expected the tensor {name!r}, got {sorted(source)}")
            if name in _MATRICES:
                value = _of_task(path, value, init, config.prompt_tuning_init_task or 0)
            shape = parameter.shape[-2:]
            if value.shape != shape:
                raise ValueError(f"{path}: {name!r}: expected shape {(*shape,)} of a task, got {(*value.shape,)}")
            with torch.no_grad():
                parameter.copy_(value.expand_as(parameter))


def _of_task(path: Path, matrices: Tensor, init: Any, task: int) -> Tensor:
    """What a task begins with, of a source's (T, ...) matrices."""
    if init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
        return matrices.mean(0)
    if not 0 <= task < len(matrices):
        raise ValueError(f"prompt_tuning_init_task: expected a task in [0, {len(matrices)}) of {path}, got {task}")
    return matrices[task]


@functools.lru_cache(maxsize=256)
def _index(task_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids on a device, copied there once, for training too if the first use was in inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(task_ids, device=device)


def _from_prompt(module: Any, prompt: Tensor) -> None:
    module.embedding.weight.copy_(prompt)


register_method(
    Method(
        MultitaskPromptTuningConfig,
        MultitaskPromptEmbedding,
        ops=lambda module: (),
        saves_encoder=False,
        from_prompt=_from_prompt,
        num_tasks=lambda config: int(config.num_tasks),
        in_file=_MATRICES,
    )
)
