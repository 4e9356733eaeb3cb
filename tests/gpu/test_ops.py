"""The Triton ops on a GPU against the fp64 oracle: forward and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from fusedprompt import Layout, ops
from tolerance import Tensors, dtypes, generator, largest, normal, require, ulp

# Relative to the size of the truth, in units in the last place of the products' dtype: a sum of n rounded products is
# off by about sqrt(n), and bf16 activations are rounded in each layer.
ULPS = 16
TF32_EPS = 2.0**-10

# (P, [D, hidden ..., D_out]): aligned and odd widths, one row, every size of tile.
SHAPES = [
    (1, [1, 1]),
    (7, [33, 7, 33]),
    (20, [64, 96, 64, 64]),
    (32, [130, 97, 16]),
    (33, [16, 32]),
    (63, [48, 80, 33]),
]
LARGE = [(20, [768, 768, 768, 768]), (32, [3072, 3072]), (50, [4097, 1024, 4096]), (63, [2048, 2048])]


def draw(rows: int, sizes: list[int], dtype: torch.dtype) -> Tensors:
    source = generator(rows)
    inputs = {"x": normal((rows, sizes[0]), dtype, source)}
    for layer, (width, out) in enumerate(itertools.pairwise(sizes)):
        inputs[f"weight{layer}"] = (normal((out, width), torch.float32, source) / width**0.5).to(dtype)
        inputs[f"bias{layer}"] = normal((out,), dtype, source)
    return inputs


def parts(inputs: Tensors) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    depth = (len(inputs) - 1) // 2
    return inputs["x"], [inputs[f"weight{i}"] for i in range(depth)], [inputs[f"bias{i}"] for i in range(depth)]


def run_mlp(
    inputs: Tensors, d_out: Tensor, device: torch.device, backend: str, activation: str = "relu"
) -> tuple[Tensors, list[Tensor]]:
    leaves = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
    x, weights, biases = parts(leaves)
    out = ops.mlp(x, weights, biases, activation=activation, backend=backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out.to(device, out.dtype))
    with torch.no_grad():
        hidden = [ops.mlp(x, weights[:depth], biases[:depth], backend=backend) for depth in range(1, len(weights))]
    found = {"output": out.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}
    return {name: value.cpu() for name, value in found.items()}, [value.cpu() for value in hidden]


def true_mlp(inputs: Tensors, d_out: Tensor, hidden: list[Tensor], activation: str = "relu") -> Tensors:
    """In fp64; ReLUs let through what they let through in `hidden`, because gradients jump where that differs."""
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    x, weights, biases = parts(leaves)
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        x = x @ weight.T + bias
        if layer < len(weights) - 1:
            x = torch.tanh(x) if activation == "tanh" else torch.where(hidden[layer] > 0, x, 0.0)
    gradients = torch.autograd.grad(x, list(leaves.values()), d_out.double())
    return {"output": x.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}


def assert_close(actual: Tensors, truth: Tensors, epsilon: float) -> None:
    for name, true in truth.items():
        value = actual[name].double()
        assert value.isfinite().all(), name
        size = float(true.norm())
        assert float((value - true).norm()) <= ULPS * epsilon * max(size, 1e-6), name


def check_mlp(device: torch.device, dtype: torch.dtype, rows: int, sizes: list[int], activation: str = "relu") -> None:
    """Output and every gradient against fp64."""
    inputs, d_out = draw(rows, sizes, dtype), normal((rows, sizes[-1]), dtype, generator(1))
    require("mlp", "triton", inputs["x"].to(device))
    actual, hidden = run_mlp(inputs, d_out, device, "triton", activation)
    assert_close(actual, true_mlp(inputs, d_out, hidden, activation), torch.finfo(dtype).eps)


@dtypes
@pytest.mark.parametrize("rows, sizes", SHAPES, ids=str)
def test_mlp_and_every_gradient_match_fp64_oracle(
    device: torch.device, dtype: torch.dtype, rows: int, sizes: list[int]
) -> None:
    check_mlp(device, dtype, rows, sizes)


@dtypes
@pytest.mark.parametrize("rows, sizes", LARGE, ids=str)
def test_mlp_of_a_real_model_matches_fp64_oracle(
    cuda: torch.device, dtype: torch.dtype, rows: int, sizes: list[int]
) -> None:
    check_mlp(cuda, dtype, rows, sizes)


@dtypes
@pytest.mark.parametrize("rows, sizes", [(20, [33, 97, 64]), (7, [64, 48, 272])], ids=str)
def test_mlp_with_tanh_and_every_gradient_match_fp64_oracle(
    device: torch.device, dtype: torch.dtype, rows: int, sizes: list[int]
) -> None:
    check_mlp(device, dtype, rows, sizes, "tanh")


@dtypes
@pytest.mark.parametrize("rows, sizes", [(20, [512, 1024, 20480]), (32, [768, 512, 18433])], ids=str)
def test_keys_and_values_of_all_layers_match_fp64_oracle(
    cuda: torch.device, dtype: torch.dtype, rows: int, sizes: list[int]
) -> None:
    """The last layer's gradients are those of parts of its rows."""
    check_mlp(cuda, dtype, rows, sizes, "tanh")


