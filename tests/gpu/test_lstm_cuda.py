"""The native LSTM on a GPU: against the fp64 oracle with nn.LSTM (cuDNN) as the measure, and as CUDA code must behave.

Run by `make gpu`; skipped without CUDA. The same kernels run on fibers in tests/test_lstm_cuda_shim.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import test_ops_lstm as cases
from fusedprompt import ops
from tolerance import Tensors, assert_as_accurate, assert_identical, bytes_hold, dtypes, evaluate, generator, normal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs beside poisoned (deterministic) memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.fixture(autouse=True)
def ieee_products() -> Iterator[None]:
    """cuDNN takes TF32 unasked, which would measure an error a thousand times as large."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# (B, P, D, H, layers, bidirectional): by size S, M and L on a large GPU; odd and prime sizes; batches up to 8.
SHAPES: list[cases.Shape] = [
    (1, 20, 64, 32, 2, True),
    (1, 1, 1, 1, 1, False),
    (1, 19, 33, 97, 2, True),
    (1, 20, 256, 256, 2, True),
    (1, 7, 64, 521, 1, True),
    (1, 5, 64, 1024, 1, True),
    (3, 7, 33, 131, 2, True),
    (8, 5, 40, 256, 1, True),
    (2, 3, 16, 1031, 1, False),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-P{}-D{}-H{}-L{}-{}".format(*s[:5], 1 + s[5]))


def on_gpu(function: Any) -> Any:
    """Takes and gives CPU tensors, so that the truth is computed where fp64 is plain."""
    return lambda inputs: function({name: value.cuda() for name, value in inputs.items()}).cpu()


def native(shape: cases.Shape) -> Any:
    return on_gpu(cases.fused(shape, "native"))


@dtypes
@shapes
def test_lstm_and_all_gradients_match_fp64_oracle_on_a_gpu(shape: cases.Shape, dtype: torch.dtype) -> None:
    inputs, d_out = cases.make(shape, dtype), cases.d_output(shape, dtype)
    actual = evaluate(native(shape), inputs, d_out)
    plain = on_gpu(cases.stock(shape))
    assert_as_accurate(actual, plain, cases.exact(shape), inputs, d_out, neighbours=3)


@dtypes
@pytest.mark.parametrize("variant", ["S", "M", "L", "STREAM"])
def test_every_variant_that_fits_matches_fp64_oracle(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L needs more than the chip holds: at that size nn.LSTM in fp64 stands in for the oracle."""
    shape = (1, 5, 33, 4099 if variant == "L" else 97, 1, True)
    monkeypatch.setenv("FUSEDPROMPT_LSTM_VARIANT", variant)
    inputs, d_out = cases.make(shape, dtype), cases.d_output(shape, dtype)
    if variant == "S" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no clusters")
    stock = on_gpu(cases.stock(shape))
    exact = stock if variant == "L" else cases.exact(shape)
    assert_as_accurate(evaluate(native(shape), inputs, d_out), stock, exact, inputs, d_out, neighbours=1)


@dtypes
@pytest.mark.parametrize("hidden", [3072, 4099])
def test_lstm_too_large_for_the_chip_matches_nn_lstm_in_fp64(hidden: int, dtype: torch.dtype) -> None:
    """The oracle's loops take minutes at this size, so nn.LSTM in fp64 on the GPU stands in for it."""
    shape = (1, 3, 16, hidden, 1, False)
    inputs, d_out = cases.make(shape, dtype), cases.d_output(shape, dtype)
    stock = on_gpu(cases.stock(shape))
    assert_as_accurate(evaluate(native(shape), inputs, d_out), stock, stock, inputs, d_out, neighbours=1)


def test_long_sequences_match_fp64_oracle() -> None:
    shape = (1, 4096, 3, 16, 1, True)
    inputs, d_out = cases.make(shape, torch.float32), cases.d_output(shape, torch.float32)
    actual = evaluate(native(shape), inputs, d_out)
    assert_as_accurate(actual, on_gpu(cases.stock(shape)), cases.exact(shape), inputs, d_out, neighbours=1)


@dtypes
def test_lstm_many_times_gives_the_same_bits(dtype: torch.dtype) -> None:
    for hidden in (64, 512, 1024):
        shape = (1, 20, 64, hidden, 2, True)
        inputs, d_out = cases.make(shape, dtype), cases.d_output(shape, dtype)
        first = evaluate(native(shape), inputs, d_out)
        for _ in range(20):
            assert_identical(evaluate(native(shape), inputs, d_out), first)


@pytest.mark.parametrize("variant", ["S", "M", "STREAM"])
def test_what_the_workspace_held_before_changes_no_bit(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of an earlier call is full of words that look like published ones."""
    if variant == "S" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no clusters")
    monkeypatch.setenv("FUSEDPROMPT_LSTM_VARIANT", variant)
    shape = (1, 20, 33, 97, 2, True)
    inputs, d_out = cases.make(shape, torch.bfloat16), cases.d_output(shape, torch.bfloat16)
    first = evaluate(native(shape), inputs, d_out)
    for byte in (0x00, None):
        with bytes_hold(byte, "CUDA"):
            assert_identical(evaluate(native(shape), inputs, d_out), first)


def test_nan_gates_end_in_nan_and_not_in_a_hang() -> None:
    shape = (1, 6, 8, 300, 1, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = cases.make(shape, dtype)
        inputs["x"][0, 2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32).to(dtype)
        output = native(shape)(inputs)
        assert output[0, 2:, :300].isnan().all() and output[0, :3, 300:].isnan().all()


def _cuda(shape: cases.Shape) -> tuple[Tensor, list[Tensor], Tensor]:
    x, weights = cases.parts({name: value.cuda() for name, value in cases.make(shape, torch.float32).items()})
    return (
        x.requires_grad_(),
        [weight.requires_grad_() for weight in weights],
        cases.d_output(shape, torch.float32).cuda(),
    )


def _step(x: Tensor, weights: list[Tensor], d_out: Tensor, layers: int) -> tuple[Tensor, ...]:
    out = ops.lstm(x, weights, num_layers=layers, bidirectional=True, backend="native")
    return (out.detach(), *torch.autograd.grad(out, [x, *weights], d_out))


@pytest.mark.parametrize("hidden", [64, 768, 3072])
def test_forward_and_backward_in_a_cuda_graph_give_the_bits_of_eager(hidden: int) -> None:
    x, weights, d_out = _cuda((1, 20, 64, hidden, 2, True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = _step(x, weights, d_out, 2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(x, weights, d_out, 2)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected))
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, _step(x, weights, d_out, 2)))


def test_the_current_stream_is_used() -> None:
    """x is written late on a side stream: a kernel on any other stream would read zeros."""
    x, weights, d_out = _cuda((1, 20, 64, 512, 1, True))
    expected = _step(x, weights, d_out, 1)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x.detach())
        actual = _step(late.requires_grad_(), weights, d_out, 1)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_two_streams_at_once_neither_hang_nor_mix() -> None:
    """Each launch wants most of the multiprocessors: the second waits for the first, whole."""
    x, weights, d_out = _cuda((1, 50, 64, 1024, 2, True))
    expected = _step(x, weights, d_out, 2)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results: list[Any] = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results += [_step(x, weights, d_out, 2) for _ in range(4)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_of_another_device_than_the_current_one() -> None:
    shape = (1, 20, 16, 64, 2, True)
    inputs = {name: value.to("cuda:1") for name, value in cases.make(shape, torch.float32).items()}
    assert torch.cuda.current_device() == 0
    out = cases.fused(shape, "native")(inputs)
    assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_identical({"output": out.cpu()}, {"output": native(shape)({k: v.cpu() for k, v in inputs.items()})})


def test_compiled_in_one_graph_gives_the_bits_of_eager() -> None:
    shape = (1, 20, 16, 64, 2, True)
    inputs = {name: value.cuda() for name, value in cases.make(shape, torch.float32).items()}
    function = cases.fused(shape, "native")
    assert torch.equal(torch.compile(function, fullgraph=True)(inputs), function(inputs))


def test_dropout_masks_of_a_seed_match_fp64_oracle() -> None:
    shape = (2, 9, 8, 40, 3, True)
    inputs, d_out = cases.make(shape, torch.float32), cases.d_output(shape, torch.float32)
    masks = [torch.bernoulli(torch.full((9, 2, 80), 0.6), generator=generator(n)).div(0.6) for n in range(2)]

    def run(values: Tensors) -> Tensor:
        x, weights = cases.parts({name: value.cuda() for name, value in values.items()})
        return torch.ops.fusedprompt.lstm_native(x, weights, [mask.cuda() for mask in masks], True).cpu()

    ops.explain("lstm", normal((1, 1, 1), torch.float32, generator(0)).cuda())  # loads the library
    plain = cases.stock_with_masks(shape, masks)
    assert_as_accurate(evaluate(run, inputs, d_out), plain, cases.exact(shape, masks), inputs, d_out)


def test_oracle_agrees_with_cudnn_in_fp64() -> None:
    """So that a failure above accuses the right side."""
    shape = (2, 7, 5, 33, 2, True)
    inputs = {name: value.double() for name, value in cases.make(shape, torch.float32).items()}
    x, weights = cases.parts(inputs)
    torch.testing.assert_close(
        on_gpu(cases.stock(shape))(inputs), oracle.lstm(x, weights, True), rtol=1e-10, atol=1e-10
    )
