"""Threads that share a model: each gets what it would get alone, whatever the others do meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fusedprompt
from fusedprompt.base.own_forward import has_own_forward, replaced_forwards
from fusedprompt.ops import _backend
from fusedprompt.ops._backend import AUTO, Op, never_objects
from mixtures import BASE, mixed
from models import build, config_fields, ours, pad, tokens

THREADS = 8
Call = Callable[[], Tensor]


def run_together(calls: Sequence[Call], times: int) -> list[Tensor]:
    """The results of each call `times` times, by 8 threads that begin together."""
    start = threading.Barrier(THREADS)
    results: list[Tensor | None] = [None] * (len(calls) * times)
    order = [index for _ in range(times) for index in range(len(calls))]

    def work(thread: int) -> None:
        start.wait()
        for place in range(thread, len(order), THREADS):
            results[place] = calls[order[place]]()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    return [result for result in results if result is not None]


def assert_as_alone(calls: Sequence[Call], times: int) -> None:
    expected = [call() for call in calls]
    found = run_together(calls, times)
    assert len(found) == len(calls) * times
    wrong = [place for place, result in enumerate(found) if not close(result, expected[place % len(calls)])]
    assert not wrong, f"{len(wrong)} of {len(found)} calls are wrong, the first is call {wrong[0] % len(calls)}"


def close(found: Tensor, expected: Tensor) -> bool:
    """Sums of several threads have another order than those of one."""
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def one_thread_a_product() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def classifier_calls(model: Any) -> list[Call]:
    ids, mask = pad(tokens(3, 5), 1, 2)
    mixtures: list[list[str] | None] = [None, ["short", "long", BASE], ["long", "long", "short"], ["again", BASE, BASE]]

    def call(names: list[str] | None, route: str) -> Call:
        def run() -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=mask, adapter_names=names, route=route).logits
            return logits.detach()

        return run

    return [call(names, route) for names in mixtures for route in ("splice", "shared")]


def test_rows_of_a_batch_go_through_their_own_heads() -> None:
    model = mixed("Llama", "SEQ_CLS", adapters=("short", "long", "again"))
    assert_as_alone(classifier_calls(model), 25)
    assert not any(has_own_forward(part) or "forward" in vars(part) for part in model.modules())


def language_calls(model: Any) -> list[Call]:
    ids, padded = tokens(4, 12), pad(tokens(3, 5), 2, 1)

    def step(route: str, names: list[str] | None) -> Call:
        def run() -> Tensor:
            output = model(input_ids=ids, labels=ids, route=route, adapter_names=names)
            parameters = [p for p in model.prompt_encoder.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
            return torch.cat([output.loss.detach().view(1), *(g.flatten() for g in gradients if g is not None)])

        return run

    def read(route: str) -> Call:
        def run() -> Tensor:
            with torch.no_grad(), fusedprompt.use_backend("reference"):
                logits: Tensor = model(input_ids=padded[0], attention_mask=padded[1], route=route).logits
            return logits

        return run

    def generate(names: list[str] | None) -> Call:
        def run() -> Tensor:
            found: Tensor = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=3, min_new_tokens=3)
            return found

        return run

    names = ["short", BASE, "long", "long"]
    steps = [step(route, given) for route in ("splice", "shared", "auto") for given in (None, names)]
    return [*steps, read("splice"), read("shared"), generate(None), generate(names)]


def test_steps_inference_and_generation_on_both_routes() -> None:
    assert_as_alone(language_calls(mixed("Llama", adapters=("short", "long"))), 40)


TRAINS_BESIDE_A_COPY = """
import sys, threading, torch, fusedprompt
from fusedprompt.layouts.layout import Layout

sys.setswitchinterval(1e-5)
prompt, text, layout = torch.nn.Parameter(torch.randn(4, 8)), torch.randn(1, 3, 8), Layout.prefix(4)
calls = [
    lambda: fusedprompt.ops.splice(prompt, layout, inputs_embeds=text),
    lambda: prompt.to("cpu", torch.float32, copy=True),
]
def work(call):
    for _ in range(20_000):
        call()  # its graph goes at once, and the next one needs a gradient accumulator anew
