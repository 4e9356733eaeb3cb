"""The shapes of PEFT's MetaMathQA comparison: Llama-3.2-3B (D=3072, V=128256), B=4, T=210, with fewer layers.

The base model is in bf16, adapters in fp32, as there. Each method is PEFT's against ours; LoRA of rank 32 on the query
and value projections, PEFT's default, is the yardstick.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fusedprompt

from ._interleave import OURS, PEFT, STEP, Case, measure
from ._limits import TOY
from ._models import LORA, batch_of, contender, step_case

LAYERS = int(os.environ.get("FUSEDPROMPT_BENCH_LAYERS", "2"))  # the model has 28
WIDTH, VOCABULARY = (48, 256) if TOY else (3072, 128256)
BATCH, LENGTH = (2, 8) if TOY else (4, 210)


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=WIDTH // 24,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).train()


def _encoder(rows: int, kind: str) -> Any:
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=rows, encoder_reparameterization_type=kind, encoder_hidden_size=WIDTH
    )


METHODS: dict[str, Callable[[], Any]] = {
    "prompt tuning N=200": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=200),
    "P-tuning MLP N=20": lambda: _encoder(20, "MLP"),
    "P-tuning LSTM N=50": lambda: _encoder(50, "LSTM"),
}


def build(method: str) -> Case:
    # The base model is frozen and the same for all but LoRA, which puts its own layers into it.
    base, batch, config = base_model(), batch_of(BATCH, LENGTH, VOCABULARY), METHODS[method]()
    theirs = peft.get_peft_model(base, config)
    ours = fusedprompt.get_prompt_model(base, config)
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    with_lora = peft.get_peft_model(base_model(), peft.LoraConfig(r=32, task_type="CAUSAL_LM"))
    truth = copy.copy(theirs)
    # In bf16 the order of summation differs between the routes, and each layer rounds again: errors add up as a walk's.
    depth = max(1.0, LAYERS / 2) ** 0.5
    contenders = [
        contender(OURS, ours, ours, batch),
        contender(PEFT, theirs, theirs, batch),
        contender(LORA, with_lora, with_lora, batch, comparable=False),
    ]
    return step_case(
        "metamath",
        f"{method} B={BATCH} T={LENGTH}, {LAYERS} of 28 layers",
        contenders,
        contender("PEFT", truth, truth, batch),
        dtype="bf16",
        tolerance=(0.02 * depth, 0.1 * depth),
        rounds=(4, 4),
    )


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(request.param)


def test_metamath(benchmark: Any, case: Case) -> None:
    measure(benchmark, case, STEP)
