"""How far from the truth a result may be, measured rather than chosen.

The allowance is twice the error that the plain PyTorch computation makes in the same dtype against the same fp64 oracle,
plus one unit in the last place of the largest true value. Everything runs on poisoned memory: an element that nobody
wrote is NaN, and NaN is never close.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from fusedprompt import ops

Tensors = dict[str, Tensor]

LOW = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype).removeprefix("torch."))


def examples(number: int) -> settings:
    """Hypothesis settings: the same examples in every run, and no stopwatch on a shared machine."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


def each_backend(op: str) -> pytest.MarkDecorator:
    """Run a test with every backend of an op; see `require`."""
    return pytest.mark.parametrize("backend", [backend.name for backend in ops.OPS[op].backends])


def require(op: str, backend: str, *args: object) -> None:
    """Skip, with its own reason, a backend that cannot run on these arguments here."""
    if backend == "auto":
        return
    reason = ops.explain(op, *args)[backend]
    if reason != "runs":
        pytest.skip(f"backend '{backend}' of '{op}' {reason}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN (and integers with their largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], dtype: torch.dtype, source: torch.Generator, layout: str = "contiguous") -> Tensor:
    """N(0, 1) values of a dtype, `contiguous`, `transposed` (dimensions reversed in memory) or `strided` (with gaps)."""
    values = torch.randn(shape, generator=source).to(dtype)
    if layout == "transposed":
        return values.permute(*range(values.dim() - 1, -1, -1)).contiguous().permute(*range(values.dim() - 1, -1, -1))
    if layout == "strided":
        wide = torch.full((*shape[:-1], 2 * shape[-1]), math.nan, dtype=dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values


def evaluate(function: Callable[[Tensors], Tensor], inputs: Tensors, d_out: Tensor) -> Tensors:
    """The output of `function` and its gradient with respect to every input, on poisoned memory."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with poisoned_memory():
        out = function(leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
    return {"output": out.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}


def evaluate_oracle(function: Callable[[Tensors], Tensor], inputs: Tensors, d_out: Tensor) -> Tensors:
    """`evaluate` on the same (already rounded) values in fp64."""
    return evaluate(function, {name: value.double() for name, value in inputs.items()}, d_out.double())


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of a dtype at a magnitude."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.tiny * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def assert_as_accurate(actual: Tensors, baseline: Tensors, truth: Tensors) -> None:
    """`actual` is as close to `truth` as `baseline` is, tensor by tensor, in baseline's dtypes."""
    assert actual.keys() == truth.keys() == baseline.keys()
    for name, true in truth.items():
        value, plain = actual[name], baseline[name]
        assert value.dtype == plain.dtype, f"{name}: {value.dtype}, not {plain.dtype}"
        assert value.shape == true.shape, f"{name}: {tuple(value.shape)}, not {tuple(true.shape)}"
        allowed = 2 * largest(plain.double() - true) + ulp(largest(true), value.dtype)
        error = largest(value.double() - true)
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def assert_identical(actual: Tensors, expected: Tensors) -> None:
    """Equal bit by bit, tensor by tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, f"{name}: {actual[name].dtype}, not {value.dtype}"
        assert torch.equal(actual[name], value), f"{name}: differs by up to {largest(actual[name] - value):.3g}"
