"""What a GPU adds to the ops: defaults, streams, graphs, synchronisation, torch.compile, several devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedprompt
from fusedprompt import Layout, ops
from tolerance import generator, normal

pytest.importorskip("triton")
from fusedprompt.ops._triton import Launch


def make_step(device: torch.device, backend: str | None = "triton") -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """P-tuning's encoder and splice as a function of the ids, and its parameters."""
    torch.manual_seed(0)
    x = torch.randn(20, 64, device=device, requires_grad=True)
    weights = [(torch.randn(64, 64, device=device) / 8).requires_grad_() for _ in range(3)]
    biases = [torch.randn(64, device=device, requires_grad=True) for _ in range(3)]
    table = torch.randn(50, 64, device=device)

    def step(ids: Tensor) -> Tensor:
        prompt = ops.mlp(x, weights, biases, backend=backend)
        batch = ops.splice_batch(
            prompt, Layout.prefix(20), input_ids=ids, table=table, attention_mask=ids, labels=ids, backend=backend
        )
        assert batch.attention_mask is not None
        return batch.inputs_embeds * batch.attention_mask.unsqueeze(-1)

    return step, [x, *weights, *biases]


def ids_on(device: torch.device, length: int = 9) -> Tensor:
    return torch.randint(50, (3, length), generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(device)


def gradients(step: Callable[[Tensor], Tensor], parameters: list[Tensor], ids: Tensor) -> list[Tensor]:
    out = step(ids)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters)]


OPS = ("mlp", "splice", "head_loss")


def test_triton_is_the_default_on_cuda(cuda: torch.device) -> None:
    rows = torch.zeros(20, 64, device=cuda)
    assert {op: fusedprompt.explain(op, rows)["triton"] for op in OPS} == dict.fromkeys(OPS, "runs")


def test_nothing_here_is_compared_with_products_in_tf32() -> None:
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_same_results_as_the_reference(device: torch.device) -> None:
    ids = ids_on(device)
    for actual, expected in zip(
        gradients(*make_step(device), ids), gradients(*make_step(device, "reference"), ids), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compiles_in_one_graph_with_equal_results(device: torch.device) -> None:
    step, parameters = make_step(device)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for length in (9, 10):
        ids = ids_on(device, length)
        for actual, expected in zip(
            gradients(compiled, parameters, ids), gradients(step, parameters, ids), strict=True
        ):
            torch.testing.assert_close(actual, expected)


def test_step_waits_for_the_gpu_nowhere(cuda: torch.device) -> None:
    step, parameters = make_step(cuda)
    ids = ids_on(cuda)
    gradients(step, parameters, ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(step, parameters, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_step_replays_from_a_cuda_graph(cuda: torch.device) -> None:
    step, parameters = make_step(cuda)
    ids = ids_on(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(step, parameters, ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(step, parameters, ids)
    with torch.no_grad():
        ids.copy_(ids_on(cuda).flip(0))
        parameters[1].mul_(0.5)
    for value in captured:
        value.fill_(float("nan"))
    graph.replay()
    for actual, expected in zip(captured, gradients(step, parameters, ids), strict=True):
        assert torch.equal(actual, expected)


def test_kernels_run_on_the_current_stream(cuda: torch.device) -> None:
    """The side stream is kept busy; work put on the default stream would see the old weights."""
    step, parameters = make_step(cuda)
    ids = ids_on(cuda)
    gradients(step, parameters, ids)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        parameters[1].mul_(0.5)
        actual = step(ids)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert torch.equal(actual, step(ids))


def test_weights_written_just_before_are_seen_by_the_next_encode(cuda: torch.device) -> None:
    """Programmatic dependent launch lets a kernel start early: it must not read what is still being written."""
    step, parameters = make_step(cuda)
    ids = ids_on(cuda)
    expected = []
    with torch.no_grad():
        start = [parameter.clone() for parameter in parameters]
        for factor in range(1, 33):
            for parameter, value in zip(parameters, start):
                torch.mul(value, factor / 16, out=parameter)
            torch.cuda.synchronize()
            expected.append(step(ids))
            torch.cuda.synchronize()
        actual = []
        for factor in range(1, 33):
            for parameter, value in zip(parameters, start):
                torch.mul(value, factor / 16, out=parameter)
            actual.append(step(ids))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def train(device: torch.device, width: int, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """What the encoder gives at each step of Adam, which moves every weight by half of its size, in place. The weights
    of the first layer come last: the kernel in front of the next encoding is still writing what that reads first."""
    source = generator(0)
    x = normal((20, width), dtype, source).to(device)
    weights = [(normal((width, width), torch.float32, source) / width**0.5).to(device, dtype) for _ in range(3)]
    biases = [normal((width,), dtype, source).to(device) for _ in range(3)]
    parameters = [tensor.requires_grad_() for tensor in (*biases, *reversed(weights))]
    optimizer = torch.optim.Adam(parameters, lr=0.5 / width**0.5, foreach=False)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = ops.mlp(x, weights, biases, backend="triton")
        outputs.append(out.detach())
        out.square().mean().backward()
        optimizer.step()
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_gives_the_bits_of_kernels_that_each_ran_alone(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights of 38 MB in fp32, which take tens of microseconds to be written."""
    on_gpu = device.type == "cuda"
    width, steps = (3072, 16) if on_gpu else (48, 3)
    found = train(device, width, dtype, steps)
    launch, alone = Launch.__call__, []

    def launch_alone(self: Launch, *args: Any) -> None:
        for work in (lambda: None, lambda: launch(self, *args)):
            work()
            if on_gpu:
                torch.cuda.synchronize()
        alone.append(self.name)

    monkeypatch.setattr(Launch, "__call__", launch_alone)
    expected = train(device, width, dtype, steps)
    assert alone == steps * (["linear_forward"] * 3 + ["linear_backward"] * 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Weights of the step before would give something else.
    assert all(a.isfinite().all() and not torch.equal(a, b) for a, b in itertools.pairwise(found))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    with torch.cuda.device(0):
        device = torch.device("cuda:1")
        ids = ids_on(device)
        for actual, expected in zip(
            gradients(*make_step(device), ids), gradients(*make_step(device, "reference"), ids), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
