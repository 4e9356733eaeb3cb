"""Attention to a shared prefix: against one query at a time in fp64, and against concatenated keys in PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from benches._memory import peak_bytes
from fusedprompt import ops
from fusedprompt.ops.prefix_attention import _parts, reference
from tolerance import (
    Tensors,
    assert_as_accurate,
    assert_identical,
    dtypes,
    each_backend,
    evaluate,
    evaluate_oracle,
    generator,
    largest,
    normal,
    one_thread,
)

__all__ = ["one_thread"]
NAMES = ("query", "prefix_key", "prefix_value", "key", "value")


def some_inputs(
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    prefix: int,
    *,
    own: int = 0,
    width: int = 8,
    value_width: int = 0,
    prefixes: int = 1,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
) -> Tensors:
    """own: S, T if 0. value_width: dv, d if 0."""
    own, value_width, source = own or length, value_width or width, generator(length + prefix)
    shapes = {
        "query": (batch, kv_heads * group, length, width),
        "prefix_key": (prefixes, kv_heads, prefix, width),
        "prefix_value": (prefixes, kv_heads, prefix, value_width),
        "key": (batch, kv_heads, own, width),
        "value": (batch, kv_heads, own, value_width),
    }
    return {name: normal(shape, dtype, source, layout) for name, shape in shapes.items()}


def concatenated(x: Tensors, options: dict[str, Any]) -> Tensor:
    """PyTorch's attention to keys that are put together for each row and each head of queries."""
    query, prefix_key, prefix_value, key, value = (x[name] for name in NAMES)
    (rows, heads, length, width), own, prefix = query.shape, key.shape[2], prefix_key.shape[2]
    index = options.get("index")
    index = torch.zeros(rows, dtype=torch.int64) if index is None else index
    group = heads // key.shape[1]
    keys, values = (
        torch.cat((a[index.clamp(min=0)], b), 2).repeat_interleave(group, 1)
        for a, b in ((prefix_key, key), (prefix_value, value))
    )
    at = torch.arange(prefix + own - length, prefix + own).unsqueeze(1)
    seen = (torch.arange(prefix + own) <= at) & (torch.arange(prefix + own) > at - options.get("window", prefix + own))
    prefix_mask, mask = options.get("prefix_mask"), options.get("mask")
    real = torch.ones(rows, prefix, dtype=torch.bool) if prefix_mask is None else prefix_mask[index.clamp(min=0)]
    own_real = torch.ones(rows, own, dtype=torch.bool) if mask is None else mask
    seen = seen & torch.cat((real & (index >= 0).unsqueeze(1), own_real), 1)[:, None, None]
    scale = options.get("scale", width**-0.5)
    if "softcap" not in options and width == value.shape[3]:
        added = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        return scaled_dot_product_attention(query, keys, values, attn_mask=added, scale=scale)
    scores = (query @ keys.mT) * scale
    if "softcap" in options:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    weights = torch.softmax(scores.masked_fill(~seen, -1e4), 3, dtype=torch.promote_types(query.dtype, torch.float32))
    return (weights * seen).to(query.dtype) @ values


def exact(x: Tensors, options: dict[str, Any]) -> Tensor:
    index = options.get("index")
    given = {**options, "index": None if index is None else index.tolist()}
    return oracle.prefix_attention(*(x[name] for name in NAMES), **given)


def some_masks(batch: int, own: int, kind: str) -> Tensor:
    """Padding on the left, on the right, or anywhere; a row without any, and one of nothing else."""
    counts = torch.arange(batch).unsqueeze(1) % (own + 1)
    place = torch.arange(own).expand(batch, own)
    if kind == "left":
        return place >= counts
    if kind == "right":
        return place < own - counts
    mask = torch.rand(batch, own, generator=generator(batch), device="cpu") > 0.5
    mask[0], mask[-1] = True, False
    return mask


