"""P-tuning's encoders: the whole prompt table (P, D) through an MLP or a bidirectional LSTM with an MLP head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fusedprompt

from . import _work
from ._compiled import COMPILED_ONLY, compiled
from ._interleave import AGAIN, BACKWARD, COMPILED, FORWARD, OURS, PEFT, Case, Contender, check, measure
from ._models import encoder_config

SIZES = [  # encoder, P, D, H
    ("MLP", 20, 768, 768),
    ("MLP", 20, 2048, 2048),
    ("MLP", 100, 1024, 1024),
    ("LSTM", 20, 768, 256),  # larger ones: test_bench_lstm.py
    ("LSTM", 100, 1024, 1024),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of outputs and of gradients. In bf16, ReLU's masks differ from the truth's wherever rounding moves an activation
# across zero: PEFT's gradients are 4 % away from fp64 then.
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (0.01, 0.08)}
ONEDNN_BF16 = "oneDNN's bf16 LSTM, which nn.LSTM uses on CPU, is wrong at some sizes on some processors"


def contender(name: str, module: nn.Module, forward: Callable[[], Tensor], d_rows: Tensor) -> Contender:
    """forward: gives (P, D) or (1, P, D). d_rows: (P, D)."""
    return Contender(
        name,
        forward=forward,
        backward=lambda rows: rows.backward(d_rows.view(rows.shape)),
        outputs=lambda rows: {"rows": rows},
        parameters=dict(module.named_parameters()),
        **(COMPILED_ONLY if name == COMPILED else {}),
    )


def build(kind: str, rows: int, width: int, hidden: int, dtype: str, compile_too: bool = True) -> Case:
    """rows: P. width: D. hidden: H. compile_too: with a compiled peer."""
    config = encoder_config(kind, rows, width, hidden)
    # A seed with which no input of a ReLU lies within rounding of zero, where gradients jump by a percent.
    torch.manual_seed(1)
    theirs = peft.PromptEncoder(config).to(DTYPES[dtype])
    ours = fusedprompt.PromptEncoder(config).to(DTYPES[dtype])
    ours.load_state_dict(theirs.state_dict())
    d_rows = torch.randn(rows, width, dtype=DTYPES[dtype])
    indices = torch.arange(rows).unsqueeze(0)  # PEFT encodes one row of the batch and repeats the result

    def peer(name: str, module: nn.Module, call: Any = None) -> Contender:
        call = module if call is None else call
        return contender(name, module, lambda: call(indices), d_rows.to(module.embedding.weight.dtype))

    contenders = [contender(OURS, ours, ours.encode, d_rows), peer(PEFT, theirs)]
    if compile_too:
        to_compile = copy.deepcopy(theirs)
        contenders.append(peer(COMPILED, to_compile, compiled(to_compile)))
    contenders.append(peer(AGAIN, copy.deepcopy(theirs)))
    return check(
        Case(
            group="encode",
            name=f"{kind} P={rows} D={width} H={hidden}",
            dtype=dtype,
            contenders=contenders,
            truth=peer("PEFT in fp64", copy.deepcopy(theirs).double()),
            tolerance=TOLERANCES[dtype],
            rounds=(4 if hidden * rows > 50_000 else 8, 120),
            peers_may_err=ONEDNN_BF16 if kind == "LSTM" and dtype == "bf16" else "",
            work=(_work.mlp if kind == "MLP" else _work.lstm_encoder)(rows, width, hidden, DTYPES[dtype].itemsize),
        )
    )


@pytest.fixture(
    scope="module",
    params=[(*sizes, dtype) for sizes in SIZES for dtype in DTYPES],
    ids=lambda param: "{}-P{}-D{}-H{}-{}".format(*param),
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(*request.param)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_encode(benchmark: Any, case: Case, mode: str) -> None:
    measure(benchmark, case, mode)
