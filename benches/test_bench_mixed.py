"""Batches that mix adapters: the splice of many prompts against one, and a training step against one step per adapter.

PEFT has one prompt for a whole batch, so that its only way is a step per adapter: four forward and backward passes of a
quarter of the rows each, here before one update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fusedprompt
from fusedprompt.layouts.mixture import Mixture, arrange
from fusedprompt.ops import splice

from ._interleave import AGAIN, BACKWARD, FORWARD, OURS, PEFT, STEP, Case, Contender, check, measure
from .test_bench_step import LARGE, llama

ADAPTERS = ("first", "second", "third", "fourth")
ONE_PROMPT, SEPARATE = "one shared prompt", "ours, a pass per adapter"


def build_splice(batch: int, length: int, rows: int, width: int) -> Case:
    """A prompt of its own for every row, against one prompt in front of all. batch: B, length: T, rows: P, width: D."""
    torch.manual_seed(0)
    table = torch.randn(32000, width)
    ids = torch.randint(0, len(table), (batch, length))
    prompts = torch.randn(batch * rows, width)
    d_out = torch.randn(batch, rows + length, width)
    columns = torch.arange(rows + length)
    own = ~(columns + rows * torch.arange(batch).unsqueeze(1))
    slots = torch.where(columns < rows, own, columns - rows)

    def contender(name: str, values: Tensor, layout: fusedprompt.Layout) -> Contender:
        prompt = values.clone().requires_grad_()
        return Contender(
            name,
            forward=lambda: splice(prompt, layout, input_ids=ids, table=table),
            backward=lambda out: out.backward(d_out),
            outputs=lambda out: {"text": out[:, rows:]},
            parameters={"prompt": prompt},
        )

    def gathered(name: str) -> Contender:
        """The truth: plain indexing."""
        prompt = prompts.clone().requires_grad_()
        return Contender(
            name,
            forward=lambda: torch.cat((prompt.view(batch, rows, width), table[ids]), 1),
            backward=lambda out: out.backward(d_out),
            outputs=lambda out: {"text": out[:, rows:]},
            parameters={"prompt": prompt},
        )

    case = Case(
        group="mixed adapters: splice",
        name=f"B={batch} T={length} P={rows} D={width}, {batch} distinct prompts",
        dtype="fp32",
        contenders=[contender(OURS, prompts, fusedprompt.Layout(len(prompts), slots))],
        truth=gathered("indexing"),
        tolerance=(0.0, 1e-6),
        rounds=(20, 120),
        seconds=6.0,
    )
    check(case)
    # These compute something else: one prompt for all rows.
    shared = fusedprompt.Layout.prefix(rows)
    case.contenders += [contender(name, prompts[:rows], shared) for name in (ONE_PROMPT, f"{ONE_PROMPT} again")]
    return case


def names_of(size: int) -> list[str]:
    return [ADAPTERS[row % len(ADAPTERS)] for row in range(size)]


def encoder_config(rows: int) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)


def build_step(size: int, rows: int, length: int) -> Case:
    """Training steps of four adapters: one mixed batch, against a pass per adapter."""
    torch.manual_seed(0)
    ids = torch.randint(0, LARGE[2], (size, length))
    mask, names = torch.ones_like(ids), names_of(size)
    theirs = [peft.get_peft_model(llama(*LARGE), encoder_config(rows), adapter_name=ADAPTERS[0]) for _ in range(2)]
    models = [fusedprompt.get_prompt_model(llama(*LARGE), encoder_config(rows), ADAPTERS[0]) for _ in range(2)]
    for model in (*theirs, *models):
        for name in ADAPTERS[1:]:
            model.add_adapter(name, encoder_config(rows))
    for model in models:
        model.prompt_encoder.load_state_dict(theirs[0].prompt_encoder.state_dict())
        model.set_adapter(list(ADAPTERS))
    theirs[1].prompt_encoder.load_state_dict(theirs[0].prompt_encoder.state_dict())

    def step(name: str, model: Any, forward: Any, backward: Any) -> Contender:
        parameters = {f"{n}": model.prompt_encoder[n].embedding.weight for n in ADAPTERS}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        return Contender(name, forward, backward, lambda loss: {"loss": loss}, parameters, optimizer.step)

    def mixed(model: Any) -> Contender:
        def forward() -> Tensor:
            loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=ids, adapter_names=names).loss
            return loss

        return step(OURS, model, forward, lambda loss: loss.backward())

    def separate(name: str, model: nn.Module) -> Contender:
        """A pass per adapter, its gradients right away: so the peak of memory is one pass's too."""

        def forward() -> Tensor:
            total = torch.zeros(())
            for index, adapter in enumerate(ADAPTERS):
                model.set_adapter(adapter)  # type: ignore[operator]
                for each in ADAPTERS:
                    model.prompt_encoder[each].requires_grad_(True)  # type: ignore[index]
                own = slice(index, None, len(ADAPTERS))
                loss = model(input_ids=ids[own], attention_mask=mask[own], labels=ids[own]).loss / len(ADAPTERS)
                loss.backward()
                total += loss.detach()
            return total

        return step(name, model, forward, lambda _: None)

    return check(
        Case(
            group="mixed adapters: training step",
            name=f"B={size} N={rows} T={length}, 4 adapters, {LARGE[0]} layers D={LARGE[1]} V={LARGE[2]}",
            dtype="fp32",
            contenders=[
                mixed(models[0]),
                separate(PEFT, theirs[0]),
                separate(SEPARATE, models[1]),
                separate(AGAIN, theirs[1]),
            ],
            truth=separate("PEFT", theirs[0]),
            tolerance=(1e-5, 1e-4),
            seconds=20.0,
            rounds=(4, 4),
        )
    )


