"""Serving a prompt: the first step of generating, and generating, on a 6-layer Llama (D=512, V=32000, random weights).

Nothing is trained, so ours keeps the prompt's keys and values from one call to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fusedprompt

from ._interleave import AGAIN, OURS, PEFT, Case, Contender, check, measure
from ._memory import counted_flops
from ._models import LARGE, NO_PROMPT, batch_of, llama
from ._work import GENERATE, PREFILL, Work

SHAPES = [(8, 100, 64), (1, 20, 512)]  # B, N, T
NEW_TOKENS = 24


def build(size: int, rows: int, length: int, mode: str) -> Case:
    """size: B. rows: N. length: T. mode: `PREFILL` or `GENERATE`."""
    batch = {name: value for name, value in batch_of(size, length).items() if name != "labels"}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)
    theirs = peft.get_peft_model(llama(*LARGE), config).eval()
    ours = fusedprompt.get_prompt_model(llama(*LARGE), config).eval()
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    base = llama(*LARGE).eval()

    def contender(name: str, model: Any, **options: Any) -> Contender:
        @torch.no_grad()
        def prefill() -> Tensor:
            logits: Tensor = model(**batch, **options).logits[:, -1]
            return logits

        @torch.no_grad()
        def generate() -> Tensor:
            ids: Tensor = model.generate(**batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            return ids[:, -NEW_TOKENS:]

        forward: Callable[[], Tensor] = prefill if mode == PREFILL else generate
        return Contender(
            name,
            forward=forward,
            backward=lambda _: None,
            outputs=lambda result: {"result": result},
            parameters={},
            comparable=name != NO_PROMPT,
        )

    options = {"logits": "text"} if mode == PREFILL else {}
    contenders = [
        contender(OURS, ours, **options),
        contender(PEFT, theirs),
        contender(NO_PROMPT, base),
        contender(AGAIN, copy.deepcopy(theirs)),
    ]
    contenders[0].forward()  # the prompt's own pass
    return check(
        Case(
            group="inference",
            name=f"{mode} B={size} N={rows} T={length}" + (f", {NEW_TOKENS} tokens" if mode == GENERATE else ""),
            dtype="fp32",
            contenders=contenders,
            truth=contender("PEFT", copy.deepcopy(theirs)),
            tolerance=(1e-5 if mode == PREFILL else 0.0, 0.0),
            work={mode: Work(0.0, counted_flops(contenders[0].forward))},
            seconds=8.0,
            rounds=(6, 24),
        )
    )


@pytest.fixture(
    scope="module",
    params=[(*shape, mode) for mode in (PREFILL, GENERATE) for shape in SHAPES],
    ids=lambda param: "B{}-N{}-T{}-{}".format(*param),
)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Case, str]]:
    yield build(*request.param), request.param[-1]


def test_inference(benchmark: Any, case: tuple[Case, str]) -> None:
    measure(benchmark, *case)