@pytest.mark.parametrize("rows", [20, 63])
def test_mlp_multiplies_in_tf32_where_torch_may(cuda: torch.device, rows: int) -> None:
    inputs, d_out = draw(rows, [768, 768, 768], torch.float32), normal((rows, 768), torch.float32, generator(1))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        actual, hidden = run_mlp(inputs, d_out, cuda, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    truth = true_mlp(inputs, d_out, hidden)
    assert_close(actual, truth, TF32_EPS)
    error = (actual["output"].double() - truth["output"]).norm() / truth["output"].norm()
    assert error > 1e-5, "these are exact products"


@pytest.mark.parametrize("rows", [20, 128])
def test_mlp_under_autocast_keeps_fp32_gradients(device: torch.device, rows: int) -> None:
    sizes = [64, 96, 64] if device.type == "cpu" else [4096, 3072, 4096]
    inputs, d_out = draw(rows, sizes, torch.float32), normal((rows, sizes[-1]), torch.float32, generator(1))
    with torch.autocast(device.type, torch.bfloat16):
        actual, hidden = run_mlp(inputs, d_out.bfloat16().float(), device, "triton")
    assert actual["output"].dtype == torch.bfloat16 and actual["d_weight0"].dtype == torch.float32
    assert_close(actual, true_mlp(inputs, d_out.bfloat16(), hidden), torch.finfo(torch.bfloat16).eps)


def test_mlp_is_deterministic(device: torch.device) -> None:
    inputs, d_out = draw(50, [80, 96, 64], torch.bfloat16), normal((50, 64), torch.bfloat16, generator(1))
    first, _ = run_mlp(inputs, d_out, device, "triton")
    for _ in range(3):
        again, _ = run_mlp(inputs, d_out, device, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 2500), (64, 4096)], ids=str)
def test_cpt_and_its_gradient_match_fp64_oracle(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    source = generator(0)
    embedding, delta = (normal(shape, dtype, source) for _ in range(2))
    epsilon = (torch.rand(shape[0], generator=source, device="cpu") + 0.5) * shape[1] ** 0.5
    delta[1::5] = 0.0
    types = [row % 9 for row in range(shape[0])]
    trainable = torch.tensor([code % 4 != 0 for code in types], device=device)
    leaf = delta.to(device).requires_grad_()
    rows, projected = ops.cpt(embedding.to(device), leaf, epsilon.to(device), trainable, backend="triton")
    for value, true in zip((rows, projected), oracle.cpt(embedding, delta, epsilon)):
        assert largest(value.double().cpu() - true) <= 4 * ulp(largest(true), dtype)
    d_rows = normal(shape, dtype, source)
    (d_delta,) = torch.autograd.grad(rows, leaf, d_rows.to(device))
    assert torch.equal(d_delta.double().cpu(), oracle.cpt_gradient(d_rows, types))


# B, Hkv, group, T, S, N, A, d, dv, and options.
ATTENTIONS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 3, 9, 11, 7, 1, 40, 24), {}),
    ((3, 1, 2, 5, 5, 70, 2, 16, 16), {"window": 60, "softcap": 3.0, "scale": 0.3}),
    ((4, 1, 4, 1, 9, 20, 1, 8, 8), {}),
]
# Of Llama 3.2 3B, of Gemma 2 with its soft cap and a window, and of a step of generation.
LARGE_ATTENTIONS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((4, 8, 3, 210, 210, 200, 1, 128, 128), {}),
    ((2, 4, 2, 300, 300, 1000, 3, 256, 256), {"window": 700, "softcap": 50.0}),
    ((64, 8, 3, 1, 129, 2000, 1, 128, 128), {}),
    ((16, 8, 1, 100, 100, 2000, 1, 64, 64), {}),
]


