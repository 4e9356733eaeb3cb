"""The MLP's Triton kernels, run by Triton's interpreter on a CPU, against the fp64 oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedprompt import ops

pytest.importorskip("triton")
from fusedprompt.ops import _triton

if not _triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

from fusedprompt.ops.mlp import _configs
from fusedprompt.ops.mlp import triton as backend
from fusedprompt.ops.mlp._configs import backward_config, forward_config, split
from tolerance import (
    Tensors,
    assert_identical,
    dtypes,
    evaluate,
    evaluate_oracle,
    examples,
    generator,
    largest,
    normal,
    ulp,
)

# (P, [D, hidden ..., D_out]): 1, 2, 3 and 4 layers. Widths that are multiples of 16 get other tiles than odd ones do.
SHAPES = [
    (1, [1, 1, 1, 1]),
    (7, [33, 7, 33]),
    (33, [130, 97]),
    (63, [33, 97, 7, 1, 33]),
    (63, [7, 33, 130, 7]),
    (20, [64, 96, 272, 64]),
    (7, [16, 16, 32]),
    (33, [16, 144, 16, 48]),
    (63, [48, 32, 80, 16, 16]),
]
# All in fp32. In 16 bits, which differ from it in tiles and conversions, an odd shape and aligned ones; fp16 has bf16's
# tiles.
RUNS = [(*shape, torch.float32) for shape in SHAPES]
RUNS += [(*SHAPES[index], torch.bfloat16) for index in (2, 5, 8)] + [(*SHAPES[2], torch.float16)]


def make(rows: int, sizes: list[int], dtype: torch.dtype, seed: int = 0) -> Tensors:
    source = generator(seed)
    inputs = {"x": normal((rows, sizes[0]), dtype, source)}
    for layer, (width, out) in enumerate(itertools.pairwise(sizes)):
        inputs[f"weight{layer}"] = normal((out, width), dtype, source) / width**0.5
        inputs[f"bias{layer}"] = normal((out,), dtype, source)
    return inputs


def parts(inputs: Tensors) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    depth = (len(inputs) - 1) // 2
    return inputs["x"], [inputs[f"weight{i}"] for i in range(depth)], [inputs[f"bias{i}"] for i in range(depth)]


def fused(inputs: Tensors, activation: str = "relu") -> Tensor:
    return ops.mlp(*parts(inputs), activation=activation, backend="triton")


def plain(
    inputs: Tensors, masks: Sequence[Tensor] = (), positive: Sequence[Tensor] = (), activation: str = "relu"
) -> Tensor:
    return plain_layers(inputs, masks, positive, activation)[-1]


def plain_layers(
    inputs: Tensors, masks: Sequence[Tensor] = (), positive: Sequence[Tensor] = (), activation: str = "relu"
) -> list[Tensor]:
    """What each layer gives. positive: which activations the ReLUs let through; by default those above zero."""
    x, weights, biases = parts(inputs)
    layers = []
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        x = F.linear(x, weight, bias)
        if layer < len(weights) - 1:
            if activation == "tanh":
                x = torch.tanh(x)
            else:
                x = torch.where(positive[layer], x, 0.0) if positive else F.relu(x)
            if masks:
                x = x * masks[layer].to(x.dtype)
        layers.append(x)
    return layers


def assert_as_accurate(actual: Tensors, baseline: Tensors, truth: Tensors, rounded: torch.dtype | None = None) -> None:
    """As `tolerance.assert_as_accurate`, with allowances for the interpreter.

    Its stores truncate to bf16, which is one more ulp, and its sums over rows add one after the other, where torch and
    the GPU add in pairs.

    rounded: the dtype of the hidden activations, where it is not that of the result.
    """
    assert actual.keys() == truth.keys() == baseline.keys()
    for name, true in truth.items():
        value, expected = actual[name], baseline[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        dtype = rounded or value.dtype
        factor = 4 if name.startswith("d_bias") else 2
        ulps = 2 if dtype == torch.bfloat16 else 1
        allowed = factor * largest(expected.double() - true) + ulps * ulp(largest(true), dtype)
        error = largest(value.double() - true)
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def check(
    inputs: Tensors,
    d_out: Tensor,
    masks: Sequence[Tensor] = (),
    oracle_inputs: Tensors | None = None,
    activation: str = "relu",
) -> Tensors:
    """Every layer's result, then every gradient, against the oracle; returns the output and the gradients.

    A gradient jumps where an activation crosses zero, and rounding may move it across. So the oracle lets through what
    the kernels let through, once these have been found right.
    """
    x, weights, biases = parts(inputs)
    compute = torch.bfloat16 if oracle_inputs else None
    out, hidden = torch.ops.fusedprompt.mlp_triton(x, weights, biases, list(masks), compute, activation)
    exact = {name: value.double() for name, value in (oracle_inputs or inputs).items()}

    def named(layers: list[Tensor]) -> Tensors:
        return {f"layer {index}": layer for index, layer in enumerate(layers)}

    baseline_layers, true_layers = (plain_layers(values, masks, (), activation) for values in (inputs, exact))
    assert_as_accurate(named([*hidden, out]), named(baseline_layers), named(true_layers), compute)
    positive = [activations > 0 for activations in hidden]
    truth = evaluate_oracle(lambda values: plain(values, masks, positive, activation), exact, d_out)
    baseline = evaluate(lambda values: plain(values, masks, positive, activation), inputs, d_out)
    actual = evaluate(lambda values: backend.mlp(*parts(values), list(masks), activation), inputs, d_out)
    assert_as_accurate(actual, baseline, truth, compute)
    return actual


@pytest.mark.parametrize("rows, sizes, dtype", RUNS, ids=lambda value: str(value).replace(" ", ""))
def test_mlp_and_all_gradients_match_fp64_oracle(rows: int, sizes: list[int], dtype: torch.dtype) -> None:
    check(make(rows, sizes, dtype), normal((rows, sizes[-1]), dtype, generator(9)))


@pytest.mark.parametrize(
    "rows, sizes, dropout, dtype",
    [
        (1, [1, 1, 1], False, torch.float32),
        (33, [130, 97, 7], True, torch.float32),
        (20, [64, 96, 272, 64], False, torch.float32),
        (20, [64, 96, 64], True, torch.bfloat16),
        (33, [130, 97, 7], False, torch.float16),
    ],
    ids=str,
)
def test_mlp_with_tanh_and_all_gradients_match_fp64_oracle(
    rows: int, sizes: list[int], dropout: bool, dtype: torch.dtype
) -> None:
    masks = [F.dropout(torch.ones(rows, width, dtype=dtype), 0.3) for width in sizes[1:-1]] if dropout else []
    check(make(rows, sizes, dtype), normal((rows, sizes[-1]), dtype, generator(9)), masks, activation="tanh")


def test_tanh_is_flat_at_large_values_and_keeps_nan_and_dropped_units_pass_no_gradient() -> None:
    x = torch.tensor([[-torch.inf], [-1e4], [0.0], [1e4], [torch.inf], [torch.nan]])
    inputs = {"x": x, "weight0": torch.ones(3, 1), "bias0": torch.zeros(3)}
    inputs |= {"weight1": torch.ones(1, 3), "bias1": torch.zeros(1)}
    masks = [torch.tensor([[2.0, 0.0, 2.0]]).repeat(6, 1)]
    found = evaluate(lambda values: backend.mlp(*parts(values), masks, "tanh"), inputs, torch.ones(6, 1))
    expected = evaluate(lambda values: plain(values, masks, (), "tanh"), inputs, torch.ones(6, 1))
    for name in ("output", "d_x", "d_bias0"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert found["d_x"][:5].flatten().tolist() == [0, 0, 4, 0, 0]


@pytest.fixture
def narrow_is_wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers of more than 200 outputs are taken for wide ones, which they are from 16385 on."""
    monkeypatch.setattr(_configs, "_WIDE", 200)
    backend._backward_launch.cache_clear()
    yield
    backend._backward_launch.cache_clear()


