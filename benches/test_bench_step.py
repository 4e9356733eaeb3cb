"""Training steps of whole models (forward, backward, AdamW): prompt tuning, P-tuning and CPT on a Llama with random
weights, beside LoRA and no prompt at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fusedprompt

from ._compiled import compiled
from ._interleave import AGAIN, COMPILED, OURS, PEFT, STEP, Case, measure
from ._models import LARGE, SMALL, batch_of, contender, llama, lora, no_prompt, step_case

CPT_TYPES = [0, 1, 2, 2, 3, 4, 4, 0, 0, 5, 6, 6, 7, 8, 8, 0]  # two examples: template, input, template, label
METHODS: dict[str, tuple[int, int, int, Callable[..., Any]]] = {  # B, P, T, configuration
    "prompt tuning": (4, 200, 210, lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=200)),
    "P-tuning MLP": (
        *(8, 20, 64),
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    ),
    "P-tuning LSTM": (
        *(8, 20, 64),
        lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=20,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=256,
        ),
    ),
    "CPT": (
        *(4, len(CPT_TYPES), 64),
        lambda: peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=list(range(100, 100 + len(CPT_TYPES))),
            cpt_mask=[1] * len(CPT_TYPES),
            cpt_tokens_type_mask=CPT_TYPES,
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.95,
        ),
    ),
}


def build(method: str, size: tuple[int, int, int], small: bool) -> Case:
    """size: layers, D, V. small: with a compiled peer, else with LoRA and the model without a prompt as peers."""
    batch_size, rows, length, config = METHODS[method]
    batch = batch_of(batch_size, length, size[2])
    if method == "CPT":
        batch["input_type_mask"] = torch.tensor([1, 2, 3, 4]).repeat_interleave(length // 4).repeat(batch_size, 1)

    def peer() -> Any:  # built anew each time: a copy would lack the hook that masks CPT's gradient
        model = peft.get_peft_model(llama(*size), config())
        if method == "CPT":  # zeros at first: there would be nothing to project
            nn.init.normal_(model.prompt_encoder["default"].delta_embedding.weight, std=0.01)
        return model

    theirs, truth = peer(), peer()
    ours = fusedprompt.get_prompt_model(llama(*size), config())
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())

    again = peer()
    contenders = [contender(OURS, ours, ours, batch), contender(PEFT, theirs, theirs, batch)]
    if small:
        to_compile = peer()
        contenders.append(contender(COMPILED, to_compile, compiled(to_compile), batch))
    else:
        contenders += [no_prompt(size, batch), lora(size, batch)]
    contenders.append(contender(AGAIN, again, again, batch))
    return step_case(
        "step",
        f"{method} B={batch_size} P={rows} T={length}, {size[0]} layers D={size[1]} V={size[2]}",
        contenders,
        contender("PEFT", truth, truth, batch),
        seconds=3.0 if small else 14.0,
        rounds=(8, 80) if small else (4, 10),
    )


@pytest.fixture(
    scope="module",
    params=[(method, small) for small in (True, False) for method in METHODS],
    ids=lambda param: f"{param[0]}-{'small' if param[1] else 'large'}".replace(" ", "-"),
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    method, small = request.param
    yield build(method, SMALL if small else LARGE, small)


def test_step(benchmark: Any, case: Case) -> None:
    measure(benchmark, case, STEP)
