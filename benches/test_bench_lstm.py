"""The LSTM alone: two layers in both directions at batch 1, against nn.LSTM with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedprompt import ops

from ._interleave import BACKWARD, FORWARD, OURS, Case, Contender, check, measure

SIZES = [(20, 768, 256), (20, 768, 768), (100, 1024, 1024)]  # P, D, H
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (0.02, 0.05)}  # of outputs and of gradients
ONEDNN_BF16 = "oneDNN's bf16 LSTM, which nn.LSTM uses on CPU, is wrong at some sizes on some processors"
STOCK, STOCK_AGAIN, REFERENCE = "nn.LSTM", "nn.LSTM again", "plain PyTorch"


def contender(name: str, module: nn.LSTM, x: Tensor, d_output: Tensor, backend: str | None = None) -> Contender:
    weights = list(module.parameters())
    x = x.clone().requires_grad_()

    def forward() -> Tensor:
        if backend is None:
            return module(x)[0]
        return ops.lstm(x, weights, num_layers=2, backend=backend)

    return Contender(
        name,
        forward=forward,
        backward=lambda output: output.backward(d_output),
        outputs=lambda output: {"output": output},
        parameters={"x": x, **dict(module.named_parameters())},
    )


def build(rows: int, width: int, hidden: int, dtype: str) -> Case:
    """rows: P. width: D. hidden: H."""
    torch.manual_seed(0)
    module = nn.LSTM(width, hidden, 2, bidirectional=True, batch_first=True).to(DTYPES[dtype])
    x = torch.randn(1, rows, width, dtype=DTYPES[dtype])
    d_output = torch.randn(1, rows, 2 * hidden, dtype=DTYPES[dtype])

    def copied(name: str, backend: str | None = None) -> Contender:
        return contender(name, copy.deepcopy(module), x, d_output, backend)

    return check(
        Case(
            group="lstm",
            name=f"LSTM P={rows} D={width} H={hidden}",
            dtype=dtype,
            contenders=[copied(OURS, "native"), copied(STOCK), copied(REFERENCE, "reference"), copied(STOCK_AGAIN)],
            truth=contender("nn.LSTM in fp64", copy.deepcopy(module).double(), x.double(), d_output.double()),
            tolerance=TOLERANCES[dtype],
            rounds=(4 if hidden * rows > 50_000 else 8, 120),
            peers_may_err=ONEDNN_BF16 if dtype == "bf16" else "",
        )
    )


@pytest.fixture(
    scope="module",
    params=[(*sizes, dtype) for sizes in SIZES for dtype in DTYPES],
    ids=lambda param: "P{}-D{}-H{}-{}".format(*param),
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(*request.param)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_lstm(benchmark: Any, case: Case, mode: str) -> None:
    measure(benchmark, case, mode)
