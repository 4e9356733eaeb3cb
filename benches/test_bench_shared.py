"""The shared route against PEFT: training steps and prefill of a 6-layer Llama (D=512, V=32000, random weights).

Two groups: `shared` has PEFT eager and compiled as peers; `cost of a prompt` has a prompt of one token and LoRA of rank
32, both through PEFT, at the same batch: how much the prompt's tokens cost on top of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fusedprompt

from ._compiled import compiled
from ._interleave import AGAIN, COMPILED, FORWARD, OURS, PEFT, STEP, Case, Contender, check, measure
from .test_bench_step import LARGE, contender, llama

SHAPES = {  # B, N, T
    "aim": (4, 200, 210),
    "many rows": (8, 100, 64),
    "short prompt": (16, 50, 100),
    "one row": (1, 20, 512),
    "one token": (4, 1, 210),
}
TEXT_LOGITS, ONE_TOKEN, LORA = "text logits", "PEFT N=1", "PEFT LoRA 32"


def prompt_config(rows: int) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)


def batch_of(size: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, LARGE[2], (size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def theirs_and_ours(rows: int) -> tuple[Any, Any]:
    theirs = peft.get_peft_model(llama(*LARGE), prompt_config(rows))
    ours = fusedprompt.get_prompt_model(llama(*LARGE), prompt_config(rows))
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    return theirs, ours


def build_step(size: int, rows: int, length: int) -> Case:
    """Training steps: forward, backward and AdamW."""
    batch = batch_of(size, length)
    theirs, ours = theirs_and_ours(rows)
    again, to_compile, truth, text = (copy.deepcopy(model) for model in (theirs, theirs, theirs, ours))
    contenders = [contender(OURS, ours, ours, batch), contender(PEFT, theirs, theirs, batch)]
    contenders.append(contender(TEXT_LOGITS, text, text, {**batch, "logits": "text"}))  # type: ignore[dict-item]
    contenders.append(contender(COMPILED, to_compile, compiled(to_compile), batch))
    contenders.append(contender(AGAIN, again, again, batch))
    return check(
        Case(
            group="shared",
            name=f"training step B={size} N={rows} T={length}",
            dtype="fp32",
            contenders=contenders,
            truth=contender("PEFT", truth, truth, batch),
            tolerance=(1e-5, 1e-4),
            seconds=30.0,
            rounds=(6, 10),
        )
    )


def build_cost(size: int, rows: int, length: int) -> Case:
    """Training steps with the prompt, with a prompt of one token, and with LoRA instead.

    Their outputs differ by design: only ours is compared with the truth.
    """
    batch = batch_of(size, length)
    theirs, ours = theirs_and_ours(rows)
    check(
        Case(
            group="cost of a prompt",
            name="",
            dtype="fp32",
            contenders=[contender(OURS, ours, ours, {**batch, "logits": "text"})],  # type: ignore[dict-item]
            truth=contender("PEFT", theirs, theirs, batch),
            tolerance=(1e-5, 1e-4),
        )
    )
    one = peft.get_peft_model(llama(*LARGE), prompt_config(1))
    again = copy.deepcopy(theirs)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora_config = peft.LoraConfig(r=32, lora_alpha=64, target_modules=linear, task_type="CAUSAL_LM")
    lora = peft.get_peft_model(llama(*LARGE), lora_config)
    full = copy.deepcopy(ours)
    return Case(
        group="cost of a prompt",
        name=f"training step B={size} N={rows} T={length}, floor {1 + rows / (size * length):.2f}",
        dtype="fp32",
        contenders=[
            contender(OURS, full, full, batch),
            contender(PEFT, theirs, theirs, batch),
            contender(TEXT_LOGITS, ours, ours, {**batch, "logits": "text"}),  # type: ignore[dict-item]
            contender(ONE_TOKEN, one, one, batch),
            contender(LORA, lora, lora, batch),
            contender(AGAIN, again, again, batch),
        ],
        truth=contender("PEFT", theirs, theirs, batch),
        tolerance=(1e-5, 1e-4),
        seconds=30.0,
        rounds=(6, 10),
    )


def build_prefill(size: int, rows: int, length: int) -> Case:
    """The first step of generating: logits of the last token, from a prompt whose keys and values are kept."""
    batch = {name: value for name, value in batch_of(size, length).items() if name != "labels"}
    models = theirs_and_ours(rows)
    theirs, ours = (model.eval() for model in models)
    again, truth = copy.deepcopy(theirs), copy.deepcopy(theirs)

    def prefill(name: str, model: Any, **options: Any) -> Contender:
        @torch.no_grad()
        def forward() -> Tensor:
            logits: Tensor = model(**batch, **options).logits[:, -1]
            return logits

        return Contender(name, forward, lambda _: None, lambda logits: {"logits": logits}, {})

    return check(
        Case(
            group="shared",
            name=f"prefill B={size} N={rows} T={length}, prompt kept",
            dtype="fp32",
            contenders=[
                prefill(OURS, ours, logits="text"),
                prefill(PEFT, theirs),
                prefill(AGAIN, again),
            ],
            truth=prefill("PEFT", truth),
            tolerance=(1e-5, 1e-4),
            seconds=10.0,
            rounds=(8, 24),
        )
    )


def _name(shape: tuple[int, int, int]) -> str:
    return "B{}-N{}-T{}".format(*shape)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=_name)
def step(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_step(*request.param)


@pytest.fixture(scope="module", params=[(4, 200, 210), (8, 100, 64), (16, 50, 100), (16, 200, 210)], ids=_name)
def cost(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_cost(*request.param)


@pytest.fixture(scope="module", params=[(8, 100, 64), (1, 20, 512)], ids=_name)
def prefill(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_prefill(*request.param)


def test_training_step(benchmark: Any, step: Case) -> None:
    measure(benchmark, step, STEP)


def test_cost_of_a_prompt(benchmark: Any, cost: Case) -> None:
    measure(benchmark, cost, STEP)


def test_prefill(benchmark: Any, prefill: Case) -> None:
    measure(benchmark, prefill, FORWARD)
