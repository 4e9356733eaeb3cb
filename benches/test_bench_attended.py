"""Training steps of a 6-layer Llama (D=512, V=32000, random weights) whose rows read one prefix where it is.

Peers: the same step with keys and values joined in each row, as transformers' caches do; route `splice`; and PEFT. Its
floor is the operations of our own step. Beside time, what a step holds beyond the model against B.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft
import pytest

import fusedprompt
from fusedprompt.routes import attention, planner

from ._interleave import AGAIN, OURS, PEFT, STEP, Case, Contender, measure
from ._models import LARGE, batch_of, contender, llama, step_case

JOINED, SPLICED = "joined", "spliced"
PROMPT, PREFIX = "prompt", "prefix"
SHAPES = [  # method, B, N, T
    (PROMPT, 16, 64, 100),
    (PROMPT, 4, 200, 400),
    (PROMPT, 16, 200, 100),
    (PROMPT, 64, 200, 50),
    (PROMPT, 8, 500, 100),
    (PROMPT, 8, 2000, 100),
    (PROMPT, 4, 4000, 50),
    (PREFIX, 16, 200, 100),
    (PREFIX, 8, 2000, 100),
]
ROWS = [4, 8, 16, 32, 64]  # B, of steps whose memory alone is of interest: N=2000, T=50
MOST = 5000  # positions of a batch, B (N + T), up to which splicing and PEFT, which compute all of them, are measured


def build(method: str, size: int, rows: int, length: int, group: str = "attended", **others: Any) -> Case:
    """size: B. rows: N. length: T. others: fields of the case."""
    make = peft.PromptTuningConfig if method == PROMPT else peft.PrefixTuningConfig
    config = make(task_type="CAUSAL_LM", num_virtual_tokens=rows)
    batch = batch_of(size, length)
    ours = fusedprompt.get_prompt_model(llama(*LARGE), config)

    def copied(name: str, route: str = "auto") -> Contender:
        model = fusedprompt.get_prompt_model(llama(*LARGE), config, route=route)
        model.prompt_encoder["default"].load_state_dict(ours.prompt_encoder["default"].state_dict())
        return contender(name, model, model, batch)

    contenders = [contender(OURS, ours, ours, batch), _joining(copied(JOINED))]
    if size * (rows + length) <= MOST:
        theirs = peft.get_peft_model(llama(*LARGE), config)
        theirs.prompt_encoder["default"].load_state_dict(ours.prompt_encoder["default"].state_dict())
        again = copy.deepcopy(theirs)
        contenders += [copied(SPLICED, "splice")] if method == PROMPT else []
        contenders += [contender(PEFT, theirs, theirs, batch), contender(AGAIN, again, again, batch)]
    truth = _joining(copied("the truth"))
    name = f"{method} B={size} N={rows} T={length}"
    return step_case(group, name, contenders, truth, **{"seconds": 15.0, "rounds": (6, 12), **others})


def _joining(one: Contender) -> Contender:
    """Its forward passes join prefix and text, whatever it costs."""
    forward = one.forward

    def joined() -> Any:
        with mock.patch.object(planner, "cost_rule", lambda rows, size: attention.CHEAP):
            return forward()

    one.forward = joined
    return one


@pytest.fixture(scope="module", params=ROWS)
def rows_of_one_prefix(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(PREFIX, request.param, 2000, 50, "attended memory", seconds=0.0, rounds=(2, 2))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "{}-B{}-N{}-T{}".format(*shape))
def step(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(*request.param)


def test_training_step(benchmark: Any, step: Case) -> None:
    measure(benchmark, step, STEP)


def test_memory(benchmark: Any, rows_of_one_prefix: Case) -> None:
    measure(benchmark, rows_of_one_prefix, STEP)