HOLES = torch.tensor([[True, False, True, True, False], [False, True, True, False, False]])
# Sizes, and options.
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one of each": ({"batch": 1, "kv_heads": 1, "group": 1, "length": 1, "prefix": 1}, {}),
    "plain": ({"batch": 3, "kv_heads": 2, "group": 1, "length": 7, "prefix": 5}, {}),
    "a group of 3, odd width": ({"batch": 2, "kv_heads": 2, "group": 3, "length": 5, "prefix": 3, "width": 40}, {}),
    "a group of 8, one head": ({"batch": 2, "kv_heads": 1, "group": 8, "length": 4, "prefix": 9}, {"scale": 0.7}),
    "one query": ({"batch": 5, "kv_heads": 2, "group": 3, "length": 1, "prefix": 6, "own": 7}, {}),
    "own keys before": ({"batch": 2, "kv_heads": 2, "group": 2, "length": 4, "prefix": 3, "own": 9}, {}),
    "left": (
        {"batch": 4, "kv_heads": 1, "group": 2, "length": 5, "prefix": 3},
        {"mask": some_masks(4, 5, "left")},
    ),
    "right": (
        {"batch": 7, "kv_heads": 1, "group": 1, "length": 5, "prefix": 3},
        {"mask": some_masks(7, 5, "right")},
    ),
    "mixed, with none, stacked": (
        {"batch": 6, "kv_heads": 2, "group": 1, "length": 4, "prefix": 5, "prefixes": 2},
        {
            "index": torch.tensor([0, -1, 1, 0, -1, 1]),
            "prefix_mask": HOLES,
            "mask": some_masks(6, 4, "holes"),
        },
    ),
    "mixed, group of 3, one query": (
        {"batch": 4, "kv_heads": 1, "group": 3, "length": 1, "prefix": 5, "own": 3, "prefixes": 2},
        {"index": torch.tensor([1, 1, -1, -1]), "prefix_mask": HOLES, "mask": some_masks(4, 3, "left")},
    ),
    "none at all": (
        {"batch": 2, "kv_heads": 1, "group": 2, "length": 3, "prefix": 2},
        {"index": torch.tensor([-1, -1]), "mask": some_masks(2, 3, "holes")},
    ),
    "neighbours": (
        {"batch": 4, "kv_heads": 1, "group": 2, "length": 3, "prefix": 2, "prefixes": 3},
        {"index": torch.tensor([2, 2, 0, 0])},
    ),
    "window within the own keys": (
        {"batch": 2, "kv_heads": 2, "group": 1, "length": 6, "prefix": 4},
        {"window": 3, "mask": some_masks(2, 6, "holes")},
    ),
    "window into the prefix": ({"batch": 2, "kv_heads": 1, "group": 2, "length": 5, "prefix": 6}, {"window": 7}),
    "window of one": ({"batch": 2, "kv_heads": 1, "group": 1, "length": 4, "prefix": 2, "own": 6}, {"window": 1}),
    "window, one query": (
        {"batch": 3, "kv_heads": 1, "group": 2, "length": 1, "prefix": 6, "own": 4, "prefixes": 2},
        {"window": 7, "index": torch.tensor([0, 1, 1])},
    ),
    "window past the prefix": (
        {"batch": 2, "kv_heads": 1, "group": 1, "length": 3, "prefix": 3, "own": 9},
        {"window": 4},
    ),
    "window of everything": ({"batch": 2, "kv_heads": 1, "group": 1, "length": 4, "prefix": 3}, {"window": 7}),
    "soft cap": ({"batch": 2, "kv_heads": 2, "group": 3, "length": 5, "prefix": 4}, {"softcap": 1.5}),
    "all": (
        {"batch": 6, "kv_heads": 2, "group": 3, "length": 4, "prefix": 5, "own": 7, "prefixes": 2, "value_width": 5},
        {
            "index": torch.tensor([1, 0, -1, 1, 0, -1]),
            "prefix_mask": HOLES,
            "mask": some_masks(6, 7, "holes"),
            "softcap": 2.0,
            "window": 8,
            "scale": -0.4,
        },
    ),
    "narrow values": ({"batch": 2, "kv_heads": 1, "group": 2, "length": 3, "prefix": 4, "value_width": 3}, {}),
}
cases = pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)


def attend(x: Tensors, backend: str, options: dict[str, Any]) -> Tensor:
    return ops.prefix_attention(*(x[name] for name in NAMES), backend=backend, **options)


