"""Prompt rows, token ids, mask and labels into what the base model is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusedprompt
from fusedprompt.ops import splice_batch

from . import _work
from ._compiled import COMPILED_ONLY, compiled
from ._interleave import AGAIN, BACKWARD, COMPILED, FORWARD, OURS, PEFT, Case, Contender, check, measure

VOCABULARY = 32000
SIZES = [(8, 64, 20, 768), (4, 210, 200, 512), (8, 512, 20, 2048)]  # B, T, P, D
Spliced = tuple[Tensor, Tensor, Tensor]


def peft_splice(prompt: Tensor, ids: Tensor, table: Tensor, mask: Tensor, labels: Tensor) -> Spliced:
    """The tensor operations of PEFT's `PeftModelForCausalLM.forward` and `get_prompt`, in their order.

    prompt: (1, P, D), as PEFT's encoder returns it. ids, mask, labels: (B, T). table: (V, D).
    Returns (B, P + T, D) embeddings, and (B, P + T) mask and labels.
    """
    batch, rows = ids.shape[0], prompt.shape[1]
    mask = torch.cat((torch.ones(batch, rows).to(mask.device), mask), dim=1)
    embeds = F.embedding(ids, table)
    labels = torch.cat((torch.full((batch, rows), -100).to(labels.device), labels), dim=1)
    prompts = prompt.repeat(batch, 1, 1).to(embeds.dtype)
    return torch.cat((prompts, embeds), dim=1), mask, labels


def contender(name: str, prompt: Tensor, forward: Callable[[], Spliced], d_embeds: Tensor) -> Contender:
    """d_embeds: (B, P + T, D)."""
    return Contender(
        name,
        forward=forward,
        backward=lambda spliced: spliced[0].backward(d_embeds),
        outputs=lambda spliced: dict(zip(("embeddings", "mask", "labels"), spliced)),
        parameters={"prompt": prompt},
        **(COMPILED_ONLY if name == COMPILED else {}),
    )


def build(batch: int, length: int, rows: int, width: int, compile_too: bool = True) -> Case:
    """batch: B. length: T. rows: P. width: D. compile_too: with a compiled peer."""
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY, width)
    ids = torch.randint(0, VOCABULARY, (batch, length))
    mask = torch.ones_like(ids)
    values = torch.randn(rows, width)
    d_embeds = torch.randn(batch, rows + length, width)
    prompt = values.clone().requires_grad_()
    layout = fusedprompt.Layout.prefix(rows)

    def ours() -> Spliced:
        return splice_batch(prompt, layout, input_ids=ids, table=table, attention_mask=mask, labels=ids)

    def peer(name: str, call: Callable[..., Spliced]) -> Contender:
        own = values.clone().unsqueeze(0).requires_grad_()
        return contender(name, own, lambda: call(own, ids, table, mask, ids), d_embeds)

    contenders = [contender(OURS, prompt, ours, d_embeds), peer(PEFT, peft_splice)]
    if compile_too:
        contenders.append(peer(COMPILED, compiled(peft_splice)))
    contenders.append(peer(AGAIN, peft_splice))
    return check(
        Case(
            group="splice",
            name=f"B={batch} T={length} P={rows} D={width}",
            dtype="fp32",
            contenders=contenders,
            truth=peer("PEFT", peft_splice),
            tolerance=(0.0, 1e-6),
            rounds=(8, 240),
            work=_work.splice(batch, length, rows, width, table.itemsize, values.itemsize),
        )
    )


@pytest.fixture(scope="module", params=SIZES, ids=lambda param: "B{}-T{}-P{}-D{}".format(*param))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(*request.param)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_splice(benchmark: Any, case: Case, mode: str) -> None:
    measure(benchmark, case, mode)
