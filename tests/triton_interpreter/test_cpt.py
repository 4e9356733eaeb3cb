"""CPT's Triton kernels in Triton's interpreter: what tests/test_ops_cpt.py, which runs there too, does not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedprompt
import oracle
from fusedprompt import ops

pytest.importorskip("triton")
from fusedprompt.ops import _triton

if not _triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

from fusedprompt.ops.cpt import _configs, triton
from tolerance import assert_identical, dtypes, evaluate, generator, largest, normal, ulp

# One element; odd; two blocks of columns and a rest; more than one block, whole.
SHAPES = [(1, 1), (7, 33), (5, 2500), (3, 2048)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-D{}".format(*s))


def make(shape: tuple[int, int], dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, ...]:
    """Rows that are too long and rows that are not; the second has norm 0, and the third may not move."""
    source = generator(0)
    embedding, delta = (normal(shape, dtype, source, layout) for _ in range(2))
    epsilon = (torch.rand(shape[0], generator=source, device="cpu") + 0.5) * shape[1] ** 0.5
    trainable = torch.ones(shape[0], dtype=torch.bool)
    delta[1:2], trainable[2:3] = 0.0, False
    return embedding, delta, epsilon, trainable


def fused(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    return ops.cpt(*arguments, backend="triton")


@dtypes
@shapes
def test_one_launch_forward_and_one_backward_match_the_fp64_oracle(shape: tuple[int, int], dtype: torch.dtype) -> None:
    embedding, delta, epsilon, trainable = make(shape, dtype)
    delta.requires_grad_()
    with _triton.recorded_launches() as launches:
        rows, projected = fused(embedding, delta, epsilon, trainable)
        d_rows = normal(shape, dtype, generator(9))
        rows.backward(d_rows)
    assert launches == ["cpt_forward", "cpt_backward"]
    truth = oracle.cpt(embedding, delta.detach(), epsilon)
    for value, true in zip((rows, projected), truth):
        # Each value is rounded twice, and the interpreter truncates to bf16.
        assert largest(value.double() - true) <= (3 if dtype == torch.bfloat16 else 2) * ulp(largest(true), dtype)
    assert delta.grad is not None
    expected = oracle.cpt_gradient(d_rows, [1 if trained else 0 for trained in trainable.tolist()])
    assert torch.equal(delta.grad.double(), expected)


@shapes
def test_rows_of_norm_0_have_the_gradient_of_others_and_frozen_rows_have_none(shape: tuple[int, int]) -> None:
    """That of |delta| does not exist at 0; the projection's is not taken. Nor does a frozen row take a NaN on."""
    embedding, delta, epsilon, trainable = make(shape, torch.float32)
    delta = torch.zeros_like(delta).requires_grad_()
    rows, projected = fused(embedding, delta, epsilon * 0, trainable)
    assert torch.equal(rows, embedding) and not projected.any()
    d_rows = torch.ones(shape)
    d_rows[2:3] = torch.nan
    rows.backward(d_rows)
    assert delta.grad is not None and torch.equal(delta.grad, trainable.float().unsqueeze(1).expand(shape))


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_noncontiguous_tensors_give_the_bits_of_contiguous_ones(layout: str) -> None:
    plain, strange = (make((7, 33), torch.float32, which) for which in ("contiguous", layout))
    epsilon, trainable = plain[2:]
    wide = (torch.stack((epsilon, epsilon), 1)[:, 0], torch.stack((trainable, ~trainable), 1)[:, 0])
    assert not strange[1].is_contiguous() and not wide[0].is_contiguous()
    found = []
    for (embedding, delta, *_), limits, d_layout in ((plain, plain[2:], "contiguous"), (strange, wide, layout)):
        d_rows = normal((7, 33), torch.float32, generator(9), d_layout)
        found.append(
            evaluate(lambda x, e=embedding, rest=limits: fused(e, x["delta"], *rest)[0], {"delta": delta}, d_rows)
        )
    assert_identical(found[1], found[0])


