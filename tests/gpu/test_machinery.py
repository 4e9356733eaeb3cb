"""What a GPU adds to the ops: defaults, streams, graphs, synchronisation, torch.compile, several devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusedprompt
from fusedprompt import Layout, ops


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


def test_triton_is_the_default_on_cuda(cuda: torch.device) -> None:
    rows = torch.zeros(20, 64, device=cuda)
    assert {op: fusedprompt.explain(op, rows)["triton"] for op in ("mlp", "splice")} == dict.fromkeys(
        ("mlp", "splice"), "runs"
    )


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    with torch.cuda.device(0):
        device = torch.device("cuda:1")
        ids = ids_on(device)
        for actual, expected in zip(
            gradients(*make_step(device), ids), gradients(*make_step(device, "reference"), ids), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