threads = [threading.Thread(target=work, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_a_trained_prompt_is_spliced_beside_an_op_of_pytorch_on_it() -> None:
    """In a process of its own: threads that wait for the interpreter stop the test too."""
    subprocess.run([sys.executable, "-c", TRAINS_BESIDE_A_COPY], check=True, timeout=120)


def test_losses_without_logits_in_several_threads() -> None:
    model, ids = ours("Llama", rows=20), tokens(8, 10)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss.detach()

    assert_as_alone([step], 160)
    assert model.text_head._comes_last and not has_own_forward(model.base_model.lm_head)


def patched(task: str, **options: Any) -> Any:
    kind, fields = config_fields("MLP", task)
    model = peft.get_peft_model(build("Llama", task), getattr(peft, kind)(**fields))
    model.add_adapter("other", getattr(peft, kind)(**fields))
    fusedprompt.apply(model, **options)
    return model.eval()


@pytest.mark.parametrize("backend", [AUTO, "reference"])
def test_patched_models_of_peft(backend: str) -> None:
    classifier, language = patched("SEQ_CLS", backend=backend), patched("CAUSAL_LM", backend=backend)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator("cpu").manual_seed(len(name)), device="cpu")
                )
    ids = tokens(3, 6)

    def call(model: Any, names: list[str] | None) -> Call:
        def run() -> Tensor:
            given = {} if names is None else {"adapter_names": names}
            with torch.no_grad():
                logits: Tensor = model(input_ids=ids, **given).logits
            return logits

        return run

    def generate(names: list[str] | None) -> Call:
        def run() -> Tensor:
            given = {} if names is None else {"adapter_names": names}
            found: Tensor = language.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, **given)
            return found

        return run

    names = ["default", "other", BASE]
    models = [call(model, given) for model in (classifier, language) for given in (None, names)]
    assert_as_alone([*models, generate(None), generate(names)], 27)


def test_a_backend_is_preferred_in_its_own_thread_alone() -> None:
    op = Op("double")
    op.add("reference", lambda number: 2 * number, never_objects)
    op.add("triton", lambda number: number + number, never_objects)
    inside, outside = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with fusedprompt.use_backend("reference"):
            inside.set()
            assert outside.wait(10)
            seen.append(op.select(None, 1).name)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen.append(op.select(None, 1).name)
    with fusedprompt.use_backend("auto"):
        outside.set()
        thread.join()
    assert seen == ["triton", "reference"]


def test_a_replaced_forward_is_that_of_its_block_and_of_no_other_thread() -> None:
    layer = torch.nn.Linear(2, 2)
    x, plain = torch.ones(1, 2), layer(torch.ones(1, 2))
    with replaced_forwards({layer: lambda rows: rows + 1}):
        assert torch.equal(layer(x), x + 1)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(layer, x).result(), plain)
        with replaced_forwards({layer: lambda rows: rows + 2}):
            assert torch.equal(layer(x), x + 2)
        assert torch.equal(layer(x), x + 1)
        assert not has_own_forward(layer)
    assert torch.equal(layer(x), plain) and "forward" not in vars(layer)


def test_a_forward_that_another_library_has_put_there_comes_back() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.forward = lambda rows: rows * 3  # type: ignore[method-assign]
    own = vars(layer)["forward"]
    with replaced_forwards({layer: lambda rows: rows + 1}):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(layer, torch.ones(1, 2)).result(), torch.full((1, 2), 3.0))
        assert has_own_forward(layer)
    assert vars(layer)["forward"] is own


def test_preferences_of_many_threads_leave_none_behind() -> None:
    def prefer(thread: int) -> None:
        for _ in range(2000):
            with fusedprompt.use_backend(("reference", "native", "triton", AUTO)[thread % 4]):
                pass

    before, interval = list(_backend._traced), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(prefer, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)
    assert _backend._traced == before
