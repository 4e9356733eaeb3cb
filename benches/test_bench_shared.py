"""The shared route against PEFT: training steps of a 6-layer Llama (D=512, V=32000, random weights).

Two groups: `shared` has PEFT eager and compiled as peers; `cost of a prompt` has no prompt, a prompt of one token and
LoRA of rank 32, these two through PEFT, at the same batch: how much the prompt's tokens cost on top of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest

import fusedprompt

from ._compiled import compiled
from ._interleave import AGAIN, COMPILED, OURS, PEFT, STEP, Case, Contender, measure
from ._models import LARGE, batch_of, contender, llama, lora, no_prompt, step_case

SHAPES = {  # B, N, T
    "aim": (4, 200, 210),
    "many rows": (8, 100, 64),
    "short prompt": (16, 50, 100),
    "one row": (1, 20, 512),
    "one token": (4, 1, 210),
}
ONE_TOKEN = "PEFT N=1"


def prompt_config(rows: int) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)


def theirs_and_ours(rows: int) -> tuple[Any, Any]:
    theirs = peft.get_peft_model(llama(*LARGE), prompt_config(rows))
    ours = fusedprompt.get_prompt_model(llama(*LARGE), prompt_config(rows))
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    return theirs, ours


def build(
    group: str, shape: tuple[int, int, int], peers: Callable[[Any, dict[str, Any]], list[Contender]], note: str = ""
) -> Case:
    """Training steps of ours and PEFT's: forward, backward and AdamW. peers: others, of PEFT's model and the batch."""
    size, rows, length = shape
    batch = batch_of(size, length)
    theirs, ours = theirs_and_ours(rows)
    again, truth = copy.deepcopy(theirs), copy.deepcopy(theirs)
    contenders = [
        contender(OURS, ours, ours, batch),
        contender(PEFT, theirs, theirs, batch),
        *peers(theirs, batch),
        contender(AGAIN, again, again, batch),
    ]
    name = f"training step B={size} N={rows} T={length}{note}"
    return step_case(group, name, contenders, contender("PEFT", truth, truth, batch), seconds=30.0, rounds=(6, 10))


def build_step(size: int, rows: int, length: int, all_peers: bool = True) -> Case:
    """all_peers: with a compiled peer."""

    def peers(theirs: Any, batch: dict[str, Any]) -> list[Contender]:
        to_compile = copy.deepcopy(theirs)
        return [contender(COMPILED, to_compile, compiled(to_compile), batch)] if all_peers else []

    return build("shared", (size, rows, length), peers)


def build_cost(size: int, rows: int, length: int) -> Case:
    """Beside a prompt of one token, none, and LoRA instead."""

    def peers(_: Any, batch: dict[str, Any]) -> list[Contender]:
        one = peft.get_peft_model(llama(*LARGE), prompt_config(1))
        return [
            contender(ONE_TOKEN, one, one, batch, comparable=False),
            no_prompt(LARGE, batch),
            lora(LARGE, batch),
        ]

    return build("cost of a prompt", (size, rows, length), peers, f", floor {1 + rows / (size * length):.2f}")


def _name(shape: tuple[int, int, int]) -> str:
    return "B{}-N{}-T{}".format(*shape)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=_name)
def step(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_step(*request.param)


@pytest.fixture(scope="module", params=[(4, 200, 210), (8, 100, 64), (16, 50, 100)], ids=_name)
def cost(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_cost(*request.param)


def test_training_step(benchmark: Any, step: Case) -> None:
    measure(benchmark, step, STEP)


def test_cost_of_a_prompt(benchmark: Any, cost: Case) -> None:
    measure(benchmark, cost, STEP)