def build_layout(batch: int, length: int, rows: int) -> Case:
    """Finding out where everything goes, with mask, labels and position ids: prompts of `rows` and `rows` / 2."""
    torch.manual_seed(0)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[: batch // 2, :5] = 0
    model = fusedprompt.get_prompt_model(llama(1, 64, 64), encoder_config(rows), "0")
    for index in range(1, batch):
        model.add_adapter(str(index), encoder_config(rows if index % 2 else rows // 2))
    names = [*map(str, range(batch))]

    def forward() -> Tensor:
        mixture = Mixture.of(model.prompts, model.prompts[model.active_adapter], names, ids)
        arranged = arrange(mixture, model.facts, ids, mask)
        fields = (arranged.mask(mask, ids), arranged.labels(ids, True), arranged.position_ids())
        return torch.stack([field for field in fields if field is not None])

    def contender() -> Contender:
        return Contender(OURS, forward, lambda _: None, lambda fields: {"fields": fields}, {})

    return check(
        Case(
            group="mixed adapters: layout",
            name=f"B={batch} T={length}, {batch} adapters of {rows // 2} and {rows} rows",
            dtype="int64",
            contenders=[contender()],
            truth=contender(),
            tolerance=(0.0, 0.0),
            rounds=(40, 400),
        )
    )


@pytest.fixture(
    scope="module", params=[(64, 64, 20, 512), (64, 128, 20, 1024)], ids=lambda p: "B{}-T{}-P{}-D{}".format(*p)
)
def spliced(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_splice(*request.param)


@pytest.fixture(scope="module", params=[(16, 20, 64)], ids=lambda p: "B{}-N{}-T{}".format(*p))
def step(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build_step(*request.param)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_splice_of_many_prompts(benchmark: Any, spliced: Case, mode: str) -> None:
    measure(benchmark, spliced, mode)


def test_layout(benchmark: Any) -> None:
    measure(benchmark, build_layout(64, 512, 20), FORWARD)


def test_training_step(benchmark: Any, step: Case) -> None:
    measure(benchmark, step, STEP)
