"""The LSTM op against the fp64 oracle, with nn.LSTM as the measure of what error is fair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import oracle
from fusedprompt import ops
from tolerance import (
    Tensors,
    assert_as_accurate,
    assert_identical,
    assert_same_dtypes,
    dtypes,
    each_backend,
    evaluate,
    examples,
    generator,
    normal,
    one_thread,  # noqa: F401
    require,
)

# (B, P, D, H, layers, bidirectional)
Shape = tuple[int, int, int, int, int, bool]
SHAPES = [
    (1, 1, 1, 1, 1, False),
    (1, 20, 64, 32, 2, True),  # PEFT's head
    (1, 7, 33, 97, 1, True),
    (3, 17, 7, 33, 3, True),
    (2, 7, 97, 1, 2, False),
    (5, 1, 33, 7, 2, True),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-P{}-D{}-H{}-L{}-{}".format(*s[:5], 1 + s[5]))


def make(shape: Shape, dtype: torch.dtype, seed: int = 0, layout: str = "contiguous") -> Tensors:
    """x ~ N(0, 1) and weights ~ N(0, 1 / H), about what nn.LSTM starts from."""
    batch, rows, width, hidden, num_layers, bidirectional = shape
    directions = 2 if bidirectional else 1
    source = generator(seed)
    inputs = {"x": normal((batch, rows, width), dtype, source, layout)}
    for layer in range(num_layers):
        for direction in range(directions):
            into = width if layer == 0 else directions * hidden
            for kind, size in (("ih", (4 * hidden, into)), ("hh", (4 * hidden, hidden))):
                weight = normal(size, dtype, source, layout).mul_(hidden**-0.5)
                inputs[f"weight_{kind}_l{layer}{'_reverse' * direction}"] = weight
            for kind in ("ih", "hh"):
                bias = normal((4 * hidden,), dtype, source, layout)
                inputs[f"bias_{kind}_l{layer}{'_reverse' * direction}"] = bias
    return inputs


def d_output(shape: Shape, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    batch, rows, _, hidden, _, bidirectional = shape
    return normal((batch, rows, hidden * (1 + bidirectional)), dtype, generator(9), layout)


def parts(inputs: Tensors) -> tuple[Tensor, list[Tensor]]:
    return inputs["x"], list(inputs.values())[1:]


def fused(shape: Shape, backend: str = "auto", **options: Any) -> Any:
    def run(inputs: Tensors) -> Tensor:
        x, weights = parts(inputs)
        return ops.lstm(x, weights, num_layers=shape[4], bidirectional=shape[5], backend=backend, **options)

    return run


def stock(shape: Shape, dropout: float = 0.0) -> Any:
    """nn.LSTM in training mode, reading the very tensors of `inputs`."""

    def run(inputs: Tensors) -> Tensor:
        x, weights = parts(inputs)
        zeros = x.new_zeros(shape[4] * (1 + shape[5]), x.shape[0], shape[3])
        return torch._VF.lstm(x, (zeros, zeros), weights, True, shape[4], dropout, True, shape[5], True)[0]

    return run


def stock_with_masks(shape: Shape, masks: list[Tensor]) -> Any:
    """One-layer nn.LSTMs with the given dropout masks (P, B, directions * H) between them."""

    def run(inputs: Tensors) -> Tensor:
        x, weights = parts(inputs)
        one_layer = (*shape[:4], 1, shape[5])
        count = len(weights) // shape[4]
        for layer in range(shape[4]):
            x = stock(one_layer)({"x": x, **dict(enumerate(weights[layer * count : (layer + 1) * count]))})
            if layer < shape[4] - 1:
                x = x * masks[layer].transpose(0, 1)
        return x

    return run


def exact(shape: Shape, masks: list[Tensor] | None = None) -> Any:
    return lambda inputs: oracle.lstm(*parts(inputs), shape[5], masks or [])


def under_autocast(function: Any) -> Any:
    def run(inputs: Tensors) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(inputs)

    return run


def check(shape: Shape, inputs: Tensors, d_out: Tensor, backend: str = "auto", **options: Any) -> None:
    require("lstm", backend, *parts(inputs), [], shape[5])
    actual = evaluate(fused(shape, backend), inputs, d_out)
    assert_as_accurate(actual, stock(shape), exact(shape), inputs, d_out, **options)


@each_backend("lstm")
@dtypes
@shapes
def test_lstm_and_all_gradients_match_fp64_oracle(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    check(shape, make(shape, dtype), d_output(shape, dtype), backend)


@each_backend("lstm")
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_lstm_of_noncontiguous_tensors_matches_fp64_oracle(layout: str, backend: str) -> None:
    shape = (3, 7, 33, 17, 2, True)
    inputs = make(shape, torch.float32, layout=layout)
    assert not any(value.is_contiguous() for value in inputs.values() if value.dim() > 1)
    check(shape, inputs, d_output(shape, torch.float32, layout), backend)


@examples(25)
@given(
    shape=st.tuples(*[st.integers(1, high) for high in (3, 6, 6, 6, 3)], st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_fp64_lstm_of_any_small_shape_is_closer_to_fp64_oracle_than_fp32_nn_lstm(shape: Shape, seed: int) -> None:
    inputs, d_out = make(shape, torch.float32, seed), d_output(shape, torch.float32)
    actual = evaluate(fused(shape), {name: value.double() for name, value in inputs.items()}, d_out)
    assert {value.dtype for value in actual.values()} == {torch.float64}
    assert_as_accurate(actual, stock(shape), exact(shape), inputs, d_out, precision=torch.float32, neighbours=0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_gradients_match_finite_differences(bidirectional: bool) -> None:
    shape = (2, 3, 2, 2, 2, bidirectional)
    inputs = make(shape, torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *values: fused(shape)(dict(zip(inputs, values))), leaves)


@each_backend("lstm")
@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0), (0, 0)])
def test_lstm_of_an_empty_batch_or_sequence_gives_no_rows_and_zero_gradients(
    batch: int, rows: int, backend: str
) -> None:
    shape = (batch, rows, 3, 4, 2, True)
    inputs = make(shape, torch.float32)
    require("lstm", backend, *parts(inputs), [], True)
    result = evaluate(fused(shape, backend), inputs, torch.zeros(batch, rows, 8))
    assert result["output"].shape == (batch, rows, 8)
    for name, value in inputs.items():
        assert torch.equal(result[f"d_{name}"], torch.zeros_like(value))


@each_backend("lstm")
@dtypes
def test_lstm_with_dropout_draws_the_masks_of_nn_lstm_and_matches_fp64_oracle(dtype: torch.dtype, backend: str) -> None:
    shape, dropout = (3, 7, 5, 33, 3, True), 0.4
    inputs, d_out = make(shape, dtype), d_output(shape, dtype)
    torch.manual_seed(3)
    masks = [F.dropout(torch.ones(7, 3, 66, dtype=dtype), dropout) for _ in range(2)]
    after = torch.get_rng_state()
    require("lstm", backend, *parts(inputs), masks, True)
    for candidate in (fused(shape, backend, dropout=dropout, training=True), stock(shape, dropout)):
        torch.manual_seed(3)
        actual = evaluate(candidate, inputs, d_out)
        assert torch.equal(torch.get_rng_state(), after)
        assert_as_accurate(actual, stock_with_masks(shape, masks), exact(shape, masks), inputs, d_out)


@pytest.mark.parametrize(
    ("num_layers", "options"),
    [(2, {"dropout": 0.5}), (2, {"training": True}), (1, {"dropout": 0.5, "training": True})],
    ids=["eval", "p0", "one-layer"],
)
def test_lstm_without_active_dropout_gives_the_bits_of_no_dropout_and_draws_nothing(
    num_layers: int, options: dict[str, Any]
) -> None:
    shape = (2, 5, 3, 4, num_layers, True)
    inputs = make(shape, torch.float32)
    before = torch.get_rng_state()
    actual = fused(shape, **options)(inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(actual, fused(shape)(inputs))


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="without AVX-512 PyTorch's LSTM raises under autocast"
)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_lstm_under_autocast_has_the_dtypes_of_nn_lstm_and_matches_fp64_oracle(x_dtype: torch.dtype) -> None:
    shape = (1, 20, 33, 97, 2, True)
    inputs = make(shape, torch.bfloat16)  # already rounded: autocast rounds nothing away
    inputs = {name: value.float() if name != "x" else value.to(x_dtype) for name, value in inputs.items()}
    d_out = d_output(shape, torch.bfloat16)
    actual = evaluate(under_autocast(fused(shape)), inputs, d_out)
    assert actual["output"].dtype == torch.bfloat16 and actual["d_weight_ih_l0"].dtype == torch.float32
    plain = under_autocast(stock(shape))
    assert_same_dtypes(actual, evaluate(plain, inputs, d_out))
    assert_as_accurate(actual, plain, exact(shape), inputs, d_out, precision=torch.bfloat16)


def test_fp64_lstm_under_autocast_stays_in_fp64_as_nn_lstm_does() -> None:
    shape = (1, 5, 3, 4, 2, True)
    inputs = make(shape, torch.float64)
    actual = under_autocast(fused(shape))(inputs)
    assert actual.dtype == under_autocast(stock(shape))(inputs).dtype == torch.float64
    assert torch.equal(actual, fused(shape)(inputs))


@each_backend("lstm")
@dtypes
def test_lstm_twice_gives_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    shape = (1, 33, 129, 97, 2, True)
    inputs, d_out = make(shape, dtype), d_output(shape, dtype)
    require("lstm", backend, *parts(inputs), [], True)
    first = evaluate(fused(shape, backend), inputs, d_out)
    for _ in range(3):
        assert_identical(evaluate(fused(shape, backend), inputs, d_out), first)


@each_backend("lstm")
@dtypes
def test_lstm_gives_the_same_bits_with_and_without_gradients(dtype: torch.dtype, backend: str) -> None:
    shape = (1, 20, 33, 97, 2, True)
    inputs = make(shape, dtype)
    require("lstm", backend, *parts(inputs), [], True)
    with torch.no_grad():
        without = fused(shape, backend)(inputs)
    with_gradients = fused(shape, backend)({name: value.requires_grad_() for name, value in inputs.items()})
    assert with_gradients.requires_grad and not without.requires_grad
    assert torch.equal(with_gradients, without)


@each_backend("lstm")
def test_lstm_backward_through_a_retained_graph_gives_the_same_bits(backend: str) -> None:
    shape = (2, 7, 5, 9, 2, True)
    inputs = {name: value.requires_grad_() for name, value in make(shape, torch.float32).items()}
    require("lstm", backend, *parts(inputs), [], True)
    out = fused(shape, backend)(inputs)
    first, second = (
        torch.autograd.grad(out, list(inputs.values()), d_output(shape, torch.float32), retain_graph=True)
        for _ in range(2)
    )
    assert_identical(dict(zip(inputs, second)), dict(zip(inputs, first)))


@each_backend("lstm")
def test_lstm_gives_gradients_only_to_tensors_that_require_them(backend: str) -> None:
    shape = (1, 5, 3, 4, 2, True)
    inputs = make(shape, torch.float32)
    require("lstm", backend, *parts(inputs), [], True)
    wanted = {"x", "weight_hh_l1_reverse"}
    for name in wanted:
        inputs[name].requires_grad_()
    fused(shape, backend)(inputs).sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == wanted


@each_backend("lstm")
def test_lstm_refuses_double_backward(backend: str) -> None:
    shape = (1, 3, 2, 2, 1, True)
    inputs = {name: value.requires_grad_() for name, value in make(shape, torch.float32).items()}
    require("lstm", backend, *parts(inputs), [], True)
    out = fused(shape, backend)(inputs)
    with pytest.raises(RuntimeError, match=r"fusedprompt\.ops\.lstm has no double backward"):
        torch.autograd.grad(out.pow(2).sum(), inputs["x"], create_graph=True)


def call(**changes: Any) -> Tensor:
    inputs = make((2, 3, 5, 4, 2, True), torch.float32)
    arguments: dict[str, Any] = {"x": inputs["x"], "weights": list(inputs.values())[1:], "num_layers": 2, **changes}
    return ops.lstm(arguments.pop("x"), arguments.pop("weights"), **arguments)


def with_weight(index: int, value: Any) -> dict[str, Any]:
    weights: list[Any] = list(make((2, 3, 5, 4, 2, True), torch.float32).values())[1:]
    weights[index] = value
    return {"weights": weights}


META = torch.device("meta")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[[1.0]]]}, TypeError, r"x: expected a tensor of shape \(B, P, D\), got list"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected shape \(B, P, D\), got \(3, 5\)"),
        ({"x": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, r"x: .*floating.*torch.int64"),
        ({"x": torch.zeros(2, 3, 6)}, ValueError, r"weights\[0\]: .*\(4H, D_in\) = \(16, 6\), got \(16, 5\)"),
        (
            {"x": torch.zeros(2, 3, 5).half()},
            TypeError,
            r"weights\[0\]: .*dtype of x, torch.float16, got torch.float32",
        ),
        ({"x": torch.zeros(2, 3, 5, device=META)}, ValueError, r"weights\[0\]: .*device of x, meta, got cpu"),
        ({"weights": []}, ValueError, r"weights: expected 4 per layer and direction = 16 .*, got 0"),
        ({"num_layers": 1}, ValueError, r"weights: .* = 8 .*, got 16"),
        ({"bidirectional": False}, ValueError, r"weights: .* = 8 .*, got 16"),
        ({"num_layers": 0}, ValueError, r"num_layers: expected at least 1, got 0"),
        (with_weight(0, None), TypeError, r"weights\[0\]: expected a tensor of shape .*, got NoneType"),
        (with_weight(1, torch.zeros(16)), ValueError, r"weights\[1\]: expected shape \(4H, H\), got \(16,\)"),
        (with_weight(5, torch.zeros(16, 5)), ValueError, r"weights\[5\]: .*\(4H, H\) = \(16, 4\), got \(16, 5\)"),
        (with_weight(8, torch.zeros(16, 4)), ValueError, r"weights\[8\]: .*\(4H, D_in\) = \(16, 8\), got \(16, 4\)"),
        (with_weight(7, torch.zeros(15)), ValueError, r"weights\[7\]: .*\(4H,\) = \(16,\), got \(15,\)"),
        (with_weight(2, torch.zeros(16).bfloat16()), TypeError, r"weights\[2\]: .*torch.float32, got torch.bfloat16"),
        (with_weight(3, torch.zeros(16, dtype=torch.int32)), TypeError, r"weights\[3\]: .*got torch.int32"),
        (with_weight(4, torch.zeros(16, 5, device=META)), ValueError, r"weights\[4\]: .*device of x, cpu, got meta"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, TypeError, r"dropout: "),
        ({"backend": "triton"}, ValueError, r"backend: expected one of .*'reference'.*for op 'lstm', got 'triton'"),
    ],
)
def test_lstm_refuses_a_wrong_argument_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_lstm_accepts_the_arguments_that_the_refusals_start_from() -> None:
    assert call().shape == (2, 3, 8)
