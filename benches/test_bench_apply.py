"""`fusedprompt.apply`: training steps of a PEFT model, patched against unpatched, on a 6-layer Llama (D=512, V=32000).

Two groups: `apply` is what the patch is for; in `nothing to gain` it has nothing to speed up, and may cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fusedprompt

from ._interleave import AGAIN, FORWARD, OURS, PEFT, STEP, Case, Contender, check, measure
from ._models import LARGE, contender, llama
from .test_bench_step import METHODS


def prompt(rows: int, **fields: Any) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows, **fields)


def encoder(rows: int, kind: str) -> Any:
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=rows,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=512,
    )


ANSWERS = "prompt tuning, 30% labelled"  # as in fine-tuning on answers: questions have no labels
CASES: dict[str, tuple[int, int, int, Callable[[], Any]]] = {  # B, N, T, configuration
    "prompt tuning": (4, 200, 210, lambda: prompt(200)),
    "P-tuning MLP": (16, 50, 100, lambda: encoder(50, "MLP")),
    "P-tuning LSTM": (4, 50, 64, lambda: encoder(50, "LSTM")),
    "CPT": METHODS["CPT"],
    ANSWERS: (4, 200, 210, lambda: prompt(200)),
}
# One row of text: nothing to share. Prefix tuning: left alone. Position ids: the call is passed on to PEFT's forward.
IDLE: dict[str, tuple[int, int, int, Callable[[], Any]]] = {
    "prompt tuning, one row": (1, 20, 128, lambda: prompt(20)),
    "prefix tuning": (1, 20, 128, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)),
    "prompt tuning, one row, position ids": (1, 20, 128, lambda: prompt(20)),
}


def build(group: str, name: str, shape: tuple[int, int, int, Callable[[], Any]]) -> Case:
    """Three models of the same weights: patched, unpatched, and unpatched once more."""
    size, rows, length, config = shape
    torch.manual_seed(0)
    ids = torch.randint(0, LARGE[2], (size, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if name == ANSWERS:
        batch["labels"] = ids.masked_fill(torch.arange(length) < 0.7 * length, -100)
    if name == "CPT":
        batch["input_type_mask"] = torch.tensor([1, 2, 3, 4]).repeat_interleave(length // 4).repeat(size, 1)
    if "position ids" in name:
        batch["position_ids"] = torch.arange(length).expand(size, -1)

    def peer() -> Any:  # built anew each time: a copy would lack the hook that masks CPT's gradient
        base = llama(*LARGE)
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config())
        if name == "CPT":  # zeros at first: there would be nothing to project
            nn.init.normal_(model.prompt_encoder["default"].delta_embedding.weight, std=0.01)
        return model

    ours, theirs, again, truth = (peer() for _ in range(4))
    fusedprompt.apply(ours)
    return check(
        Case(
            group=group,
            name=f"{name} B={size} N={rows} T={length}",
            dtype="fp32",
            contenders=[
                contender(label, model, model, batch) for label, model in ((OURS, ours), (PEFT, theirs), (AGAIN, again))
            ],
            truth=contender("PEFT", truth, truth, batch),
            tolerance=(1e-5, 1e-4),
            seconds=20.0 if group == "apply" else 10.0,
            rounds=(6, 24) if group == "apply" else (24, 60),
        )
    )


def build_prefill(size: int, rows: int, length: int) -> Case:
    """`generate` of one token: the text behind a prompt that was kept by an earlier call."""
    torch.manual_seed(0)
    ids = torch.randint(3, LARGE[2], (size, length))

    def generate(name: str, patched: bool = False) -> Contender:
        model = peft.get_peft_model(llama(*LARGE), prompt(rows)).eval()
        if patched:
            fusedprompt.apply(model)
        options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

        def forward() -> Any:
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

        return Contender(name, forward, lambda _: None, lambda output: {"logits": output.logits[0]}, {})

    return check(
        Case(
            group="apply",
            name=f"generate one token B={size} N={rows} T={length}, prompt kept",
            dtype="fp32",
            contenders=[generate(OURS, True), generate(PEFT), generate(AGAIN)],
            truth=generate("PEFT"),
            tolerance=(1e-5, 1e-4),
            seconds=10.0,
            rounds=(6, 24),
        )
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def served(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build("apply", request.param, CASES[request.param])


@pytest.fixture(scope="module", params=IDLE, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def idle(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build("nothing to gain", request.param, IDLE[request.param])


def test_training_step(benchmark: Any, served: Case) -> None:
    measure(benchmark, served, STEP)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_cost_where_nothing_is_gained(benchmark: Any, idle: Case) -> None:
    measure(benchmark, idle, FORWARD)


def test_prefill(benchmark: Any) -> None:
    measure(benchmark, build_prefill(8, 100, 64), FORWARD)