@each_backend("prefix_attention")
@cases
@dtypes
def test_output_and_every_gradient_are_as_accurate_as_concatenations(
    dtype: torch.dtype, sizes: dict[str, int], options: dict[str, Any], backend: str
) -> None:
    inputs = some_inputs(**sizes, dtype=dtype)
    d_out = normal((*inputs["query"].shape[:3], inputs["value"].shape[3]), dtype, generator(5))
    found = evaluate(lambda x: attend(x, backend, options), inputs, d_out)
    assert_as_accurate(found, lambda x: concatenated(x, options), lambda x: exact(x, options), inputs, d_out)


@each_backend("prefix_attention")
@cases
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_output_and_every_gradient_are_the_formulas_in_fp64(
    layout: str, sizes: dict[str, int], options: dict[str, Any], backend: str
) -> None:
    inputs = some_inputs(**sizes, layout=layout)
    d_out = normal((*inputs["query"].shape[:3], inputs["value"].shape[3]), torch.float64, generator(5), layout)
    found = evaluate(lambda x: attend(x, backend, options), inputs, d_out)
    truth = evaluate_oracle(lambda x: exact(x, options), inputs, d_out)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["plain", "mixed, with none, stacked", "all"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    sizes, options = CASES[name]
    inputs = [one.requires_grad_() for one in some_inputs(**sizes).values()]
    torch.autograd.gradcheck(lambda *x: ops.prefix_attention(*x, **options), inputs)


@pytest.mark.parametrize("at_once", [1, 50, 1000])
@pytest.mark.parametrize("name", ["soft cap", "window into the prefix", "all"])
def test_plain_pytorch_in_any_number_of_chunks_is_the_same(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, options = CASES[name]
    inputs = some_inputs(**sizes)
    d_out = torch.ones(*inputs["query"].shape[:3], inputs["value"].shape[3], dtype=torch.float64)
    whole = evaluate(lambda x: attend(x, "reference", options), inputs, d_out)
    monkeypatch.setattr(_parts, "_SCORES_AT_ONCE", at_once)
    for key, value in evaluate(lambda x: attend(x, "reference", options), inputs, d_out).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("threads", "heads", "batch", "length"), [(1, 2, 40, 33), (4, 1, 7, 11), (5, 2, 3, 171)])
@dtypes
def test_many_queries_are_summed_as_accurately_as_rows(
    dtype: torch.dtype, threads: int, heads: int, batch: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns where a row's queries are many, and at once where heads are fewer than threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = some_inputs(batch, heads, 3, length, 20, dtype=dtype)
    d_out = normal(tuple(inputs["query"].shape), dtype, generator(5))
    found = evaluate(lambda x: attend(x, "reference", {}), inputs, d_out)

    def truth(x: Tensors) -> Tensor:
        return concatenated(x, {})

    assert_as_accurate(found, truth, truth, inputs, d_out, neighbours=2)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["flash", "plain"])
@dtypes
def test_queries_that_see_nothing_give_zeros_and_no_gradient(dtype: torch.dtype, softcap: float | None) -> None:
    """Rows 0 and 1 read no prefix. In 0 the first two positions are padding, 1 is nothing but padding."""
    inputs = some_inputs(3, 1, 2, 4, 3, dtype=dtype)
    mask = torch.tensor([[False, False, True, True], [False] * 4, [True] * 4])
    options = {"index": torch.tensor([-1, -1, 0]), "mask": mask, "softcap": softcap}
    found = evaluate(lambda x: attend(x, "reference", options), inputs, torch.ones(3, 2, 4, 8, dtype=dtype))
    for name in ("output", "d_query"):
        assert not found[name][0, :, :2].any() and not found[name][1].any() and found[name][2].all()
    assert not found["d_key"][1].any() and not found["d_value"][1].any()
    assert all(value.isfinite().all() for value in found.values())


def test_a_row_that_reads_no_prefix_is_the_row_alone() -> None:
    inputs = some_inputs(3, 2, 2, 6, 5, dtype=torch.float32)
    out = attend(inputs, "reference", {"index": torch.tensor([0, -1, 0])})
    query, keys, values = inputs["query"][1:2], inputs["key"][1:2], inputs["value"][1:2]
    alone = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[1:2], alone)


