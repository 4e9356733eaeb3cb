"""Head and loss of a language model, (R, D) hidden states to a scalar: `ops.head_loss` against transformers' loss.

The peers are a Linear without bias and transformers' `ForCausalLMLoss`, as every causal language model runs them. Where
only some rows have labels, as in fine-tuning on answers, the peers compute logits for all, as they do there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from fusedprompt import ops

from . import _work
from ._compiled import COMPILED_ONLY, compiled
from ._interleave import BACKWARD, COMPILED, FORWARD, OURS, Case, Contender, check, measure

TRANSFORMERS = "transformers"
SIZES = [  # R, D, V, dtype, share of rows with labels
    (840, 512, 32000, "fp32", 1.0),
    (840, 512, 32000, "fp32", 0.3),
    (840, 512, 32000, "bf16", 1.0),
    (256, 2048, 32000, "fp32", 1.0),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": (1e-6, 1e-5), "bf16": (0.005, 0.02)}


def build(rows: int, width: int, vocabulary: int, kind: str, labelled: float, trains: bool = True) -> Case:
    """trains: with a gradient for the hidden states; else as in evaluation."""
    torch.manual_seed(0)
    dtype = DTYPES[kind]
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) * 0.05).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[torch.rand(rows) >= labelled] = -100
    # Behind the last position stands nothing; each of the others is predicted by the one before it.
    labels[-1] = -100
    shifted = labels.roll(1).unsqueeze(0)
    shifted[:, 0] = -100
    counted = int((labels != -100).sum())

    def plain(x: Tensor, head: Tensor) -> Tensor:
        loss: Tensor = ForCausalLMLoss(logits=(x @ head.T).unsqueeze(0), labels=shifted, vocab_size=vocabulary)
        return loss

    def ours(x: Tensor, head: Tensor) -> Tensor:
        return ops.head_loss(x, head, labels) / counted

    def contender(name: str, loss: Callable[[Tensor, Tensor], Tensor], wide: bool = False) -> Contender:
        own, head = (hidden.double(), weight.double()) if wide else (hidden, weight)
        own = own.clone().requires_grad_(trains)
        return Contender(
            name,
            forward=lambda: loss(own, head),
            backward=lambda value: value.backward() if trains else None,
            outputs=lambda value: {"loss": value},
            parameters={"hidden": own} if trains else {},
            **(COMPILED_ONLY if name == COMPILED else {}),
        )

    share = "" if labelled == 1.0 else f", {labelled:.0%} labelled"
    contenders = [contender(OURS, ours), contender(TRANSFORMERS, plain)]
    if trains and (rows, labelled) == (840, 1.0):  # compiling takes longer than measuring
        contenders.append(contender(COMPILED, compiled(plain)))
    return check(
        Case(
            group="head loss",
            name=f"R={rows} D={width} V={vocabulary}{share}",
            dtype=kind,
            contenders=contenders,
            truth=contender("fp64", plain, wide=True),
            tolerance=TOLERANCES[kind],
            rounds=(8, 40),
            seconds=3.0,
            work=_work.head_loss(counted, width, vocabulary, dtype.itemsize),
        )
    )


@pytest.fixture(scope="module", params=SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(*request.param)


def test_head_loss(benchmark: Any, case: Case) -> None:
    measure(benchmark, case, BACKWARD)


def test_head_loss_in_evaluation(benchmark: Any) -> None:
    with torch.no_grad():
        measure(benchmark, build(*SIZES[0], trains=False), FORWARD)
