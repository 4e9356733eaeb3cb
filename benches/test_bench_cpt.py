"""CPT: the projected context (P, D), and the weighted loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fusedprompt
from fusedprompt import ops

from . import _work
from ._compiled import COMPILED_ONLY, compiled
from ._interleave import AGAIN, BACKWARD, COMPILED, FORWARD, OURS, PEFT, Case, Contender, check, measure

# A label of every example ends in code 4k; each example has a template, an input, a template and a label.
EXAMPLE = [1, 2, 2, 2, 3, 4, 4, 0]
ENCODE = [(32, 768), (256, 4096)]  # P, D
LOSS = [(4, 16, 64, 32000)]  # B, P, T, V


def config_of(rows: int, width: int) -> Any:
    types = [code + 4 * (index // len(EXAMPLE)) if code else 0 for index, code in enumerate(EXAMPLE * (rows // 8))]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(rows)),
        cpt_mask=[1] * rows,
        cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.95,
    )
    config.token_dim = width
    return config


def build_encode(rows: int, width: int) -> Case:
    """rows: P. width: D."""
    torch.manual_seed(0)
    config, table = config_of(rows, width), nn.Embedding(rows, width)
    change, d_rows = torch.randn(rows, width), torch.randn(rows, width)
    indices = torch.arange(rows).unsqueeze(0)

    def theirs(name: str, compile_it: bool = False) -> Contender:
        module = peft.CPTEmbedding(config, table)
        with torch.no_grad():
            module.delta_embedding.weight.copy_(change)
        call: Callable[..., Tensor] = compiled(module) if compile_it else module
        return contender(name, module, lambda: call(indices))

    def contender(name: str, module: Any, forward: Callable[[], Tensor]) -> Contender:
        return Contender(
            name,
            forward=forward,
            backward=lambda rows: rows.backward(d_rows.view(rows.shape)),
            outputs=lambda rows: {"rows": rows},
            parameters={"delta": module.delta_embedding.weight},
            **(COMPILED_ONLY if name == COMPILED else {}),
        )

    own = fusedprompt.CPTConfig.from_dict(config.to_dict())
    own.token_dim = width  # a configuration forgets it, as PEFT's does
    ours = fusedprompt.CPTEmbedding(own, table)
    with torch.no_grad():
        ours.delta_embedding.weight.copy_(change)
    return check(
        Case(
            group="cpt",
            name=f"context P={rows} D={width}",
            dtype="fp32",
            contenders=[contender(OURS, ours, ours.encode), theirs(PEFT), theirs(COMPILED, True), theirs(AGAIN)],
            truth=theirs("PEFT"),
            tolerance=(1e-6, 1e-6),
            rounds=(8, 240),
            work=_work.cpt(rows, width, 4),
        )
    )


def build_loss(size: int, rows: int, length: int, vocabulary: int) -> Case:
    """size: B. rows: P. length: T. vocabulary: V."""
    torch.manual_seed(0)
    config, total = config_of(rows, 64), rows + length
    logits = torch.randn(size, total, vocabulary)
    labels = torch.randint(0, vocabulary, (size, total))
    types = torch.tensor(config.cpt_tokens_type_mask)
    types = torch.cat((types, torch.tensor([1, 2, 3, 4]).repeat_interleave(length // 4) + types.max())).repeat(size, 1)
    labels = torch.where((types > 0) & (types % 4 == 0), labels, -100)

    def contender(name: str, loss: Callable[[Tensor], Tensor]) -> Contender:
        own = logits.clone().requires_grad_()
        return Contender(
            name,
            forward=lambda: loss(own),
            backward=lambda value: value.backward(),
            outputs=lambda value: {"loss": value},
            parameters={"logits": own},
        )

    def theirs(own: Tensor) -> Tensor:
        output = SimpleNamespace(logits=own)
        loss: Tensor = peft.CPTEmbedding.calculate_loss(output, labels, types, config).loss
        return loss

    def ours(own: Tensor) -> Tensor:
        return ops.cpt_loss(own, labels, types, decay=0.95)

    bytes_read = logits.numel() * logits.itemsize
    return check(
        Case(
            group="cpt",
            name=f"loss B={size} P={rows} T={length} V={vocabulary}",
            dtype="fp32",
            contenders=[contender(OURS, ours), contender(PEFT, theirs), contender(AGAIN, theirs)],
            truth=contender("PEFT", theirs),
            tolerance=(1e-6, 1e-5),
            rounds=(8, 120),
            # Backward reads the logits again and writes their gradient.
            work={FORWARD: _work.Work(bytes_read, 0.0), BACKWARD: _work.Work(3 * bytes_read, 0.0)},
        )
    )


@pytest.fixture(scope="module", params=[*ENCODE, *LOSS], ids=lambda sizes: "context" if len(sizes) == 2 else "loss")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_encode(*request.param) if len(request.param) == 2 else build_loss(*request.param)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_cpt(benchmark: Any, case: Case, mode: str) -> None:
    measure(benchmark, case, mode)
