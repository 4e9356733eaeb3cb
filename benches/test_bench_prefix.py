"""Prefixes of keys and values against PEFT's, on a 6-layer Llama (D=512, V=32000, random weights): training steps, with
a projection and without, and generating behind a long prefix that nothing trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fusedprompt

from ._interleave import AGAIN, OURS, PEFT, STEP, Case, Contender, check, measure
from ._memory import counted_flops
from ._models import LARGE, batch_of, contender, llama, step_case
from ._work import GENERATE, Work

STEPS = [(4, 200, 210, False), (16, 200, 64, True)]  # B, N, T, with a projection
NEW_TOKENS = 24


def theirs_and_ours(rows: int, projection: bool) -> tuple[Any, Any]:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=rows, prefix_projection=projection, encoder_hidden_size=512
    )
    theirs = peft.get_peft_model(llama(*LARGE), config)
    ours = fusedprompt.get_prompt_model(llama(*LARGE), config)
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    return theirs, ours


def build_step(size: int, rows: int, length: int, projection: bool) -> Case:
    """size: B. rows: N. length: T. projection: of a hidden size of 512."""
    batch = batch_of(size, length)
    theirs, ours = theirs_and_ours(rows, projection)
    again, truth = copy.deepcopy(theirs), copy.deepcopy(theirs)
    contenders = [
        contender(OURS, ours, ours, batch),
        contender(PEFT, theirs, theirs, batch),
        contender(AGAIN, again, again, batch),
    ]
    name = f"training step B={size} N={rows} T={length}{', projection' if projection else ''}"
    return step_case("prefix", name, contenders, contender("PEFT", truth, truth, batch), seconds=30.0, rounds=(6, 10))


def build_generate(size: int, rows: int, length: int) -> Case:
    """size: B. rows: N. length: T."""
    batch = {name: value for name, value in batch_of(size, length).items() if name != "labels"}
    theirs, ours = (model.eval() for model in theirs_and_ours(rows, projection=False))

    def generates(name: str, model: Any) -> Contender:
        @torch.no_grad()
        def generate() -> Tensor:
            ids: Tensor = model.generate(**batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            return ids[:, -NEW_TOKENS:]

        return Contender(
            name, forward=generate, backward=lambda _: None, outputs=lambda ids: {"ids": ids}, parameters={}
        )

    contenders = [generates(OURS, ours), generates(PEFT, theirs), generates(AGAIN, copy.deepcopy(theirs))]
    return check(
        Case(
            group="prefix",
            name=f"generate B={size} N={rows} T={length}, {NEW_TOKENS} tokens",
            dtype="fp32",
            contenders=contenders,
            truth=generates("PEFT", copy.deepcopy(theirs)),
            tolerance=(0.0, 0.0),
            work={GENERATE: Work(0.0, counted_flops(contenders[0].forward))},
            seconds=30.0,
            rounds=(4, 10),
        )
    )


@pytest.fixture(scope="module", params=STEPS, ids=lambda param: "B{}-N{}-T{}-{}".format(*param))
def step(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_step(*request.param)


@pytest.fixture(scope="module")
def generation() -> Iterator[Case]:
    yield build_generate(8, 2000, 32)


def test_training_step(benchmark: Any, step: Case) -> None:
    measure(benchmark, step, STEP)


def test_generate(benchmark: Any, generation: Case) -> None:
    measure(benchmark, generation, GENERATE)