def test_twice_gives_the_same_bits_and_those_of_the_reference_where_nothing_is_long() -> None:
    embedding, delta, epsilon, trainable = make((33, 97), torch.float32)
    first = fused(embedding, delta, epsilon, trainable)
    again, other = (
        fused(embedding, delta, epsilon, trainable),
        ops.cpt(embedding, delta, epsilon, trainable, backend="reference"),
    )
    short = delta.double().norm(dim=1) < epsilon * 0.999
    for value, same, reference in zip(first, again, other):
        assert torch.equal(value, same) and torch.equal(value[short], reference[short])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_numbers_that_are_none_or_too_large_give_what_the_reference_gives(value: float) -> None:
    embedding, delta, epsilon, trainable = make((7, 33), torch.float32)
    delta[3, 5] = value
    found, expected = (
        fused(embedding, delta, epsilon, trainable),
        ops.cpt(embedding, delta, epsilon, trainable, backend="reference"),
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_no_rows_and_no_columns_launch_nothing() -> None:
    for shape in ((0, 5), (3, 0)):
        embedding, delta, epsilon, trainable = make(shape, torch.float32)
        with _triton.recorded_launches() as launches:
            rows, _ = fused(embedding, delta.requires_grad_(), epsilon, trainable)
            rows.sum().backward()
        assert launches == [] and delta.grad is not None and delta.grad.shape == shape


def test_op_passes_opcheck_and_compiles_with_the_bits_of_eager() -> None:
    embedding, delta, epsilon, trainable = make((7, 33), torch.float32)
    leaf = delta.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fusedprompt.cpt_triton.default, (embedding, leaf, epsilon, trainable))
    torch.library.opcheck(torch.ops.fusedprompt.cpt_backward_triton.default, (delta, trainable))

    def run(x: Any) -> Tensor:
        return 2 * fused(embedding, x["delta"], epsilon, trainable)[0]

    d_out = normal((7, 33), torch.float32, generator(9))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_identical(evaluate(compiled, {"delta": delta}, d_out), evaluate(run, {"delta": delta}, d_out))


def test_double_backward_is_refused_and_fp64_is_left_to_the_reference() -> None:
    embedding, delta, epsilon, trainable = make((7, 33), torch.float32)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        rows = fused(embedding, delta.requires_grad_(), epsilon, trainable)[0]
        torch.autograd.grad(rows.square().sum(), delta, create_graph=True)
    reason = "needs float32, bfloat16 or float16, got torch.float64"
    assert ops.explain("cpt", embedding.double())["triton"] == reason
    with _triton.recorded_launches() as launches:
        ops.cpt(embedding.double(), delta.detach().double(), epsilon, trainable)
        assert launches == []
        ops.cpt(embedding, delta.detach(), epsilon, trainable)
    assert launches == ["cpt_forward"]


def test_a_bound_in_another_dtype_is_read_as_it_is() -> None:
    embedding, delta, epsilon, trainable = make((7, 33), torch.bfloat16)
    epsilon = epsilon.bfloat16()
    found = triton.cpt(embedding, delta, epsilon, trainable)
    for one, other in zip(found, triton.cpt(embedding, delta, epsilon.float(), trainable)):
        assert torch.equal(one, other)


def test_tiles_cover_narrow_rows_and_have_at_most_1024_columns() -> None:
    assert [_configs.config(width)["BLOCK_D"] for width in (1, 33, 1024, 1025, 16384)] == [16, 64, 1024, 1024, 1024]


def test_a_step_of_the_module_is_one_launch_each_way_and_one_copy_that_writes_the_projection_back() -> None:
    config = fusedprompt.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 1, 4, 1, 5], cpt_tokens_type_mask=[1, 2, 3, 4, 0]
    )
    config.token_dim = 33
    module = fusedprompt.CPTEmbedding(config, torch.nn.Embedding(7, 33))
    torch.nn.init.normal_(module.delta_embedding.weight)
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view and "empty" not in func.name():
                names.append(func.name())
            return func(*args, **(kwargs or {}))

    module.encode()  # constants are made once
    with _triton.recorded_launches() as launches, Names():
        module.encode().sum().backward()
    assert launches == ["cpt_forward", "cpt_backward"]
    first = names.index("aten::copy_") + 1
    assert names[:first] == ["fusedprompt::cpt_triton", "aten::copy_"] and "fusedprompt::cpt_backward_triton" in names
    assert module.delta_embedding.weight.grad is not None
