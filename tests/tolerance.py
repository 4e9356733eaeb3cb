"""How far from the truth a result may be, measured rather than chosen.

The allowance is twice the error that the plain PyTorch computation makes in the same dtype against the same fp64
oracle, plus one unit in the last place of the largest true value. One computation can be right by luck, above all in a
small tensor, so its error is the largest over the problem and some neighbours: the same inputs moved by a unit in the
last place here and there. Everything runs on poisoned memory: an element that nobody wrote is NaN, and NaN is never
close.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from fusedprompt import ops

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensor]

LOW = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype).removeprefix("torch."))


def examples(number: int) -> settings:
    """Hypothesis settings: the same examples in every run, and no stopwatch on a shared machine."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


def sample(op: str) -> tuple[Any, ...]:
    """The smallest arguments of a backend of an op, on the CPU."""
    x = torch.zeros(2, 3)
    if op == "mlp":
        return x, [torch.zeros(4, 3)], [torch.zeros(4)], []
    if op == "lstm":
        return x.unsqueeze(0), [torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4)], [], False
    if op == "splice":
        return x, None, torch.zeros(1, 1, dtype=torch.int64), x, None, [], []
    if op == "prefix_attention":
        heads = torch.zeros(1, 1, 2, 3)
        return heads, heads, heads, heads, heads, None, None, None, 1.0, 0, 0.0
    if op == "head_loss":
        return x, x, None, torch.zeros(2, dtype=torch.int64), None
    return x, x, torch.zeros(2), torch.zeros(2, dtype=torch.bool)


def each_backend(op: str) -> pytest.MarkDecorator:
    """Run a test with every backend of an op that takes CPU tensors here; see also `require`."""
    names = [name for name, reason in ops.explain(op, *sample(op)).items() if reason == "runs"]
    return pytest.mark.parametrize("backend", names)


def require(op: str, backend: str, *args: object) -> None:
    """Skip, with its own reason, a backend that cannot run on these arguments."""
    reason = "runs" if backend == "auto" else ops.explain(op, *args)[backend]
    if reason != "runs":
        pytest.skip(f"backend '{backend}' of '{op}' {reason}")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small steps on one thread: two threads that wait for each other on a shared machine take ten times as long.

    A test module imports this fixture to use it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@contextlib.contextmanager
def bytes_hold(byte: int | None, device: str) -> Iterator[None]:
    """Inside, bytes that C++ asks for come full of `byte`, or of random ones if None; poisoned memory is full of 0xFF.

    That is how ops get a workspace. One that means something by 0xFF, as the LSTM on CUDA does, must write it itself.
    device: "CPU" or "CUDA".
    """

    def new_empty(like: Tensor, size: list[int], **options: Any) -> Tensor:
        given = {name: value for name, value in options.items() if value is not None}
        out = torch.empty(size, **{"dtype": like.dtype, "device": like.device, **given})
        if out.dtype == torch.uint8:
            out.random_(0, 256) if byte is None else out.fill_(byte)
        return out

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that a kernel is replaced
        library.impl("new_empty", new_empty, device)
    try:
        yield
    finally:
        library._destroy()


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def normal(shape: tuple[int, ...], dtype: torch.dtype, source: torch.Generator, layout: str = "contiguous") -> Tensor:
    """N(0, 1) values: `contiguous`, `transposed` (dimensions reversed in memory) or `strided` (with gaps of NaN)."""
    values = torch.randn(shape, generator=source, device="cpu").to(dtype)
    if layout == "transposed":
        return values.permute(*range(values.dim() - 1, -1, -1)).contiguous().permute(*range(values.dim() - 1, -1, -1))
    if layout == "strided":
        wide = torch.full((*shape[:-1], 2 * shape[-1]), math.nan, dtype=dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values


def evaluate(function: Function, inputs: Tensors, d_out: Tensor) -> Tensors:
    """The output of `function` and, where it has any, its gradient with respect to every input, on poisoned memory."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with poisoned_memory():
        out = function(leaves)
        if not out.requires_grad:
            return {"output": out}
        gradients = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
    return {"output": out.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}}


def evaluate_oracle(function: Function, inputs: Tensors, d_out: Tensor) -> Tensors:
    """`evaluate` on the same (already rounded) values in fp64."""
    return evaluate(function, {name: value.double() for name, value in inputs.items()}, d_out.double())


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of a dtype at a magnitude."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.tiny * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def neighbour(inputs: Tensors, precision: torch.dtype | None, source: torch.Generator) -> Tensors:
    """The same problem with about two thirds of the values moved up or down by a unit in the last place."""
    moved = {}
    for name, value in inputs.items():
        step = (
            torch.randint(-1, 2, value.shape, generator=source, device="cpu")
            * torch.finfo(precision or value.dtype).eps
        )
        moved[name] = (value.double() * (1 + step.double())).to(precision or value.dtype).to(value.dtype)
    return moved


def assert_as_accurate(
    actual: Tensors,
    plain: Function,
    exact: Function,
    inputs: Tensors,
    d_out: Tensor,
    *,
    precision: torch.dtype | None = None,
    neighbours: int = 7,
    ulps: int = 1,
) -> None:
    """`actual` is as close to `exact` as `plain` is, tensor by tensor, and some units in the last place.

    precision: the dtype of the plain computation, where it is not that of `actual` (fp64 judged by fp32) or of the
        inputs (autocast).
    """
    truth, source = evaluate_oracle(exact, inputs, d_out), generator(1)
    assert actual.keys() == truth.keys()
    errors = dict.fromkeys(truth, 0.0)
    for index in range(1 + neighbours):
        problem = neighbour(inputs, precision, source) if index else inputs
        true = evaluate_oracle(exact, problem, d_out) if index else truth
        for name, value in evaluate(plain, problem, d_out).items():
            errors[name] = max(errors[name], largest(value.double() - true[name]))
            assert precision or value.dtype == actual[name].dtype, f"{name}: {actual[name].dtype}, not {value.dtype}"
    for name, true_value in truth.items():
        value = actual[name]
        assert value.shape == true_value.shape, f"{name}: {tuple(value.shape)}, not {tuple(true_value.shape)}"
        allowed = 2 * errors[name] + ulps * ulp(largest(true_value), precision or value.dtype)
        error = largest(value.double() - true_value)
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def assert_same_dtypes(actual: Tensors, expected: Tensors) -> None:
    assert {name: value.dtype for name, value in actual.items()} == {
        name: value.dtype for name, value in expected.items()
    }


def assert_identical(actual: Tensors, expected: Tensors) -> None:
    """Equal bit by bit, tensor by tensor."""
    assert_same_dtypes(actual, expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name}: differs by up to {largest(actual[name] - value):.3g}"
