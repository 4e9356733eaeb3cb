"""The CUDA recurrence, compiled by g++ from the source that nvcc compiles, run on fibers against the fp64 oracle.

AddressSanitizer and UBSan are on, every array has its exact size and starts as NaN, and a deadlock is an error that names
its step. Wide products are compared through x = the gates before the recurrence: W_ih is then a selection of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracle
from cuda_shim.machine import COMPILER, Gpu, KernelFailed, Machine, Plan, build
from tolerance import Tensors, assert_as_accurate, dtypes, evaluate, generator, normal, one_thread  # noqa: F401

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

Shape = tuple[int, int, int, int]  # (P, B, H, directions)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(build(tmp_path_factory.mktemp("shim")))


def make(shape: Shape, dtype: torch.dtype) -> Tensors:
    """x (B, P, directions * 4H): what the recurrence of each direction is added to; W_hh ~ N(0, 1 / H); biases."""
    steps, batch, hidden, directions = shape
    source = generator(steps + hidden)
    inputs = {"x": normal((batch, steps, directions * 4 * hidden), dtype, source)}
    for direction in range(directions):
        inputs[f"weight_hh_{direction}"] = normal((4 * hidden, hidden), dtype, source).mul_(hidden**-0.5)
        for kind in ("ih", "hh"):
            inputs[f"bias_{kind}_{direction}"] = normal((4 * hidden,), dtype, source)
    return inputs


def all_weights(shape: Shape, inputs: Tensors) -> list[Tensor]:
    """nn.LSTM's list, in which W_ih picks the columns of x that belong to a direction."""
    width, directions = 4 * shape[2], shape[3]
    weights, given = [], list(inputs.values())[1:]
    for direction in range(directions):
        selection = torch.zeros(width, directions * width, dtype=inputs["x"].dtype)
        selection[:, direction * width : (direction + 1) * width] = torch.eye(width)
        weights += [selection, *given[3 * direction : 3 * direction + 3]]
    return weights


def exact(shape: Shape) -> Callable[[Tensors], Tensor]:
    return lambda inputs: oracle.lstm(inputs["x"], all_weights(shape, inputs), shape[3] == 2)


def stock(shape: Shape) -> Callable[[Tensors], Tensor]:
    """nn.LSTM in training mode."""

    def run(inputs: Tensors) -> Tensor:
        zeros = inputs["x"].new_zeros(shape[3], shape[1], shape[2])
        weights = all_weights(shape, inputs)
        return torch._VF.lstm(inputs["x"], (zeros, zeros), weights, True, 1, 0.0, True, shape[3] == 2, True)[0]

    return run


def d_output_of(shape: Shape, dtype: torch.dtype) -> Tensor:
    steps, batch, hidden, directions = shape
    return normal((batch, steps, directions * hidden), dtype, generator(9))


def on_machine(machine: Machine, gpu: Gpu, shape: Shape, inputs: Tensors) -> tuple[Plan, Plan, Tensors]:
    """Both passes, and the products that follow d_gates, in fp32."""
    steps, batch, hidden, directions = shape
    weights, dtype = list(inputs.values())[1:], inputs["x"].dtype
    pre = inputs["x"].float().view(batch, steps, directions, 4 * hidden).permute(2, 1, 0, 3).contiguous()
    forward, gates, cell, output = machine.forward(gpu, weights, pre)
    d_output = d_output_of(shape, dtype).transpose(0, 1).contiguous()
    backward, d_gates = machine.backward(gpu, weights, gates, cell, d_output)
    result = {"output": output.transpose(0, 1)}
    result["d_x"] = d_gates.permute(2, 1, 0, 3).reshape(batch, steps, directions * 4 * hidden)
    for direction in range(directions):
        h = output.float()[..., direction * hidden : (direction + 1) * hidden]
        d_a = d_gates[direction].float()
        before, after = (h[:-1], d_a[1:]) if direction == 0 else (h[1:], d_a[:-1])
        result[f"d_weight_hh_{direction}"] = torch.einsum("tbg,tbh->gh", after, before).to(dtype)
        for kind in ("ih", "hh"):
            result[f"d_bias_{kind}_{direction}"] = d_gates[direction].float().sum((0, 1)).to(dtype)
    return forward, backward, result


def check(machine: Machine, gpu: Gpu, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Plan, Plan]:
    inputs = make(shape, dtype)
    forward, backward, actual = on_machine(machine, gpu, shape, inputs)
    assert gpu.variant is None or {forward.variant, backward.variant} == {gpu.variant}
    assert_as_accurate(actual, stock(shape), exact(shape), inputs, d_output_of(shape, dtype), neighbours=3)
    return forward, backward


# Enough for everything on chip, or so little that most weights are streamed.
ROOMY = {"S": Gpu(clusters=True, blocks=16), "M": Gpu(), "STREAM": Gpu()}


def gpu_for(variant: str, **changes: object) -> Gpu:
    return Gpu(**{**ROOMY[variant].__dict__, "variant": variant, **changes})  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("variant", ["S", "M", "STREAM"])
@pytest.mark.parametrize("shape", [(7, 1, 31, 2), (5, 3, 13, 2), (3, 2, 32, 1)], ids=str)
def test_recurrence_and_gradients_match_fp64_oracle(
    machine: Machine, shape: Shape, variant: str, dtype: torch.dtype
) -> None:
    check(machine, gpu_for(variant), shape, dtype)
