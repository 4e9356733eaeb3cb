"""What `ops._triton.Launch` hands to the CUDA driver, compared with what Triton's own dispatch hands to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import stub_driver

STUB = stub_driver.install()

from triton.runtime.jit import JITFunction  # noqa: E402

from fusedprompt.ops import _triton  # noqa: E402
from fusedprompt.ops.cpt import triton as cpt  # noqa: E402
from fusedprompt.ops.head_loss import triton as head_loss  # noqa: E402
from fusedprompt.ops.mlp import triton as mlp  # noqa: E402
from fusedprompt.ops.prefix_attention import triton as prefix_attention  # noqa: E402
from fusedprompt.ops.splice import triton as splice  # noqa: E402

SIZES = {"i32": 4, "i64": 8}


def training_step(
    dtype: torch.dtype = torch.float32, width: int = 48, batch: int = 2, length: int = 5, slots: Tensor | None = None
) -> None:
    """P-tuning's MLP of three layers, the splice, the head with its loss, and back. The stub computes nothing: all
    values are garbage."""
    rows = 4
    x = torch.zeros(rows, width, dtype=dtype, requires_grad=True)
    weights = [torch.zeros(width, width, dtype=dtype, requires_grad=True) for _ in range(3)]
    biases = [torch.zeros(width, dtype=dtype, requires_grad=True) for _ in range(3)]
    ids = torch.zeros(batch, length, dtype=torch.int64)
    table = torch.zeros(10, width, dtype=dtype)
    prompt = mlp.mlp(x, weights, biases, [])
    embeds, _ = splice.splice(prompt, slots, ids, table, None, [ids, ids], [1, -100])
    head_loss.IMPLEMENTATION.head_loss(embeds.flatten(0, 1)[:4], table, None, ids.new_zeros(4), None).backward()


def projection_step(width: int = 48, rows: int = 4) -> None:
    """Keys and values of all layers, from a prefix's projection, and back."""
    sizes = (width, width, 16385 + width % 2)
    x = torch.zeros(rows, width, requires_grad=True)
    weights = [torch.zeros(out, into, requires_grad=True) for into, out in itertools.pairwise(sizes)]
    biases = [torch.zeros(out, requires_grad=True) for out in sizes[1:]]
    mlp.mlp(x, weights, biases, [], "tanh").sum().backward()


def context_step(dtype: torch.dtype = torch.float32, width: int = 48, rows: int = 4) -> None:
    """CPT's context, and back."""
    embedding, delta = (torch.zeros(rows, width, dtype=dtype) for _ in range(2))
    limits = (torch.zeros(rows), torch.ones(rows, dtype=torch.bool))
    cpt.cpt(embedding, delta.requires_grad_(), *limits)[0].sum().backward()


def attention_step(
    dtype: torch.dtype = torch.float32, batch: int = 2, length: int = 20, prefix: int = 5, mixed: bool = False
) -> None:
    """Two heads of queries to one of keys, and back."""
    query, own = (2, length, 48), (1, length, 48)
    shapes = ((batch, *query), *[(1 + mixed, 1, prefix, 48)] * 2, *[(batch, *own)] * 2)
    tensors = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    index = torch.zeros(batch, dtype=torch.int64) if mixed else None
    mask = torch.ones(batch, length, dtype=torch.bool)
    prefix_attention.prefix_attention(*tensors, index, None, mask, 0.3, 0, 0.0).sum().backward()


@pytest.fixture
def without_dispatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Triton's dispatch was called")

    monkeypatch.setattr(JITFunction, "run", refuse)
    yield


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every launch is made three times: by Triton's dispatch, by ours for the first time, and by ours again."""
    names = []
    launch = _triton.Launch.__call__

    def compare(self: Any, grid: Any, tensors: Any, integers: Any) -> None:
        STUB.expect([])
        compiled = self.kernel[grid](*tensors, *integers, **self.constants, **self._options)
        kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        # Pointers to scratch memory follow the kernel's own arguments.
        STUB.expect([SIZES.get(kind, 8) for kind in kinds])
        seen = []
        for call in (self.kernel[grid], None, None):
            if call is None:
                launch(self, grid, tensors, integers)
            else:
                call(*tensors, *integers, **self.constants, **self._options)
            seen.append(STUB.latest)
        assert seen[0] == seen[1] == seen[2]
        given = [value.data_ptr() for value in tensors] + [value % 2**64 for value in integers]
        assert seen[0].grid == grid and seen[0].dependent
        assert len(seen[0].parameters) == len(kinds) > 0
        for value, kind in zip(seen[0].parameters, kinds):
            assert value in given or (kind == "i32" and value - 2**32 + 2**64 in given)
        names.append(self.name)

    monkeypatch.setattr(_triton.Launch, "__call__", compare)
    yield names
    STUB.expect([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 33])