def test_rows_are_the_same_in_any_company() -> None:
    inputs = some_inputs(5, 2, 2, 6, 40, dtype=torch.float32)
    whole = attend(inputs, "reference", {})
    own = {name: value if name.startswith("prefix") else value[3:4] for name, value in inputs.items()}
    torch.testing.assert_close(attend(own, "reference", {})[0], whole[3], rtol=1e-5, atol=1e-6)


FAR = [1e4, 8e4]


def assert_one_key_wins(scores: float, backend: str) -> None:
    """Of scores out of the softmax's reach, whichever part it is in, and everything stays finite."""
    inputs = {name: torch.zeros(1, 1, 2, 1) for name in NAMES}
    inputs["query"][..., 0, 0], inputs["query"][..., 1, 0] = scores, -scores
    inputs["prefix_key"][:], inputs["key"][:] = 1, -1
    inputs["prefix_value"][:], inputs["value"][:] = 3, 5
    found = evaluate(lambda x: attend(x, backend, {}), inputs, torch.ones(1, 1, 2, 1))
    assert found["output"].flatten().tolist() == [3.0, 5.0]
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("scores", FAR)
def test_scores_out_of_the_softmaxs_reach_stay_finite(scores: float) -> None:
    assert_one_key_wins(scores, "reference")


@pytest.mark.parametrize("needed", [some for n in (1, 2) for some in itertools.combinations(NAMES, n)], ids="-".join)
def test_gradients_of_some_inputs_are_those_of_all(needed: tuple[str, ...]) -> None:
    inputs = some_inputs(3, 2, 2, 4, 5, dtype=torch.float32)
    truth = evaluate(lambda x: attend(x, "reference", {}), inputs, torch.ones(3, 4, 4, 8))
    leaves = {name: value.clone().requires_grad_(name in needed) for name, value in inputs.items()}
    attend(leaves, "reference", {}).sum().backward()
    assert {name for name, value in leaves.items() if value.grad is not None} == set(needed)
    for name in needed:
        torch.testing.assert_close(leaves[name].grad, truth[f"d_{name}"])


def test_two_passes_give_the_same_bits() -> None:
    inputs = some_inputs(8, 2, 3, 50, 60, dtype=torch.float32)
    runs = [evaluate(lambda x: attend(x, "reference", {}), inputs, torch.ones(8, 6, 50, 8)) for _ in range(2)]
    assert_identical(*runs)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (3, 0), (0, 0)])
def test_no_rows_and_no_queries_give_an_empty_output_and_no_gradient(batch: int, length: int) -> None:
    inputs = some_inputs(batch, 2, 2, length, 5, own=max(length, 3), dtype=torch.float32)
    for options in ({}, {"index": torch.zeros(batch, dtype=torch.int64)}, {"softcap": 2.0}):
        found = evaluate(
            lambda x, given=options: attend(x, "reference", given), inputs, torch.ones(batch, 4, length, 8)
        )
        assert found["output"].shape == (batch, 4, length, 8)
        for name in NAMES:
            assert found[f"d_{name}"].shape == inputs[name].shape and not found[f"d_{name}"].any()


def test_the_gradient_of_the_gradient_is_refused() -> None:
    inputs = [one.requires_grad_() for one in some_inputs(2, 1, 1, 3, 2).values()]
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(ops.prefix_attention(*inputs).sum(), inputs, create_graph=True)


