"""PEFT's `forward` with the prompt put in by our routes: PEFT's own layout, shapes and outputs, task by task.

What PEFT does otherwise (warnings, arguments that it rewrites) is not repeated here: they go there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..base.tasks import Task, task_of
from ..methods import find_method, method_of
from ..methods.method import CACHE
from ..ops._backend import AUTO
from ..routes.call import OURS, PEFT, Call
from ..routes.plan import plan
from ..routes.run import run
from .encoders import why_not_adapter
from .host import PeftHost


@dataclass(frozen=True)
class PeftTask:
    """What PEFT's forward of a class does beside putting the prompt in front of the tokens.

    task: of its models.
    token_types: it extends token_type_ids over the prompt; otherwise it drops them, with a warning.
    dropped: arguments that it takes and passes to nobody; task_ids go to prompts that differ by task, if
    hands_on_tasks: it does so.
    """

    task: Task
    token_types: bool = False
    dropped: tuple[str, ...] = ("task_ids",)
    hands_on_tasks: bool = True


TASKS = {
    "PeftModelForCausalLM": PeftTask(task_of("CAUSAL_LM")),
    "PeftModelForSequenceClassification": PeftTask(task_of("SEQ_CLS"), token_types=True),
    "PeftModelForTokenClassification": PeftTask(task_of("TOKEN_CLS"), token_types=True),
    "PeftModelForQuestionAnswering": PeftTask(
        task_of("QUESTION_ANS"), dropped=("task_ids", "token_type_ids", "position_ids"), hands_on_tasks=False
    ),
    "PeftModelForSeq2SeqLM": PeftTask(task_of("SEQ_2_SEQ_LM")),
    "PeftModelForFeatureExtraction": PeftTask(task_of("FEATURE_EXTRACTION"), hands_on_tasks=False),
}


def bind(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, without those that are None; None if PEFT would refuse them."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if args:
        names = list(inspect.signature(method).parameters)[1:]
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return None
        given.update({name: value for name, value in zip(names, args) if value is not None})
    return given


def why_not_call(model: Any, task: PeftTask, given: dict[str, Any]) -> str | None:
    """Why PEFT's own forward serves this call, or None."""
    config = model.active_peft_config
    objection = why_not_adapter(config)
    if objection is not None:
        return objection
    tokens = [given[name] for name in ("input_ids", "inputs_embeds") if name in given]
    if len(tokens) != 1 or tokens[0].dim() != (2 if "input_ids" in given else 3):
        return "it takes either input_ids (B, T) or inputs_embeds (B, T, D)"
    if model.word_embeddings is None and method_of(config).product != CACHE:
        return "PEFT has not found the word embeddings"
    for name in ("attention_mask", "labels", "token_type_ids"):
        value = given.get(name)
        if value is None or name in task.dropped or (name == "labels" and not task.task.predicts_next):
            continue
        if value.shape != tokens[0].shape[:2] or value.device != tokens[0].device:
            return f"{name} is not (B, T) on the tokens' device"
    method = method_of(config)
    if method.num_tasks is not None:
        objection = _why_not_tasks(task, given, tokens[0])
        if objection is not None:
            return objection
    if "position_ids" in given and "position_ids" not in task.dropped and method.product != CACHE:
        return "PEFT ignores position_ids, with a warning"
    if "token_type_ids" in given and not task.token_types and "token_type_ids" not in task.dropped:
        return "PEFT ignores token_type_ids, with a warning"
    if method_of(config).targets is not None and "default" not in model.peft_config:
        return "PEFT reads the settings of CPT's loss from the adapter named 'default', which is not there"
    return None


def _why_not_tasks(task: PeftTask, given: dict[str, Any], tokens: Any) -> str | None:
    """Why PEFT's own forward serves this call of an adapter with a prompt for each task, or None."""
    if not task.hands_on_tasks:
        return f"PEFT hands no task_ids on for {task.task.name}"
    if task.task.submodules > 1:
        return "PEFT has a forward of its own for prompts of tasks in encoder-decoders"
    task_ids = given.get("task_ids")
    if not isinstance(task_ids, torch.Tensor) or task_ids.shape != tokens.shape[:1] or task_ids.is_floating_point():
        return "task_ids is not a tensor of B ids"
    return None


def has_tasks(model: Any) -> bool:
    """Whether an adapter of a PEFT model makes a prompt for each task; PEFT ignores `task_ids` of others."""
    methods = [find_method(config.peft_type) for config in model.peft_config.values()]
    return any(method is not None and method.num_tasks is not None for method in methods)


def run_as_peft(host: PeftHost, task: PeftTask, given: dict[str, Any], spliced_because: set[str]) -> Any:
    """PEFT's forward.

    given: arguments that `why_not_call` has nothing against.
    spliced_because: gets the reason if sharing would pay for this call and cannot run.
    """
    kept = ("task_ids",) if method_of(host.model.active_peft_config).num_tasks is not None else ()
    ours = {name: value for name, value in given.items() if name not in task.dropped or name in kept}
    call = Call.of(ours, host.route)
    planned = plan(host, call, PEFT)
    wanted = host.route == AUTO and planned.pays and task.task.shares and not torch.compiler.is_compiling()
    if wanted and planned.why is not None:
        spliced_because.add(planned.why)
    output, config = run(host, planned), host.model.active_peft_config
    peft = method_of(config).peft
    if peft is not None and peft.side_effect is not None:
        peft.side_effect(config, call.batch)
    return output


def run_as_ours(host: PeftHost, given: dict[str, Any]) -> Any:
    """This package's own forward: with PEFT's defects corrected, and with rows of several adapters."""
    if not has_tasks(host.model):
        given.pop("task_ids", None)
    return run(host, plan(host, Call.of(given, host.route), OURS))