def test_driver_gets_what_triton_dispatch_gives_it(compared: list[str], dtype: torch.dtype, width: int) -> None:
    slots = torch.tensor([[0, -1, 1, 2, -2, 3, 4, -3, -4], [-1, -2, -3, -4, 0, 1, 2, 3, 4]])
    for layout in (None, slots):
        training_step(dtype, width, slots=layout)
    projection_step(width)
    context_step(dtype, width)
    attention_step(dtype, mixed=width == 33)
    attention_step(dtype, length=1)
    assert set(compared) == {
        "linear_forward",
        "linear_backward",
        "sum_of_parts",
        "splice_forward",
        "splice_prefix_backward",
        "segment_sum",
        "loss_in_place",
        "cpt_forward",
        "cpt_backward",
        "attention_forward",
        "attention_d_query",
        "attention_d_keys",
    }


def test_steady_state_never_enters_triton_dispatch_whatever_batch_and_length(request: pytest.FixtureRequest) -> None:
    for batch, length in itertools.product((1, 2), (1, 16)):
        training_step(batch=batch, length=length)
    request.getfixturevalue("without_dispatch")
    for batch, length in itertools.product((2, 3, 16), (2, 7, 16, 100)):
        training_step(batch=batch, length=length)


def test_tensors_that_are_not_16_byte_aligned_get_code_of_their_own() -> None:
    weights, biases = [torch.zeros(48, 48)], [torch.zeros(48)]
    memory = torch.zeros(4 * 48 + 1)
    launched = []
    for x in (memory[:-1], memory[1:]):
        mlp.mlp(x.view(4, 48), weights, biases, [])
        mlp.mlp(x.view(4, 48), weights, biases, [])
        sizes, dtypes = (4, 48, 48), (torch.float32,) * 3
        _, launch = mlp._forward_launch(sizes, dtypes, torch.float32, "ieee", "", False, True)
        launched.append(dict(launch._compiled))
    (aligned,) = launched[0].values()
    _, unaligned = launched[1].values()
    assert aligned.asm["ptx"] != unaligned.asm["ptx"]


def test_training_step_launches_five_kernels_forward_and_four_backward(request: pytest.FixtureRequest) -> None:
    training_step()
    request.getfixturevalue("without_dispatch")
    before = STUB.num_launches
    training_step()
    assert STUB.num_launches - before == 3 + 1 + 1 + 1 + 3


def test_projection_launches_two_kernels_forward_and_three_backward(request: pytest.FixtureRequest) -> None:
    projection_step()
    request.getfixturevalue("without_dispatch")
    before = STUB.num_launches
    projection_step()
    assert STUB.num_launches - before == 2 + 3


def test_context_launches_one_kernel_forward_and_one_backward(request: pytest.FixtureRequest) -> None:
    context_step(rows=4)
    request.getfixturevalue("without_dispatch")
    before = STUB.num_launches
    context_step(rows=16)
    assert STUB.num_launches - before == 1 + 1


def test_attention_compiles_nothing_for_another_batch_text_or_prefix(request: pytest.FixtureRequest) -> None:
    """One kernel forward and three backward; two forward where rows have few queries."""
    attention_step()
    attention_step(length=1)
    request.getfixturevalue("without_dispatch")
    for batch, length, prefix in ((3, 33, 16), (16, 256, 1), (1, 17, 64)):
        before = STUB.num_launches
        attention_step(batch=batch, length=length, prefix=prefix)
        assert STUB.num_launches - before == 1 + 3
    before = STUB.num_launches
    attention_step(length=1, batch=5)
    assert STUB.num_launches - before == 2 + 3