def test_autocast_casts_as_it_does_for_attention() -> None:
    inputs = [one.requires_grad_() for one in some_inputs(2, 2, 2, 6, 5, dtype=torch.float32).values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.prefix_attention(inputs[0].bfloat16(), *inputs[1:])
    cast = ops.prefix_attention(*(one.bfloat16() for one in inputs))
    assert out.dtype == torch.bfloat16 and torch.equal(out, cast)
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


class Names(TorchDispatchMode):
    """What is dispatched, our own ops' insides included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = {"prefix_attention": reference._forward, "prefix_attention_backward": reference._backward}
        name = func.name().removeprefix("fusedprompt::")
        if name in own:
            with self:
                return own[name](*args)
        self.names.append(name.removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("group", "length", "products"), [(1, 6, 2), (3, 6, 4), (3, 1, 2)])
def test_all_rows_are_one_product_with_the_prefix(group: int, length: int, products: int) -> None:
    """And as many with themselves as heads read one of the keys; a single query needs one."""
    inputs = [one.requires_grad_() for one in some_inputs(9, 2, group, length, 5, own=6, dtype=torch.float32).values()]
    products += group == 1 and length > 1 and inputs[3].shape[2] > length
    with Names() as forward:
        out = ops.prefix_attention(*inputs)
    with Names() as backward:
        out.sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert forward.names.count(flash) == products and backward.names.count(f"{flash}_backward") == products


@pytest.mark.parametrize("indexed", [False, True])
def test_on_other_devices_the_host_waits_for_nothing(indexed: bool) -> None:
    """On the meta device, which has no values to wait for."""
    inputs = [one.to("meta").requires_grad_() for one in some_inputs(3, 2, 2, 4, 5, prefixes=1 + indexed).values()]
    index = torch.empty(3, dtype=torch.int64, device="meta") if indexed else None
    mask = torch.empty(3, 4, dtype=torch.bool, device="meta")
    with Names() as names:
        reference.prefix_attention(*inputs, index, None, mask, 1.0, 0, 0.0).sum().backward()
    waits = ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "equal", "unique")
    assert names.names and not set(waits) & set(names.names)
    assert all(one.grad is not None and one.grad.shape == one.shape for one in inputs)


@pytest.mark.parametrize("prefixes", [1, 2])
def test_rows_are_chosen_on_other_devices_as_they_are_here(prefixes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the index is not the host's, each row takes its own prefix."""
    inputs, index = some_inputs(4, 2, 3, 5, 4, prefixes=prefixes), torch.tensor([0, -1, prefixes - 1, 0])
    masks = {"prefix_mask": torch.arange(4).expand(prefixes, 4) > 0, "mask": some_masks(4, 5, "holes")}
    d_out = torch.ones(4, 6, 5, 8, dtype=torch.float64)
    truth = evaluate(lambda x: attend(x, "reference", {"index": index, **masks}), inputs, d_out)

    def of_the_device(given: Any) -> Any:
        for row in range(4):
            own = given.readers[row : row + 1]
            yield slice(row, row + 1), own.clamp(min=0), own.unsqueeze(1) >= 0

    monkeypatch.setattr(reference, "_readers", of_the_device)
    found = evaluate(lambda x: attend(x, "reference", {"index": index, **masks}), inputs, d_out)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value)