@pytest.mark.parametrize(
    "inputs, outputs, activation, dtype",
    [
        (16, 4112, "relu", torch.float32),
        (33, 801, "tanh", torch.float32),
        (33, 801, "relu", torch.bfloat16),
        (33, 801, "tanh", torch.float16),
    ],
    ids=str,
)
def test_the_gradient_of_a_layer_with_many_outputs_is_the_sum_of_parts(
    inputs: int, outputs: int, activation: str, dtype: torch.dtype, narrow_is_wide: None
) -> None:
    """As of keys and values of all layers; the last part is not full."""
    values, d_out = make(3, [7, inputs, outputs], dtype), normal((3, outputs), dtype, generator(9))
    with _triton.recorded_launches() as launches:
        found = check(values, d_out, activation=activation)
    # `check` runs forward twice.
    assert launches == ["linear_forward"] * 4 + ["linear_backward", "sum_of_parts", "linear_backward"]
    assert_identical(found, evaluate(lambda x: fused(x, activation), values, d_out))


@pytest.mark.parametrize("dropout", [False, True])
def test_sums_of_parts_pass_through_masks_and_may_stand_alone(dropout: bool, narrow_is_wide: None) -> None:
    masks = [F.dropout(torch.ones(3, 40), 0.3)] if dropout else []
    sizes = [7, 40, 801] if dropout else [7, 801]
    check(make(3, sizes, torch.float32), normal((3, 801), torch.float32, generator(9)), masks, activation="tanh")


