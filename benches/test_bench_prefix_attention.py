"""Attention of all rows to one prefix, alone: `ops.prefix_attention` against keys that are put together for each row,
which is what transformers' caches give, and against FlexAttention on these, where it compiles.

    python -m pytest benches/test_bench_prefix_attention.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fusedprompt import ops

from . import _work
from ._compiled import COMPILED_ONLY
from ._interleave import BACKWARD, FORWARD, OURS, Case, Contender, check, measure

SDPA, AGAIN, FLEX = "joined keys", "joined keys again", "FlexAttention"
HEADS, WIDTH = 8, 64
SIZES = [(4, 20, 100), (4, 200, 210), (16, 200, 100), (64, 200, 100), (16, 2000, 100)]  # B, N, T
# It has no backward on a CPU (torch 2.13).
REFUSALS = (*COMPILED_ONLY["refusals"], NotImplementedError)
NAMES = ("query", "prefix_key", "prefix_value", "key", "value")


def joined(prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """(B, H, N + T, d) each."""
    pairs = ((prefix_key, key), (prefix_value, value))
    return [torch.cat((one.expand(own.shape[0], -1, -1, -1), own), 2) for one, own in pairs]


def build(rows: int, prefix: int, length: int) -> Case:
    """rows: B. prefix: N. length: T."""
    torch.manual_seed(0)
    row, one = (rows, HEADS, length, WIDTH), (1, HEADS, prefix, WIDTH)
    drawn = [torch.randn(shape) for shape in (row, one, one, row, row)]
    d_out, seen = torch.randn(row), torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)

    def contender(name: str, attend: Callable[..., Tensor], dtype: torch.dtype, **others: Any) -> Contender:
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in drawn]
        return Contender(
            name,
            forward=lambda: attend(*inputs),
            backward=lambda out: out.backward(d_out.to(dtype)),
            outputs=lambda out: {"out": out},
            parameters=dict(zip(NAMES, inputs)),
            **others,
        )

    def sdpa(query: Tensor, *keys: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, *joined(*keys), attn_mask=seen)

    compiled: Any = torch.compile(flex_attention, dynamic=True)

    def flex(query: Tensor, *keys: Tensor) -> Tensor:
        blocks = create_block_mask(
            lambda b, h, q, k: k <= q + prefix, None, None, length, prefix + length, device="cpu"
        )
        out: Tensor = compiled(query, *joined(*keys), block_mask=blocks)
        return out

    return check(
        Case(
            group="prefix attention",
            name=f"B={rows} N={prefix} T={length}",
            dtype="fp32",
            contenders=[
                contender(OURS, ops.prefix_attention, torch.float32),
                contender(SDPA, sdpa, torch.float32),
                contender(FLEX, flex, torch.float32, refusals=REFUSALS),
                contender(AGAIN, sdpa, torch.float32),
            ],
            truth=contender("in fp64", sdpa, torch.float64),
            tolerance=(1e-6, 2e-6),
            work=_work.prefix_attention(rows, HEADS, HEADS, length, prefix, WIDTH, 4),
        )
    )


@pytest.fixture(scope="module", params=SIZES, ids=lambda sizes: "B{}-N{}-T{}".format(*sizes))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield build(*request.param)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_prefix_attention(benchmark: Any, case: Case, mode: str) -> None:
    measure(benchmark, case, mode)
