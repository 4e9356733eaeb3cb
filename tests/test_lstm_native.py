"""The native LSTM on CPU: every instruction set, any number of threads, and what `auto` does where it cannot run.

tests/test_ops_lstm.py holds it to the claims that every backend of the op must meet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusedprompt as fp
from fusedprompt import ops
from fusedprompt.ops import _native
from test_ops_lstm import Shape, check, d_output, fused, make, parts
from test_ops_registration import lstm_forward_samples, lstm_samples
from tolerance import (
    Tensors,
    assert_identical,
    dtypes,
    evaluate,
    examples,
    generator,
    normal,
    one_thread,  # noqa: F401
    sample,
)

if _native.MODULE is None:
    pytest.skip(f"the native LSTM {_native.WHY_NOT_CPU}", allow_module_level=True)
NATIVE: Any = _native.MODULE
LEVELS = NATIVE.cpu_levels()
levels = pytest.mark.parametrize("level", LEVELS)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def same_level_afterwards() -> Iterator[None]:
    before = NATIVE.cpu_level()
    yield
    NATIVE.use_cpu_level(before)


# Sizes around 16 units, 24 rows and 128 columns, where the kernels cut their work.
SHAPES = [
    (1, 1, 1, 1, 1, False),
    (1, 7, 130, 17, 1, True),
    (3, 5, 31, 16, 2, True),
    (8, 3, 5, 33, 1, True),
    (7, 23, 65, 47, 1, False),
]


@levels
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-P{}-D{}-H{}-L{}-{}".format(*s[:5], 1 + s[5]))
def test_native_lstm_of_every_instruction_set_matches_fp64_oracle(shape: Shape, dtype: torch.dtype, level: str) -> None:
    NATIVE.use_cpu_level(level)
    check(shape, make(shape, dtype), d_output(shape, dtype), "native")


@examples(20)
@given(
    shape=st.tuples(*[st.integers(1, high) for high in (8, 9, 40, 40, 3)], st.booleans()), seed=st.integers(0, 2**31)
)
def test_native_lstm_of_any_shape_matches_fp64_oracle(shape: Shape, seed: int) -> None:
    # A single column of d_x is up to 320 products added in their order, which MKL adds in several partial sums.
    check(shape, make(shape, torch.float32, seed), d_output(shape, torch.float32), "native", ulps=4)


def cell_inputs(gate: int, values: Tensor) -> Tensors:
    """One unit, one step: `values` as the pre-activation of one gate, the others moderate. P=1 and H=len(values)."""
    hidden = len(values)
    bias = torch.full((4, hidden), 0.75)
    bias[gate] = values
    return {
        "x": torch.zeros(1, 1, 1),
        "weight_ih": torch.zeros(4 * hidden, 1),
        "weight_hh": torch.zeros(4 * hidden, hidden),
        "bias_ih": bias.reshape(-1),
        "bias_hh": torch.zeros(4 * hidden),
    }


@pytest.mark.parametrize("gate", range(4), ids="ifgo")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_vectorised_cells_are_within_8_ulp_of_lstm_cell_h(gate: int, level: str) -> None:
    small = torch.logspace(-30, 0, 200, base=10)
    values = torch.cat((torch.linspace(-100, 100, 801), small, -small, torch.linspace(-1, 1, 101)))
    inputs = cell_inputs(gate, values)
    shape = (1, 1, 1, len(values), 1, False)
    results = {}
    for name in (level, "plain"):  # the plain level runs lstm_cell.h itself
        NATIVE.use_cpu_level(name)
        results[name] = evaluate(fused(shape, "native"), inputs, torch.ones(1, 1, len(values)))
        results[name]["gates"], results[name]["cell"] = torch.ops.fusedprompt.lstm_native_forward(
            *parts(inputs)[:1], parts(inputs)[1], [], False
        )[1]
    for key in ("output", "gates", "cell", "d_bias_ih"):
        actual, expected = results[level][key], results["plain"][key]
        # 1 - g^2 and i (1 - i) cancel near saturation, so gradients are judged by their largest.
        scale = expected.abs() if key in ("output", "gates", "cell") else expected.abs().max()
        assert ((actual - expected).abs() <= 8 * 2.0**-23 * scale + 1e-37).all(), key


@levels
def test_native_cells_pass_nan_on_and_saturate_at_infinity(level: str) -> None:
    NATIVE.use_cpu_level(level)
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for gate in range(4):
        inputs = cell_inputs(gate, values)
        gates = torch.ops.fusedprompt.lstm_native_forward(*parts(inputs), [], False)[1][0].view(4, 4)[gate]
        expected = torch.tanh(values) if gate == 2 else torch.sigmoid(values)
        torch.testing.assert_close(gates, expected, rtol=1e-6, atol=1e-37, equal_nan=True)


@levels
@halves
def test_native_kernels_read_every_half_and_round_to_nearest_even_as_torch_does(dtype: torch.dtype, level: str) -> None:
    """d_x = d_gates W_ih with one row of W_ih in use: every number of the dtype times a number that d_bias shows."""
    NATIVE.use_cpu_level(level)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    weight = torch.zeros(4, len(every), dtype=dtype)
    weight[2] = every
    bias = torch.tensor([0.5, 0.0, 0.3, 0.9], dtype=dtype)
    for size in (1.0, 3e4, 2.0**-12):  # overflows in fp16, and numbers below its normal range
        x = torch.zeros(1, 1, len(every), dtype=dtype)
        inputs = {"x": x, "weight_ih": weight, "weight_hh": torch.zeros(4, 1, dtype=dtype), "bias_ih": bias}
        inputs["bias_hh"] = torch.zeros(4, dtype=dtype)
        result = evaluate(
            fused((1, 1, len(every), 1, 1, False), "native"), inputs, torch.full((1, 1, 1), size, dtype=dtype)
        )
        factor = result["d_bias_ih"][2]
        assert factor.isfinite() and factor != 0
        expected = (factor.float() * every.float()).to(dtype)
        assert torch.equal(result["d_x"][0, 0], expected)


@dtypes
def test_native_lstm_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    shape = (1, 9, 40, 272, 2, True)  # W_hh is 1.1 MB in fp32: up to four threads share a step
    inputs, d_out = make(shape, dtype), d_output(shape, dtype)
    expected = evaluate(fused(shape, "native"), inputs, d_out)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                assert_identical(evaluate(fused(shape, "native"), inputs, d_out), expected)
        finally:
            torch.set_num_threads(1)


def test_native_lstm_inside_a_parallel_region_of_other_threads_gives_the_same_bits() -> None:
    """Two Python threads, each with a team of two that share both cores."""
    from concurrent.futures import ThreadPoolExecutor

    shape = (1, 9, 40, 272, 1, True)
    inputs = make(shape, torch.float32)
    expected = fused(shape, "native")(inputs)

    def run(_: int) -> Tensor:
        torch.set_num_threads(2)
        return fused(shape, "native")(inputs)

    try:
        with ThreadPoolExecutor(2) as pool:
            assert all(torch.equal(value, expected) for value in pool.map(run, range(8)))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("index", range(4))
def test_native_ops_pass_opcheck(index: int) -> None:
    torch.library.opcheck(torch.ops.fusedprompt.lstm_native.default, list(lstm_samples())[index])


@pytest.mark.parametrize("index", range(5))
def test_native_forward_and_backward_ops_pass_opcheck(index: int) -> None:
    x, weights, masks, bidirectional = list(lstm_forward_samples())[index]
    torch.library.opcheck(torch.ops.fusedprompt.lstm_native_forward.default, (x, weights, masks, bidirectional))
    output, saved = torch.ops.fusedprompt.lstm_native_forward(x, weights, masks, bidirectional)
    arguments = (torch.ones_like(output), x, weights, masks, bidirectional, output, saved)
    torch.library.opcheck(torch.ops.fusedprompt.lstm_native_backward.default, arguments)


def count_of_operators(rows: int) -> int:
    shape = (1, rows, 8, 16, 2, True)
    inputs = {name: value.requires_grad_() for name, value in make(shape, torch.float32).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(shape, "native")(inputs).backward(d_output(shape, torch.float32))
    return sum(event.name.startswith(("aten::", "fusedprompt::")) for event in profile.events())


def test_native_lstm_dispatches_nothing_per_step() -> None:
    assert count_of_operators(3) == count_of_operators(40) > 0


def test_auto_takes_the_native_lstm_where_it_can_run_and_the_reference_elsewhere() -> None:
    x, weights, masks, bidirectional = sample("lstm")
    op = ops.OPS["lstm"]
    assert op.select(None, x, weights, masks, bidirectional).name == "native"
    assert op.select(None, x.expand(8, -1, -1), weights, masks, bidirectional).name == "native"
    for other in (x.expand(9, -1, -1), x.double(), x.to("meta")):
        assert op.select(None, other, weights, masks, bidirectional).name == "reference"


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(1, 2, 3), "runs"),
        (torch.zeros(9, 2, 3), "needs a batch of at most 8, got 9"),
        (torch.zeros(1, 2, 3, dtype=torch.float64), "needs float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(1, 2, 3, device="meta"), "needs a CPU or CUDA tensor, got meta"),
    ],
    ids=["runs", "batch", "dtype", "device"],
)
def test_explain_says_from_x_alone_why_the_native_lstm_cannot_run(x: Tensor, reason: str) -> None:
    assert fp.explain("lstm", x) == {"native": reason, "reference": "runs"}


def test_a_batch_of_nine_asked_of_the_native_lstm_raises_with_the_reason() -> None:
    inputs = make((9, 2, 3, 4, 1, True), torch.float32)
    with pytest.raises(fp.BackendUnavailable, match="'native' of op 'lstm' cannot run: it needs a batch of at most 8"):
        fused((9, 2, 3, 4, 1, True), "native")(inputs)


def test_native_op_called_by_name_with_weights_that_do_not_fit_raises_and_reads_nothing() -> None:
    x, weights, masks, bidirectional = sample("lstm")
    for index, wrong in ((1, torch.zeros(4, 2)), (0, torch.zeros(4, 4)), (3, torch.zeros(4).double())):
        bad = [*weights[:index], wrong, *weights[index + 1 :]]
        with pytest.raises(RuntimeError, match=r"lstm_native: weight \d has the wrong shape, dtype or device"):
            torch.ops.fusedprompt.lstm_native(x, bad, masks, bidirectional)


def test_an_unknown_instruction_set_is_a_value_error_that_names_those_of_this_processor() -> None:
    with pytest.raises(ValueError, match=rf"level: expected one of {', '.join(LEVELS)} on this processor, got sse9"):
        NATIVE.use_cpu_level("sse9")


def test_without_the_compiled_extension_every_op_runs_and_the_reason_is_said() -> None:
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "fusedprompt._C":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
import torch
import fusedprompt as fp

x, weights = torch.ones(1, 2, 3), [torch.ones(4, 3), torch.ones(4, 1), torch.ones(4), torch.ones(4)]
print(fp.ops.lstm(x, weights, bidirectional=False).shape)
print(fp.explain("lstm", x)["native"])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(fp.__file__).resolve().parent.parent)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.stdout.splitlines() == [
        "torch.Size([1, 2, 1])",
        "needs the compiled extension, which this installation lacks (README.md, Installing)",
    ], process.stderr


def test_native_lstm_reads_the_modules_own_parameters_and_gives_them_gradients_in_their_layout() -> None:
    module = torch.nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True)
    x = normal((1, 4, 5), torch.float32, generator(1))
    weights = list(module.parameters())
    first = ops.lstm(x, weights, num_layers=2, backend="native")
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    second = ops.lstm(x, weights, num_layers=2, backend="native")
    second.sum().backward()
    torch.testing.assert_close(second, module(x)[0])
    assert not torch.equal(first, second)
    assert all(weight.grad is not None and weight.grad.stride() == weight.stride() for weight in weights)
