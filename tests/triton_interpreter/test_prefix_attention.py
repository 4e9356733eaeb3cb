"""prefix_attention's Triton kernels in Triton's interpreter, against one query at a time in fp64.

Most tests run with tiles of 16 queries and 16 keys, so that small inputs have several of them and a rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedprompt import ops

pytest.importorskip("triton")
from fusedprompt.ops import _triton

if not _triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

from fusedprompt.ops.prefix_attention import _configs
from fusedprompt.ops.prefix_attention import triton as backend
from fusedprompt.ops.prefix_attention._op import Arguments
from test_ops_prefix_attention import FAR, NAMES, assert_one_key_wins, attend, concatenated, exact, some_inputs
from tolerance import Tensors, assert_as_accurate, assert_identical, evaluate, generator, normal

FORWARD, D_QUERY, D_KEYS = "attention_forward", "attention_d_query", "attention_d_keys"


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "real_tiles" not in request.fixturenames:
        for tiles in _configs._TILES.values():
            for key in tiles:
                monkeypatch.setitem(tiles, key, (16, 16, 4, 1))
    backend._launch.cache_clear()
    yield
    backend._launch.cache_clear()


@pytest.fixture
def real_tiles() -> None:
    """Of a test that runs with the tiles of a GPU."""


def positions(rows: list[list[int]], length: int) -> Tensor:
    """Of each row True at these."""
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, some in zip(mask, rows):
        row[some] = True
    return mask


HALVES = positions([[*range(3, 17)], [0, 1, 18]], 19)
# Row 1 begins with padding, row 2 ends with it, row 3 is nothing else.
PADDED = positions([[*range(27)], [*range(9, 27)], [*range(20)], []], 27)
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({"batch": 2, "kv_heads": 1, "group": 1, "length": 33, "prefix": 19}, {}),
    "groups, more keys than queries, odd widths": (
        {"batch": 2, "kv_heads": 2, "group": 3, "length": 7, "prefix": 3, "own": 19, "width": 40, "value_width": 5},
        {"scale": -0.3},
    ),
    "every option": (
        {"batch": 4, "kv_heads": 1, "group": 2, "length": 20, "prefix": 19, "own": 27, "prefixes": 2},
        {
            "index": torch.tensor([1, 0, 1, -1]),
            "prefix_mask": HALVES,
            "mask": PADDED,
            "softcap": 2.0,
            "window": 24,
        },
    ),
    "a window that leaves the prefix": (
        {"batch": 2, "kv_heads": 1, "group": 1, "length": 40, "prefix": 20},
        {"window": 19, "mask": positions([[*range(40)], [*range(5, 40)]], 40)},
    ),
    "one query a row": (
        {"batch": 9, "kv_heads": 1, "group": 2, "length": 1, "prefix": 19, "own": 17},
        {"mask": positions([[*range(n, 17)] for n in range(9)], 17)},
    ),
    "one query a row, chosen prefixes": (
        {"batch": 4, "kv_heads": 1, "group": 3, "length": 1, "prefix": 19, "own": 3, "prefixes": 2},
        {"index": torch.tensor([1, -1, 0, -1]), "prefix_mask": HALVES, "mask": positions([[0, 1, 2]] * 3 + [[]], 3)},
    ),
}
RUNS = [(name, torch.float32) for name in CASES]
RUNS += [(name, torch.bfloat16) for name in ("plain", "every option", "one query a row")]
RUNS += [("every option", torch.float16)]


def check(sizes: dict[str, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Output and every gradient. A second unit in the last place is for the kernels' tanh, and for the interpreter,
    which truncates to bf16."""
    inputs = some_inputs(**sizes, dtype=dtype)
    d_out = normal((*inputs["query"].shape[:3], inputs["value"].shape[3]), dtype, generator(5))
    found = evaluate(lambda x: attend(x, "triton", options), inputs, d_out)
    assert_as_accurate(
        found,
        lambda x: concatenated(x, options),
        lambda x: exact(x, options),
        inputs,
        d_out,
        ulps=2,
    )


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_output_and_every_gradient_match_the_fp64_oracle(name: str, dtype: torch.dtype) -> None:
    check(*CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_as_on_a_gpu_match_the_fp64_oracle(dtype: torch.dtype, real_tiles: None) -> None:
    check({"batch": 2, "kv_heads": 1, "group": 2, "length": 70, "prefix": 70}, {"window": 75}, dtype)


@pytest.mark.parametrize(
    ("programs", "dtype"), [(1, torch.bfloat16), (4, torch.bfloat16), (264, torch.float32)], ids=str
)
def test_the_prefixs_gradient_is_the_sum_over_rows_in_any_number_of_splits(
    programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 rows in one, in two of which the last is not full, and in five; those of many are added up in fp32."""
    monkeypatch.setattr(backend, "_PROGRAMS", programs)
    sizes = {"batch": 5, "kv_heads": 1, "group": 1, "length": 9, "prefix": 20}
    check(sizes, {"index": torch.tensor([0, -1, 0, 0, 0])}, dtype)


def some(dtype: torch.dtype = torch.float32, **changes: Any) -> Tensors:
    sizes: dict[str, Any] = {"batch": 3, "kv_heads": 1, "group": 2, "length": 9, "prefix": 5}
    return some_inputs(**{**sizes, **changes}, dtype=dtype)


def launches_of(inputs: Tensors, needed: tuple[str, ...] = NAMES, **options: Any) -> tuple[list[str], list[str]]:
    leaves = {name: value.clone().requires_grad_(name in needed) for name, value in inputs.items()}
    with _triton.recorded_launches() as forward:
        out = attend(leaves, "triton", options)
    with _triton.recorded_launches() as backward:
        out.sum().backward()
    assert {name for name, value in leaves.items() if value.grad is not None} == set(needed)
    return forward, backward


def test_one_launch_forward_and_as_many_backward_as_gradients_are_wanted() -> None:
    assert launches_of(some()) == ([FORWARD], [D_QUERY, D_KEYS, D_KEYS])
    assert launches_of(some(), ("prefix_key",)) == ([FORWARD], [D_QUERY, D_KEYS])
    assert launches_of(some(), ("query",)) == ([FORWARD], [D_QUERY])
    few = some(length=1, own=4)
    assert launches_of(few) == ([FORWARD] * 2, [D_QUERY, D_KEYS, D_KEYS])
    assert launches_of(few, index=torch.tensor([0, 0, -1])) == ([FORWARD], [D_QUERY, D_KEYS, D_KEYS])


def test_gradients_of_some_inputs_have_the_bits_of_all() -> None:
    inputs = some()
    truth = evaluate(lambda x: attend(x, "triton", {}), inputs, torch.ones(3, 2, 9, 8))
    leaves = {name: value.clone().requires_grad_(name in ("prefix_value", "key")) for name, value in inputs.items()}
    attend(leaves, "triton", {}).sum().backward()
    for name in ("prefix_value", "key"):
        assert torch.equal(leaves[name].grad, truth[f"d_{name}"])
    assert_identical(evaluate(lambda x: attend(x, "triton", {}), inputs, torch.ones(3, 2, 9, 8)), truth)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_noncontiguous_tensors_give_the_bits_of_contiguous_ones(layout: str) -> None:
    inputs, d_out = some(), normal((3, 2, 9, 8), torch.float32, generator(5))
    strange = {name: normal(tuple(x.shape), x.dtype, generator(0), layout).copy_(x) for name, x in inputs.items()}
    masks = {"mask": torch.ones(9, 3, dtype=torch.bool).t(), "index": torch.zeros(3, 2, dtype=torch.int64)[:, 0]}
    plain = {name: mask.contiguous() for name, mask in masks.items()}
    d_strange = normal((3, 2, 9, 8), torch.float32, generator(5), layout)
    assert_identical(
        evaluate(lambda x: attend(x, "triton", masks), strange, d_strange),
        evaluate(lambda x: attend(x, "triton", plain), inputs, d_out),
    )


def test_what_projections_and_caches_give_is_read_in_place() -> None:
    """Heads beside each other in memory, and one prefix expanded."""
    projected = torch.zeros(3, 12, 4 * 8).view(3, 12, 4, 8).transpose(1, 2)
    both, _ = backend._laid_out(projected, projected * 2)
    assert both[0] is projected and backend._strides(projected) == (48, 1, 4)
    assert backend._strides(torch.zeros(1, 2, 5, 8).expand(3, 2, 5, 8)) == (0, 5, 1)
    assert backend._strides(torch.zeros(3, 2, 5, 9)[..., :8]) is None


def test_queries_that_see_nothing_give_zeros_and_no_gradient() -> None:
    inputs, options = some(), {"index": torch.tensor([-1, 0, -1]), "mask": positions([[], [0], [*range(2, 9)]], 9)}
    found = evaluate(lambda x: attend(x, "triton", options), inputs, torch.ones(3, 2, 9, 8))
    for name in ("output", "d_query"):
        assert not found[name][0].any() and not found[name][2, :, :2].any() and found[name][1].all()
    assert not found["d_key"][0].any() and not found["d_value"][0].any()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("scores", FAR)
def test_scores_out_of_the_softmaxs_reach_stay_finite(scores: float) -> None:
    assert_one_key_wins(scores, "triton")


@pytest.mark.parametrize("length", [1, 9])
def test_rows_of_a_prefix_that_is_none_become_nan_and_no_others_do(length: int) -> None:
    index, inputs = torch.tensor([2, 0, -2]), some(length=length, prefixes=2)
    out = ops.prefix_attention(*inputs.values(), index=index, backend="triton")
    assert out[[0, 2]].isnan().all() and out[1].isfinite().all()
    alone = ops.prefix_attention(*(x if "prefix" in n else x[1:2] for n, x in inputs.items()), index=index[1:2])
    assert torch.equal(out[1:2], alone)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (3, 0)])
def test_no_rows_and_no_queries_launch_nothing(batch: int, length: int) -> None:
    inputs = some(batch=batch, length=length, own=4)
    with _triton.recorded_launches() as launches:
        found = evaluate(lambda x: attend(x, "triton", {}), inputs, torch.ones(batch, 2, length, 8))
    assert launches == [] and found["output"].shape == (batch, 2, length, 8)
    assert all(found[f"d_{name}"].shape == x.shape and not found[f"d_{name}"].any() for name, x in inputs.items())


def test_nothing_that_is_made_grows_with_rows_times_prefix(real_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the largest tensor beside inputs and gradients: parts of the prefix's gradient for 264 programs."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, Tensor) and not func.is_view else [])
            return out

    monkeypatch.setattr(_triton.Launch, "__call__", lambda *_: None)
    for prefix in (300, 3000):
        given = Arguments(*some(batch=40, kv_heads=8, prefix=prefix).values(), None, None, None, 1.0, 0, 0.0)
        sizes: list[int] = []
        with Sizes():
            out, lse = backend._forward(*given)
            backend._backward(out, out, lse, [True] * 5, *given)
        tile = 32 * 8
        assert len(sizes) > 8 and max(sizes) <= max(given.query.numel(), given.prefix_key.numel(), 264 * tile)
        assert max(sizes) < 40 * 8 * prefix * 8


def test_what_the_kernels_cannot_do_is_left_to_the_reference(request: pytest.FixtureRequest) -> None:
    def reason(**changes: Any) -> str:
        inputs = some_inputs(1, 1, 1, 2, 3, **changes)
        why = ops.explain("prefix_attention", *inputs.values())["triton"]
        with _triton.recorded_launches() as launches:
            ops.prefix_attention(*inputs.values())
        assert launches == ([FORWARD] if why == "runs" else [])
        return why

    assert reason() == "needs float32, bfloat16 or float16, got torch.float64"
    assert reason(width=257, dtype=torch.bfloat16) == "needs heads of at most 256 numbers, got 257"
    assert reason(value_width=256, dtype=torch.float16) == "runs"
    exact_heads = "leaves exact products in fp32 of heads of more than 128 numbers to PyTorch, got 129"
    assert reason(value_width=129, dtype=torch.float32) == exact_heads
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    assert reason(value_width=129, dtype=torch.float32) == "runs"
    many = torch.empty(2**10, 2**10, 2**10, 1, device="meta", dtype=torch.bfloat16)
    assert "meta" in ops.explain("prefix_attention", many)["triton"]
    expanded = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(2**10, 2**10, 2**10, 1)
    assert ops.explain("prefix_attention", expanded)["triton"] == "needs fewer than 2**30 queries, got 1073741824"


def test_ops_pass_opcheck_and_compile_with_the_bits_of_eager() -> None:
    inputs, index = some(batch=2), torch.tensor([0, -1])
    rest = (index, None, torch.ones(2, 9, dtype=torch.bool), 0.3, 7, 2.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    leaves = tuple(value.clone().requires_grad_() for value in inputs.values())
    torch.library.opcheck(torch.ops.fusedprompt.prefix_attention_triton.default, (*leaves, *rest), test_utils=checks)
    out, lse = torch.ops.fusedprompt.prefix_attention_triton(*inputs.values(), *rest)
    for needs in ([True] * 5, [True, False, True, False, False]):
        arguments = (torch.ones_like(out), out, lse, needs, *inputs.values(), *rest)
        torch.library.opcheck(
            torch.ops.fusedprompt.prefix_attention_backward_triton.default, arguments, test_utils=checks[::2]
        )

    def run(x: Tensors) -> Tensor:
        return 2 * attend(x, "triton", {"index": index})

    compiled, d_out = torch.compile(run, fullgraph=True, backend="aot_eager"), torch.ones(2, 2, 9, 8)
    assert_identical(evaluate(compiled, inputs, d_out), evaluate(run, inputs, d_out))


def test_every_kind_has_tiles_that_tensor_cores_can_multiply(real_tiles: None) -> None:
    for kernel, tiles in _configs._TILES.items():
        assert {key for key in tiles if key[0] != "ieee"} == {(p, w) for p in ("", "tf32") for w in (64, 128, 256)}
        assert {key for key in tiles if key[0] == "ieee"} == {("ieee", 64), ("ieee", 128)}
        for width in (1, 64, 65, 128):
            kind = _configs.Kind(1, width, 5, 1.0, 0.0, 0, "ieee", False)
            for few in (False, True):
                sizes = _configs.tile(kernel, kind, few)
                assert all(sizes[name] >= 16 and sizes[name] & sizes[name] - 1 == 0 for name in ("BLOCK_M", "BLOCK_N"))
                assert sizes["BLOCK_M"] == 16 or not few
            assert kind.blocks["V"] == 16 and width <= kind.blocks["D"] < max(17, 2 * width)