def draw_attention(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensors, dict[str, Tensor], Tensor]:
    """Inputs, masks and index, and d_out. Rows have padding at the left; one of several reads no prefix."""
    batch, kv_heads, group, length, own, prefix, prefixes, width, value_width = sizes
    source, heads = generator(length), kv_heads * group
    shapes = {"query": (batch, heads, length, width), "prefix_key": (prefixes, kv_heads, prefix, width)}
    shapes |= {"prefix_value": (prefixes, kv_heads, prefix, value_width), "key": (batch, kv_heads, own, width)}
    shapes |= {"value": (batch, kv_heads, own, value_width)}
    inputs = {name: normal(shape, dtype, source) for name, shape in shapes.items()}
    rows, place = torch.arange(batch), torch.arange(own)
    choice = {"mask": place >= (rows % (own // 2 + 1)).unsqueeze(1)}
    if prefixes > 1:
        choice["index"] = rows % (prefixes + 1) - 1
        choice["prefix_mask"] = torch.arange(prefix) < prefix - torch.arange(prefixes).unsqueeze(1)
    return inputs, choice, normal((batch, heads, length, value_width), dtype, source)


def check_attention(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, Any], truth_on: str
) -> None:
    """Output and every gradient. truth_on: the device on which the formula runs, in fp64."""
    inputs, choice, d_out = draw_attention(sizes, dtype)

    def run(where: Any, dtype: torch.dtype, backend: str) -> Tensors:
        leaves = {name: value.to(where, dtype).requires_grad_() for name, value in inputs.items()}
        given = {name: value.to(where) for name, value in choice.items()}
        out = ops.prefix_attention(**leaves, **given, **options, backend=backend)
        gradients = torch.autograd.grad(out, list(leaves.values()), d_out.to(where, dtype))
        found = {"output": out.detach(), **{f"d_{name}": one for name, one in zip(leaves, gradients)}}
        return {name: value.cpu() for name, value in found.items()}

    found, again = (run(device, dtype, "triton") for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert_close(found, run(truth_on, torch.float64, "reference"), torch.finfo(dtype).eps)


@dtypes
@pytest.mark.parametrize(("sizes", "options"), ATTENTIONS, ids=str)
def test_prefix_attention_and_every_gradient_match_the_reference_in_fp64(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Which tests/test_ops_prefix_attention.py holds against one query at a time."""
    check_attention(device, dtype, sizes, options, "cpu")


@dtypes
@pytest.mark.parametrize(("sizes", "options"), LARGE_ATTENTIONS, ids=str)
def test_prefix_attention_of_a_real_model_matches_the_reference_in_fp64(
    cuda: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    if dtype == torch.float32 and sizes[7] > 128:
        pytest.skip("exact products in fp32 of such heads are left to PyTorch")
    check_attention(cuda, dtype, sizes, options, "cuda")


# B, R, T, D, V
SPLICES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 33, 7),
    (3, 20, 17, 64, 50),
    (2, 5, 6, 1040, 11),
    (5, 2, 0, 16, 3),
    (4, 0, 3, 8, 3),
]


@dtypes
@pytest.mark.parametrize("shape", SPLICES, ids=str)
@pytest.mark.parametrize("arrangement", ["prefix", "any"])
@pytest.mark.parametrize("origin", ["table", "inputs_embeds"])
def test_splice_copies_rows_exactly_and_sums_their_gradients(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], arrangement: str, origin: str
) -> None:
    batch, rows, length, width, vocabulary = shape
    source = generator(0)
    # A prompt of numbers that both dtypes have: the interpreter truncates where a GPU rounds.
    prompt, table = normal((rows, width), dtype, source).float(), normal((vocabulary, width), dtype, source)
    ids = torch.randint(vocabulary, (batch, length), generator=source, device="cpu")
    embeds = normal((batch, length, width), dtype, source)
    slots = None
    where = oracle.prefix_slots(batch, rows, length)
    if arrangement == "any":
        if rows + length == 0:
            pytest.skip("there is nothing to choose from")
        slots = torch.randint(-rows, length, (batch, rows + length + 3), generator=source, device="cpu")
        where = slots.tolist()
    token_rows = oracle.table_rows(table, ids) if origin == "table" else embeds.double()
    leaves = [prompt.to(device).requires_grad_(), (table if origin == "table" else embeds).to(device).requires_grad_()]
    ids_there = ids.to(device)
    tokens = {"input_ids": ids_there, "table": leaves[1]} if origin == "table" else {"inputs_embeds": leaves[1]}
    layout = Layout(rows, None if slots is None else slots.to(device))
    batch_of = ops.splice_batch(
        leaves[0], layout, **tokens, attention_mask=ids_there, labels=ids_there, position_ids=ids_there,
        first_position=2, backend="triton",
    )  # fmt: skip
    expected = oracle.splice(prompt.to(dtype), where, token_rows)
    assert torch.equal(batch_of.inputs_embeds.detach().double().cpu(), expected)
    for field, fill in ((batch_of.attention_mask, 1), (batch_of.labels, -100)):
        assert field is not None
        assert field.tolist() == oracle.carry(ids, where, fill)
    d_out = normal(tuple(expected.shape), dtype, source)
    d_prompt, d_tokens = torch.autograd.grad(batch_of.inputs_embeds, leaves, d_out.to(device))
    true_prompt, true_tokens = oracle.splice_gradients(d_out, where, rows, length)
    if origin == "table":
        true_tokens = oracle.table_gradient(true_tokens, ids, vocabulary)
    for value, true, precision in ((d_prompt, true_prompt, torch.float32), (d_tokens, true_tokens, dtype)):
        allowed = (ULPS if precision == torch.float32 else 4) * ulp(largest(true), precision)
        assert largest(value.double().cpu() - true) <= allowed


def test_ids_outside_the_table_become_nan_and_nothing_else_does(device: torch.device) -> None:
    ids = torch.tensor([[0, -1, 5], [4, 2**40, 1]], device=device)
    table, prompt = torch.ones(5, 64, device=device), torch.ones(2, 64, device=device)
    out = ops.splice(prompt, Layout.prefix(2), input_ids=ids, table=table, backend="triton")
    assert out.isnan().all(-1).tolist() == [[False, False, False, True, True], [False, False, False, True, False]]
    assert out.isnan().any(-1).equal(out.isnan().all(-1))


def test_splice_addresses_more_than_2_to_the_31_elements(cuda: torch.device) -> None:
    """B * S * D = 2**31 + 2**23 elements of 2 bytes, checked at both ends and in the middle."""
    batch, rows, length, width = 33, 8, 2**13 - 8, 8192
    table = torch.randn(100, width, device=cuda, dtype=torch.bfloat16)
    prompt = torch.randn(rows, width, device=cuda, requires_grad=True)
    ids = torch.randint(100, (batch, length), device=cuda)
    assert batch * (rows + length) * width > 2**31
    out = ops.splice(prompt, Layout.prefix(rows), input_ids=ids, table=table, backend="triton")
    for b in (0, 16, batch - 1):
        assert torch.equal(out[b, :rows], prompt.detach().bfloat16())
        assert torch.equal(out[b, rows:], table[ids[b]])
    (d_prompt,) = torch.autograd.grad(out, prompt, torch.ones_like(out))
    assert torch.equal(d_prompt, torch.full_like(d_prompt, batch))