@examples(8)
@given(
    rows=st.integers(1, 40),
    sizes=st.lists(st.one_of(st.integers(1, 40), st.sampled_from((16, 32, 48))), min_size=2, max_size=5),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
def test_mlp_of_any_small_shape_matches_fp64_oracle(rows: int, sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    check(make(rows, sizes, dtype, seed), normal((rows, sizes[-1]), dtype, generator(seed + 2)))


@pytest.mark.parametrize("width", [2128, 4240])
def test_mlp_of_wide_layers_matches_fp64_oracle(width: int) -> None:
    check(make(3, [16, width, 16], torch.float32), normal((3, 16), torch.float32, generator(9)))


@dtypes
def test_mlp_with_dropout_and_all_gradients_match_fp64_oracle(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    masks = [F.dropout(torch.ones(29, width, dtype=dtype), 0.3) for width in (97, 65)]
    inputs, d_out = make(29, [17, 97, 65, 9], dtype), normal((29, 9), dtype, generator(9))
    check(inputs, d_out, masks)
    torch.manual_seed(4)
    drawn = evaluate(
        lambda values: ops.mlp(*parts(values), dropout=0.3, training=True, backend="triton"), inputs, d_out
    )
    assert_identical(drawn, evaluate(lambda values: backend.mlp(*parts(values), masks), inputs, d_out))


# Each two values of parameters, x, dropout and shape meet.
AUTOCAST = [
    (torch.float32, torch.float32, False, 33, [17, 97, 40, 9]),
    (torch.float32, torch.bfloat16, True, 33, [17, 97, 40, 9]),
    (torch.float32, torch.bfloat16, False, 128, [32, 48, 16]),
    (torch.float16, torch.float32, True, 128, [32, 48, 16]),
    (torch.float16, torch.bfloat16, False, 33, [17, 97, 40, 9]),
]


@pytest.mark.parametrize("parameters, x_dtype, dropout, rows, sizes", AUTOCAST, ids=str)
def test_mlp_under_autocast_matches_fp64_oracle(
    parameters: torch.dtype, x_dtype: torch.dtype, dropout: bool, rows: int, sizes: list[int]
) -> None:
    inputs = make(rows, sizes, parameters)
    inputs["x"] = inputs["x"].to(x_dtype)
    masks = [F.dropout(torch.ones(rows, width, dtype=x_dtype), 0.3) for width in sizes[1:-1]] if dropout else []
    d_out = normal((rows, sizes[-1]), torch.bfloat16, generator(9))
    # The products' operands are rounded to bf16 by definition, so the oracle starts from rounded ones.
    rounded = {name: value.bfloat16() for name, value in inputs.items() if not name.startswith("bias")}
    with torch.autocast("cpu", torch.bfloat16), _triton.recorded_launches() as launches:
        actual = check(inputs, d_out, masks, {**inputs, **rounded})
    assert actual["output"].dtype == torch.bfloat16
    assert {actual[f"d_{name}"].dtype for name in inputs if name != "x"} == {parameters}
    assert len(launches) == 3 * (len(sizes) - 1)  # nothing was cast by a kernel of its own


@pytest.mark.parametrize("depth, dropout", [(1, 0.0), (2, 0.5), (4, 0.0)])
def test_mlp_launches_one_kernel_a_layer_in_each_direction(depth: int, dropout: float) -> None:
    inputs = {name: value.requires_grad_() for name, value in make(7, [33] * (depth + 1), torch.float32).items()}
    with _triton.recorded_launches() as launches:
        out = ops.mlp(*parts(inputs), dropout=dropout, training=True, backend="triton")
    assert launches == ["linear_forward"] * depth
    with _triton.recorded_launches() as launches:
        out.sum().backward()
    assert launches == ["linear_backward"] * depth


def test_mlp_twice_gives_the_same_bits() -> None:
    inputs, d_out = make(29, [96, 130, 97], torch.float32), normal((29, 97), torch.float32, generator(9))
    assert_identical(evaluate(fused, inputs, d_out), evaluate(fused, inputs, d_out))


def test_mlp_of_no_rows_launches_nothing_and_gives_zero_gradients() -> None:
    inputs = make(0, [7, 5, 3], torch.float32)
    with _triton.recorded_launches() as launches:
        result = evaluate(fused, inputs, torch.zeros(0, 3))
    assert launches == [] and result["output"].shape == (0, 3)
    for name, value in inputs.items():
        assert torch.equal(result[f"d_{name}"], torch.zeros_like(value))


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_mlp_of_noncontiguous_rows_and_biases_gives_the_bits_of_contiguous_ones(layout: str) -> None:
    inputs, d_out = make(29, [7, 97, 33], torch.float32), normal((29, 33), torch.float32, generator(9))
    strange = dict(inputs)
    for name, value in inputs.items():
        if not name.startswith("weight"):
            other = normal(tuple(value.shape), value.dtype, generator(0), layout)
            strange[name] = other.copy_(value)
    assert not strange["x"].is_contiguous()
    d_strange = normal((29, 33), torch.float32, generator(9), layout)
    assert torch.equal(d_strange, d_out) and not d_strange.is_contiguous()
    assert_identical(evaluate(fused, strange, d_strange), evaluate(fused, inputs, d_out))


def test_mlp_keeps_nan_as_relu_does() -> None:
    inputs = make(2, [3, 4, 5], torch.float32)
    inputs["bias0"][1] = torch.nan
    d_out = torch.ones(2, 5)
    actual, expected = evaluate(fused, inputs, d_out), evaluate(plain, inputs, d_out)
    for name, value in expected.items():
        assert torch.equal(actual[name].isnan(), value.isnan()), name


def test_mlp_gives_gradients_only_to_tensors_that_require_them() -> None:
    inputs = make(7, [5, 9, 3], torch.float32)
    for name in ("x", "weight1"):
        inputs[name].requires_grad_()
    fused(inputs).sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == {"x", "weight1"}
    assert not fused({name: value.detach() for name, value in inputs.items()}).requires_grad


def test_mlp_refuses_double_backward() -> None:
    inputs = {name: value.requires_grad_() for name, value in make(2, [3, 4], torch.float32).items()}
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(fused(inputs).square().sum(), inputs["x"], create_graph=True)


def refusals() -> list[Any]:
    few, many, half = make(3, [4, 5], torch.float32), make(33, [4, 5], torch.float32), make(64, [4, 5], torch.bfloat16)
    turned = {**few, "weight0": few["weight0"].t().contiguous().t()}
    wide = {name: value.double() for name, value in few.items()}
    long = {"x": torch.ones(1, 1), "weight0": torch.ones(2**23 + 1, 1), "bias0": torch.ones(2**23 + 1)}
    empty = make(3, [4, 1, 2], torch.float32)
    empty["weight0"], empty["bias0"], empty["weight1"] = torch.zeros(0, 4), torch.zeros(0), torch.zeros(2, 0)
    return [
        pytest.param(many, "leaves exact products in fp32 of more than 32 rows to cuBLAS, got 33", id="exact rows"),
        pytest.param(half, "leaves products in torch.bfloat16 of more than 63 rows to cuBLAS, got 64", id="rows"),
        pytest.param(turned, r"contiguous weights, got weights\[0\] with strides \(1, 5\)", id="contiguous"),
        pytest.param(wide, r"needs float32, bfloat16 or float16, got torch.float64", id="dtype"),
        pytest.param(long, r"at most 8388608 units, got weights\[0\] \(8388609, 1\)", id="width"),
        pytest.param(empty, r"at least one input and output, got weights\[0\] \(0, 4\)", id="empty"),
    ]


@pytest.mark.parametrize(("inputs", "reason"), refusals())
def test_mlp_that_triton_refuses_runs_on_the_reference(inputs: Tensors, reason: str) -> None:
    with pytest.raises(ops.BackendUnavailable, match=reason):
        fused(inputs)
    with _triton.recorded_launches() as launches:
        actual = ops.mlp(*parts(inputs))
    assert launches == [] and torch.equal(actual, plain(inputs))


def test_mlp_takes_as_many_rows_as_its_products_allow(request: pytest.FixtureRequest) -> None:
    x, weights, biases = parts(make(200, [4, 5], torch.float32))

    def most(dtype: torch.dtype = torch.float32) -> int:
        """The most rows that run, counted one by one."""
        taken = [n for n in range(201) if ops.explain("mlp", x[:n].to(dtype), weights, biases)["triton"] == "runs"]
        return len(taken) - 1

    assert most() == 32
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    assert most() == 63
    with torch.autocast("cpu", torch.bfloat16):
        assert most() == most(torch.bfloat16) == 128
        weights[0] = weights[0].bfloat16()
        assert most(torch.bfloat16) == 63
    assert ops.explain("mlp", x.half())["triton"].startswith("leaves products in torch.float16 of more than 63 rows")


def test_mlp_runs_on_triton_by_default_and_elsewhere_if_told_to() -> None:
    arguments = parts(make(32, [4, 5], torch.float32))
    with _triton.recorded_launches() as launches:
        with ops.use_backend("reference"):
            ops.mlp(*arguments)
        ops.mlp(*arguments, backend="reference")
        assert launches == []
        ops.mlp(*arguments)
    assert launches == ["linear_forward"]


@pytest.mark.parametrize(
    ("compute", "activation", "dropout"), [(None, "relu", False), (torch.bfloat16, "relu", True), (None, "tanh", True)]
)
def test_mlp_ops_pass_opcheck(dropout: bool, compute: torch.dtype | None, activation: str) -> None:
    x, weights, biases = parts(make(7, [5, 9, 3], torch.float32))
    masks = [F.dropout(torch.ones(7, 9), 0.5)] if dropout else []
    out, hidden = torch.ops.fusedprompt.mlp_triton(x, weights, biases, masks, compute, activation)
    d_out = torch.ones_like(out)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for leaf in (x, *weights, *biases):
        leaf.requires_grad_()
    torch.library.opcheck(
        torch.ops.fusedprompt.mlp_triton.default, (x, weights, biases, masks, compute, activation), test_utils=checks
    )
    arguments = (d_out, x.detach(), [weight.detach() for weight in weights], masks, hidden, compute, activation)
    torch.library.opcheck(torch.ops.fusedprompt.mlp_backward_triton.default, arguments, test_utils=checks)


@pytest.mark.parametrize(("autocast", "activation"), [(False, "relu"), (True, "relu"), (False, "tanh")])
def test_mlp_compiles_in_one_graph_with_the_bits_of_eager(autocast: bool, activation: str) -> None:
    inputs, d_out = make(7, [5, 9, 3], torch.float32), normal((7, 3), torch.float32, generator(9))

    def run(values: Tensors) -> Tensor:
        return fused(values, activation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_identical(evaluate(compiled, inputs, d_out), evaluate(run, inputs, d_out))


# Of an H100. A load takes about 0.8 us to arrive, so that 3.35 TB/s need this much under way. Backward writes as much
# as it reads, and needs half of it.
MULTIPROCESSORS, IN_FLIGHT = 132, 2.7e6
# x again for each program, from L2, which gives 5.5 TB/s.
L2_BY_MEMORY = 5.5 / 3.35


@pytest.mark.parametrize("width", [768, 1024, 2048, 3072, 4096, 8192])
@pytest.mark.parametrize("rows", [20, 50, 64, 100, 128, 200, 255])
@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16", "autocast"])
def test_large_layers_keep_the_chip_busy_or_are_left_to_cublas(rows: int, width: int, cast: bool) -> None:
    """Counted, not timed. Smaller layers than D=3072 stay in L2, and wait for the launch and for each other."""
    parameters = torch.float32 if cast else torch.bfloat16
    x, weight = torch.empty(rows, width, dtype=parameters), torch.empty(width, width, dtype=parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        runs = ops.explain("mlp", x, [weight])["triton"] == "runs"
    assert runs == (rows <= (128 if cast else 63))
    if not runs:
        return
    itemsize = parameters.itemsize
    forward = forward_config(rows, width, width, (2, itemsize), "tf32")
    first = forward_config(rows, width, width, (itemsize, itemsize), "tf32")  # x is not yet what autocast makes
    backward = backward_config(rows, width, width, itemsize, torch.bfloat16, "tf32")
    for tile, strip, needed in (
        (forward, "BLOCK_N", 1.0),
        (first, "BLOCK_N", 0.4),  # it moves half of what casting the weights would
        (backward, "BLOCK_K", 0.5),
    ):
        programs = -(-width // tile[strip])
        ahead = programs * tile["BLOCK_N"] * tile["BLOCK_K"] * itemsize * (tile["num_stages"] - 1)
        read_again, weights = programs * rows * width * 2, width * width * itemsize
        if width >= 3072:
            assert programs >= 0.7 * MULTIPROCESSORS
            assert ahead >= needed * IN_FLIGHT
            assert read_again + weights <= 2 * L2_BY_MEMORY * weights
        else:
            assert programs >= min(width // 32, 0.4 * MULTIPROCESSORS)
            assert ahead >= needed * weights / 10  # so that they arrive in at most ten times 0.8 us


# L, D and H of prefixes with a projection: GPT-2, Llama 3.2 3B, Llama 3.1 8B with a small H, Llama 2 7B.
PROJECTIONS = [(12, 768, 768), (28, 1024, 1024), (32, 1024, 512), (32, 4096, 4096)]


@pytest.mark.parametrize("layers, width, hidden", PROJECTIONS)
@pytest.mark.parametrize("rows", [20, 50, 63, 100, 128])
@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16", "autocast"])
def test_keys_and_values_of_all_layers_keep_the_chip_busy(
    rows: int, layers: int, width: int, hidden: int, cast: bool
) -> None:
    """Counted as above, of the last layer: without parts 24 to 64 programs would write the gradient of its weight."""
    outputs, itemsize = 2 * layers * width, 4 if cast else 2
    if rows > (128 if cast else 63):
        return
    weights = hidden * outputs * itemsize
    forward = forward_config(rows, hidden, outputs, (2, itemsize), "tf32")
    backward = backward_config(rows, hidden, outputs, itemsize, torch.bfloat16, "tf32")
    strips, parts = -(-hidden // backward["BLOCK_K"]), split(hidden, outputs, backward)
    for tile, programs, needed in ((forward, -(-outputs // forward["BLOCK_N"]), 1.0), (backward, strips * parts, 0.5)):
        ahead = programs * tile["BLOCK_N"] * tile["BLOCK_K"] * itemsize * (tile["num_stages"] - 1)
        assert programs >= 0.7 * MULTIPROCESSORS and ahead >= needed * IN_FLIGHT
    x_again, d_out_again = -(-outputs // forward["BLOCK_N"]) * rows * hidden * 2, strips * rows * outputs * 2
    assert max(x_again, d_out_again) + weights <= 2 * L2_BY_MEMORY * weights
    assert 2 * parts * rows * hidden * 4 <= 0.16 * 2 * weights  # the parts, written and read, in L2
    assert 1 < parts <= outputs // (16 * backward["BLOCK_N"])


def test_layers_of_p_tuning_have_no_parts() -> None:
    """Whose gradients so keep the order of their sums."""
    for hidden, outputs in itertools.product((1, 128, 768, 4096), (1, 768, 4096, 8192, 16384)):
        tile = backward_config(20, hidden, outputs, 2, torch.bfloat16, "tf32")
        assert split(hidden, outputs, tile) == 1


def test_mlp_tiles_cover_their_rows_and_are_few() -> None:
    for precision, compute, most in (
        ("ieee", torch.float32, 63),
        ("tf32", torch.float32, 63),
        ("tf32", torch.bfloat16, 128),
    ):
        for rows in (1, 16, 17, 32, 33, 63, 64, 65, 128):
            for width in (1, 768, 2112, 2128, 4224, 4240, 16384):
                if rows > most:
                    continue
                forward = forward_config(rows, width, width, (compute.itemsize,) * 2, precision)
                backward = backward_config(rows, width, width, compute.itemsize, compute, precision)
                assert forward["BLOCK_P"] == backward["BLOCK_P"] >= rows
                assert min(value for name, value in {**forward, **backward}.items() if "BLOCK" in name) >= 16
    assert len(list(backend.configurations(pdl=True))) <= 320
