"""The MLP op against the fp64 oracle, and against nn.Sequential where bits must agree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from fusedprompt import ops
from tolerance import (
    Tensors,
    assert_as_accurate,
    assert_identical,
    dtypes,
    each_backend,
    evaluate,
    examples,
    generator,
    normal,
    one_thread,  # noqa: F401
    require,
)

# (P, [D, hidden ..., D_out]): 1 and odd sizes, below and above the tiles of any kernel; 1, 2, 3 and 4 layers.
SHAPES = [
    (1, [1, 1, 1, 1]),
    (7, [33, 7, 33]),
    (33, [97, 33]),
    (20, [64, 97, 97, 64]),
    (97, [33, 97, 7, 1, 33]),
]
shapes = pytest.mark.parametrize("rows, sizes", SHAPES, ids=lambda value: str(value).replace(" ", ""))


def make(rows: int, sizes: list[int], dtype: torch.dtype, seed: int = 0, layout: str = "contiguous") -> Tensors:
    source = generator(seed)
    inputs = {"x": normal((rows, sizes[0]), dtype, source, layout)}
    for layer, (width, out) in enumerate(itertools.pairwise(sizes)):
        inputs[f"weight{layer}"] = normal((out, width), dtype, source, layout) / width**0.5
        inputs[f"bias{layer}"] = normal((out,), dtype, source, layout)
    if layout != "contiguous":  # the division made dense copies
        source = generator(seed + 1)
        for name, value in inputs.items():
            inputs[name] = normal(tuple(value.shape), dtype, source, layout)
    return inputs


def parts(inputs: Tensors) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    depth = (len(inputs) - 1) // 2
    return inputs["x"], [inputs[f"weight{i}"] for i in range(depth)], [inputs[f"bias{i}"] for i in range(depth)]


def fused(backend: str = "auto", **options: Any) -> Any:
    return lambda inputs: ops.mlp(*parts(inputs), backend=backend, **options)


def plain(inputs: Tensors, masks: list[Tensor] | None = None, activation: Any = F.relu) -> Tensor:
    x, weights, biases = parts(inputs)
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        x = F.linear(x, weight, bias)
        if layer < len(weights) - 1:
            x = activation(x)
            if masks:
                x = x * masks[layer]
    return x


def exact(inputs: Tensors) -> Tensor:
    return oracle.mlp(*parts(inputs))


def sequential(inputs: Tensors, dropout: float, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """PEFT's head with nn.Dropout after each activation, owning the very tensors of `inputs`."""
    _, weights, biases = parts(inputs)
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases):
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")  # initialising would draw
        del linear.weight, linear.bias
        linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
        layers += [linear, activation(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def check(inputs: Tensors, d_out: Tensor, backend: str) -> None:
    require("mlp", backend, *parts(inputs), [])
    assert_as_accurate(evaluate(fused(backend), inputs, d_out), plain, exact, inputs, d_out)


@each_backend("mlp")
@dtypes
@shapes
def test_mlp_and_all_gradients_match_fp64_oracle(rows: int, sizes: list[int], dtype: torch.dtype, backend: str) -> None:
    check(make(rows, sizes, dtype), normal((rows, sizes[-1]), dtype, generator(9)), backend)


@each_backend("mlp")
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_mlp_of_noncontiguous_tensors_matches_fp64_oracle(layout: str, backend: str) -> None:
    inputs = make(33, [7, 97, 33], torch.float32, layout=layout)
    assert not inputs["x"].is_contiguous() and not inputs["weight0"].is_contiguous()
    check(inputs, normal((33, 33), torch.float32, generator(9), layout), backend)


@each_backend("mlp")
@dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mlp_with_tanh_and_all_gradients_match_fp64_oracle(dtype: torch.dtype, dropout: float, backend: str) -> None:
    """As prefix tuning's projection: a last layer that is much wider than the others."""
    inputs, d_out = make(33, [17, 65, 500], dtype), normal((33, 500), dtype, generator(9))
    torch.manual_seed(4)
    masks = [F.dropout(torch.ones(33, 65, dtype=dtype), dropout)] if dropout else []
    require("mlp", backend, *parts(inputs), masks, "tanh")
    torch.manual_seed(4)
    actual = evaluate(fused(backend, activation="tanh", dropout=dropout, training=True), inputs, d_out)
    assert_as_accurate(
        actual,
        lambda values: plain(values, masks, torch.tanh),
        lambda values: oracle.mlp(*parts(values), masks, "tanh"),
        inputs,
        d_out,
    )


def test_mlp_with_tanh_has_the_bits_of_sequential_and_the_gradients_of_finite_differences() -> None:
    inputs, d_out = make(7, [5, 9, 40], torch.float32), normal((7, 40), torch.float32, generator(9))
    actual = evaluate(fused(activation="tanh"), inputs, d_out)
    assert_identical(actual, evaluate(lambda values: sequential(values, 0.0, nn.Tanh)(values["x"]), inputs, d_out))
    small = make(3, [4, 5, 2], torch.float64)
    leaves = [value.requires_grad_() for value in small.values()]
    assert torch.autograd.gradcheck(lambda *values: fused(activation="tanh")(dict(zip(small, values))), leaves)


@examples(25)
@given(
    rows=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_fp64_mlp_of_any_small_shape_is_closer_to_fp64_oracle_than_fp32_linear(
    rows: int, sizes: list[int], seed: int
) -> None:
    inputs, d_out = make(rows, sizes, torch.float32, seed), normal((rows, sizes[-1]), torch.float32, generator(9))
    actual = evaluate(fused(), {name: value.double() for name, value in inputs.items()}, d_out)
    assert {value.dtype for value in actual.values()} == {torch.float64}
    assert_as_accurate(actual, plain, exact, inputs, d_out, precision=torch.float32, neighbours=0)


def test_mlp_gradients_match_finite_differences() -> None:
    inputs = make(3, [4, 5, 2], torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *values: fused()(dict(zip(inputs, values))), leaves)


@each_backend("mlp")
@pytest.mark.parametrize("rows", [0, 1])
def test_mlp_of_no_rows_gives_no_rows_and_zero_gradients(rows: int, backend: str) -> None:
    inputs = make(rows, [7, 5, 3], torch.float32)
    require("mlp", backend, *parts(inputs), [])
    result = evaluate(fused(backend), inputs, torch.zeros(rows, 3))
    assert result["output"].shape == (rows, 3)
    for name in inputs:
        assert torch.equal(result[f"d_{name}"], torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_mlp_dropout_gives_the_bits_of_sequential_with_dropout_for_a_seed(dtype: torch.dtype, dropout: float) -> None:
    inputs = make(33, [17, 97, 65, 9], dtype)
    d_out = normal((33, 9), dtype, generator(9))
    torch.manual_seed(3)
    actual = evaluate(fused(dropout=dropout, training=True), inputs, d_out)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = evaluate(lambda values: sequential(values, dropout)(values["x"]), inputs, d_out)
    assert_identical(actual, expected)
    assert torch.equal(after, torch.get_rng_state())
    without = evaluate(fused(), inputs, d_out)
    assert not torch.equal(actual["output"], without["output"])


@each_backend("mlp")
@dtypes
def test_mlp_with_dropout_and_all_gradients_match_fp64_oracle(dtype: torch.dtype, backend: str) -> None:
    inputs = make(33, [17, 97, 65, 9], dtype)
    d_out = normal((33, 9), dtype, generator(9))
    torch.manual_seed(4)
    masks = [F.dropout(torch.ones(33, width, dtype=dtype), 0.3) for width in (97, 65)]
    require("mlp", backend, *parts(inputs), masks)
    torch.manual_seed(4)
    actual = evaluate(fused(backend, dropout=0.3, training=True), inputs, d_out)
    assert_as_accurate(
        actual, lambda values: plain(values, masks), lambda values: oracle.mlp(*parts(values), masks), inputs, d_out
    )


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"dropout": 0.0, "training": True}], ids=["eval", "p0"])
def test_mlp_without_active_dropout_gives_the_bits_of_no_dropout_and_draws_nothing(options: dict[str, Any]) -> None:
    inputs = make(7, [5, 9, 3], torch.float32)
    before = torch.get_rng_state()
    actual = ops.mlp(*parts(inputs), **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(actual, ops.mlp(*parts(inputs)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_mlp_under_autocast_gives_the_bits_of_sequential_under_autocast(dropout: float, x_dtype: torch.dtype) -> None:
    inputs = make(33, [17, 97, 9], torch.float32)
    inputs["x"] = inputs["x"].to(x_dtype)
    d_out = normal((33, 9), torch.bfloat16, generator(9))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(5)
        actual = evaluate(fused(dropout=dropout, training=True), inputs, d_out)
        torch.manual_seed(5)
        expected = evaluate(lambda values: sequential(values, dropout)(values["x"]), inputs, d_out)
    assert actual["output"].dtype == torch.bfloat16 and actual["d_weight0"].dtype == torch.float32
    assert_identical(actual, expected)


def test_fp64_mlp_under_autocast_stays_in_fp64_as_linear_does() -> None:
    inputs = make(7, [5, 9, 3], torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused()(inputs), plain(inputs)
    assert actual.dtype == torch.float64
    assert torch.equal(actual, expected)


@each_backend("mlp")
def test_mlp_twice_gives_the_same_bits(backend: str) -> None:
    inputs = make(97, [257, 513, 257], torch.float32)
    require("mlp", backend, *parts(inputs), [])
    d_out = normal((97, 257), torch.float32, generator(9))
    first = evaluate(fused(backend), inputs, d_out)
    for _ in range(3):
        assert_identical(evaluate(fused(backend), inputs, d_out), first)


@each_backend("mlp")
def test_mlp_gives_gradients_only_to_tensors_that_require_them(backend: str) -> None:
    inputs = make(7, [5, 9, 3], torch.float32)
    require("mlp", backend, *parts(inputs), [])
    for name in ("x", "weight1"):
        inputs[name].requires_grad_()
    fused(backend)(inputs).sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == {"x", "weight1"}
    assert not fused(backend)({name: value.detach() for name, value in inputs.items()}).requires_grad


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3),
        "weights": [torch.zeros(4, 3), torch.zeros(5, 4)],
        "biases": [torch.zeros(4), torch.zeros(5)],
    }
    arguments.update(changes)
    return ops.mlp(arguments.pop("x"), arguments.pop("weights"), arguments.pop("biases"), **arguments)


META = torch.device("meta")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, r"x: expected a tensor of shape \(P, D\), got list"),
        ({"x": torch.zeros(3)}, ValueError, r"x: expected shape \(P, D\), got \(3,\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"x: .*floating.*torch.int64"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"weights\[0\]: .*\(4, 4\), got \(4, 3\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, TypeError, r"weights\[0\]: .*torch.bfloat16.*torch.float32"),
        ({"x": torch.zeros(2, 3, device=META)}, ValueError, r"weights\[0\]: .*device.*meta, got cpu"),
        ({"weights": [], "biases": []}, ValueError, r"weights: expected at least one.*got 0 for 0"),
        ({"biases": [torch.zeros(4)]}, ValueError, r"weights: .*one per bias, got 2 for 1"),
        ({"weights": [torch.zeros(4, 3), None]}, TypeError, r"weights\[1\]: .*\(out, in\), got NoneType"),
        ({"weights": [torch.zeros(4, 3), torch.zeros(5)]}, ValueError, r"weights\[1\]: .*\(out, in\), got \(5,\)"),
        ({"weights": [torch.zeros(4, 3), torch.zeros(5, 3)]}, ValueError, r"weights\[1\]: .*\(5, 4\), got \(5, 3\)"),
        (
            {"weights": [torch.zeros(4, 3, dtype=torch.int32), torch.zeros(5, 4)]},
            TypeError,
            r"weights\[0\]: expected a floating-point dtype, got torch.int32",
        ),
        (
            {"weights": [torch.zeros(4, 3, device=META), torch.zeros(5, 4)]},
            ValueError,
            r"weights\[0\]: expected the device of x, cpu, got meta",
        ),
        ({"biases": [torch.zeros(4), torch.zeros(4)]}, ValueError, r"biases\[1\]: .*\(5,\), got \(4,\)"),
        ({"biases": [torch.zeros(4, 1), torch.zeros(5)]}, ValueError, r"biases\[0\]: .*\(out,\), got \(4, 1\)"),
        ({"biases": [torch.zeros(4).half(), torch.zeros(5)]}, TypeError, r"biases\[0\]: .*weights\[0\].*float16"),
        (
            {"biases": [torch.zeros(4, device=META), torch.zeros(5)]},
            ValueError,
            r"biases\[0\]: expected the device of .*, cpu, got meta",
        ),
        ({"activation": "gelu"}, ValueError, r"activation: expected one of \('relu', 'tanh'\), got 'gelu'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout: .*got -0.1"),
        ({"dropout": float("nan")}, ValueError, r"dropout: .*got nan"),
        ({"dropout": "0.1"}, TypeError, r"dropout: "),
        ({"backend": "cuda"}, ValueError, r"backend: expected one of .*'reference'.*for op 'mlp', got 'cuda'"),
    ],
)
def test_mlp_refuses_a_wrong_argument_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_mlp_accepts_the_arguments_that_the_refusals_start_from() -> None:
    assert call().shape == (2, 5)
