"""The command `tune` in a process of its own that kills itself, as nobody can catch, at a moment of one's choice.

Processes are forked from a server that has imported all they need: each takes as long as its training.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "fusedprompt.commands.tune"]


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def then_die(function: Callable[..., Any], after: int = 1) -> Callable[..., Any]:
    """A function that lives through `after` calls."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append(1)
        if len(calls) == after:
            die()
        return result

    return call


def half_written(state: Any, path: str) -> None:
    Path(path).write_text('{"global_step": 4, "log_hist')
    die()


def prepare(moment: str) -> None:
    """See to it that this process dies at a moment."""
    from transformers import Trainer
    from transformers.trainer_callback import TrainerState

    from fusedprompt.commands.tune import job, settings, training

    owners: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "before training": (training, "train", die),
        "in the first interval": (Trainer, "training_step", then_die(Trainer.training_step)),
        "in a later interval": (Trainer, "training_step", then_die(Trainer.training_step, 3)),
        "in evaluation": (training.curve, "points", die),
        "with half a checkpoint": (Trainer, "_save_rng_state", die),
        "with half a state": (TrainerState, "save_to_json", half_written),
        "with a whole checkpoint": (TrainerState, "save_to_json", then_die(TrainerState.save_to_json)),
        "before saving": (job, "_finish", die),
        "before it is told to be done": (job.curve, "draw", then_die(job.curve.draw)),
        "while its file is written": (settings.os, "replace", die),
    }
    owner, name, function = owners[moment]
    setattr(owner, name, function)


def child(moment: str | None, arguments: Sequence[str]) -> None:
    from fusedprompt.commands.tune import main

    torch.set_num_threads(1)
    if moment is not None:
        prepare(moment)
    raise SystemExit(main(arguments))


def run(moment: str | None, arguments: Sequence[str]) -> int:
    """The exit code of `tune`, or -9."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=child, args=(moment, list(arguments)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