def held(rows: int, prefix: int, group: int, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes at the peak of a forward and a backward pass; of one tensor (rows, heads, prefix, width)."""
    inputs = [
        one.requires_grad_() for one in some_inputs(rows, 2, group, 16, prefix, width=32, dtype=torch.float32).values()
    ]

    def step() -> None:
        ops.prefix_attention(*inputs, **options).sum().backward()
        for one in inputs:
            one.grad = None

    step()
    return peak_bytes(step), rows * 2 * group * prefix * 32 * 4


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["flash", "plain"])
@pytest.mark.parametrize("group", [1, 3])
def test_memory_grows_with_the_prefix_and_the_rows_and_not_with_their_product(
    group: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """f(2B, 2N) - f(2B, N) - f(B, 2N) + f(B, N) is what grows with B N alone."""
    monkeypatch.setattr(_parts, "_SCORES_AT_ONCE", 1 << 16)
    peaks = {(b, n): held(b, n, group, options) for b in (32, 64) for n in (1024, 2048)}
    crossed = sum(sign * peaks[size][0] for sign, size in zip((1, -1, -1, 1), sorted(peaks)))
    assert abs(crossed) <= 0.002 * peaks[64, 2048][1]
    peak, copies = peaks[64, 2048]
    assert peak < 0.3 * copies


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a query of three dimensions": (
        {"query": torch.zeros(2, 3, 4)},
        ValueError,
        r"query: expected shape \(B, Hq, T, d\)",
    ),
    "whole numbers": ({"query": torch.zeros(2, 4, 3, 8, dtype=torch.int64)}, TypeError, "query: expected a floating"),
    "no tensor": ({"key": None}, TypeError, r"key: expected a tensor of shape \(B, Hkv, S, d\), got NoneType"),
    "heads that do not divide": (
        {"query": torch.zeros(2, 5, 3, 8)},
        ValueError,
        "prefix_key: expected Hkv heads that divide the 5 of query, got 2",
    ),
    "another width": (
        {"prefix_key": torch.zeros(1, 2, 5, 7)},
        ValueError,
        r"prefix_key: expected shape \(A, Hkv, N, d\)",
    ),
    "values of another length": ({"prefix_value": torch.zeros(1, 2, 4, 8)}, ValueError, "prefix_value: expected shape"),
    "values of another width": ({"prefix_value": torch.zeros(1, 2, 5, 7)}, ValueError, "prefix_value: expected shape"),
    "other heads": (
        {"key": torch.zeros(2, 1, 3, 8)},
        ValueError,
        r"key: expected shape \(B, Hkv, S, d\) = \(2, 2, 3, 8\)",
    ),
    "other rows": ({"value": torch.zeros(1, 2, 3, 8)}, ValueError, r"value: expected shape \(B, Hkv, S, dv\)"),
    "fewer keys than queries": (
        {"key": torch.zeros(2, 2, 2, 8), "value": torch.zeros(2, 2, 2, 8)},
        ValueError,
        "key: expected S >= T = 3 positions, got 2",
    ),
    "an empty prefix": (
        {"prefix_key": torch.zeros(1, 2, 0, 8), "prefix_value": torch.zeros(1, 2, 0, 8)},
        ValueError,
        "prefix_key: expected A >= 1 prefixes of N >= 1 positions",
    ),
    "two prefixes and no index": (
        {"prefix_key": torch.zeros(2, 2, 5, 8), "prefix_value": torch.zeros(2, 2, 5, 8)},
        ValueError,
        "index: expected which of the 2 prefixes each row reads, got None",
    ),
    "an index of other rows": (
        {"index": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"index: expected shape \(B,\)",
    ),
    "a narrow index": ({"index": torch.zeros(2, dtype=torch.int32)}, TypeError, "index: expected torch.int64"),
    "an index too high": ({"index": torch.tensor([0, 1])}, IndexError, r"index: expected numbers in \[-1, 1\), got 1"),
    "an index too low": ({"index": torch.tensor([0, -2])}, IndexError, r"index: expected numbers in \[-1, 1\), got -2"),
    "a mask of numbers": ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected torch.bool, got torch.float32"),
    "a mask of the whole": ({"mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"mask: expected shape \(B, S\)"),
    "a mask of rows for prefixes": (
        {"prefix_mask": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        r"prefix_mask: expected shape \(A, N\) = \(1, 5\), got \(2, 5\)",
    ),
    "mixed dtypes": ({"value": torch.zeros(2, 2, 3, 8).half()}, TypeError, "value: expected the dtype of query"),
    "another device": (
        {"key": torch.zeros(2, 2, 3, 8, device="meta")},
        ValueError,
        "key: expected the device of query",
    ),
    "an endless scale": ({"scale": float("inf")}, ValueError, "scale: expected a finite number or None, got inf"),
    "a window of nothing": ({"window": 0}, ValueError, "window: expected a positive number or None, got 0"),
    "a soft cap of nothing": ({"softcap": 0.0}, ValueError, "softcap: expected a positive number or None, got 0.0"),
    "a soft cap that is none": ({"softcap": float("nan")}, ValueError, "softcap: expected a positive number"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = some_inputs(2, 2, 2, 3, 5, dtype=torch.float32)
    assert ops.prefix_attention(**arguments).shape == (2, 4, 3, 8)
    with pytest.raises(error, match=message):
        ops.prefix_attention(**{**arguments, **changes})


def test_the_largest_tolerance_is_small() -> None:
    """What the tests above allow is of the size of a rounding."""
    sizes, options = CASES["plain"]
    inputs = some_inputs(**sizes, dtype=torch.float32)
    out = attend(inputs, "reference", options)
    assert largest(out.double() - exact(inputs, options)) <= 1e-6
