"""Cross entropy of a head, a part at a time: against fp64, and against logits that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from fusedprompt import ops
from fusedprompt.ops.head_loss import _op, reference
from models import Largest
from tolerance import Tensors, assert_as_accurate, dtypes, evaluate, generator, largest, normal, one_thread

__all__ = ["one_thread"]
SMALL_PARTS = {"one part": (1 << 24, 256), "parts of 4 rows": (1, 4), "one row each": (1, 1)}


@pytest.mark.parametrize("parts", SMALL_PARTS.values(), ids=SMALL_PARTS)
@pytest.mark.parametrize(("rows", "vocabulary", "bias"), [(1, 1, False), (9, 33, True), (13, 40, False)])
@dtypes
def test_loss_and_gradient_are_as_accurate_as_pytorchs(
    parts: tuple[int, int], rows: int, vocabulary: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_op, "_PART_ON_CPU", parts[0])
    monkeypatch.setattr(_op, "_FEWEST_ROWS", parts[1])
    source = generator(rows)
    labels = torch.randint(0, vocabulary, (rows,), generator=source, device="cpu")
    labels[1::3] = -100
    labels[-1] = vocabulary - 1
    weight, shift = normal((vocabulary, 24), dtype, source), normal((vocabulary,), dtype, source) if bias else None
    inputs = {"hidden": normal((rows, 24), dtype, source)}

    def plain(x: Tensors) -> Tensor:
        kind = x["hidden"].dtype
        logits = linear(x["hidden"], weight.to(kind), None if shift is None else shift.to(kind))
        return cross_entropy(logits if kind == torch.float64 else logits.float(), labels, reduction="sum")

    d_out = torch.tensor(0.37)
    found = evaluate(lambda x: ops.head_loss(x["hidden"], weight, labels, bias=shift), inputs, d_out)
    assert_as_accurate(found, plain, plain, inputs, d_out)
    assert not found["d_hidden"][labels == -100].any()


def test_a_label_out_of_the_softmaxs_reach_has_a_finite_loss() -> None:
    """exp(-200) is 0 in fp32; the loss is 200 all the same."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[100.0, 0.0], [-100.0, 1.0]])
    loss = ops.head_loss(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 200.0
    torch.testing.assert_close(hidden.grad, torch.tensor([[200.0, -1.0]]))


@pytest.mark.parametrize("rows", [0, 5])
def test_no_labels_give_no_loss_and_no_gradient(rows: int) -> None:
    hidden = torch.randn(rows, 8, requires_grad=True)
    loss = ops.head_loss(hidden, torch.randn(11, 8), torch.full((rows,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_the_gradient_of_the_gradient_is_refused() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    loss = ops.head_loss(hidden, torch.randn(11, 8), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_rounds_as_it_does_for_the_head(bias: bool) -> None:
    head = nn.Linear(32, 50, bias=bias).requires_grad_(False)
    labels = torch.randint(0, 50, (20,))
    gradients, losses = [], []
    for fused in (True, False):
        hidden = torch.linspace(-2, 2, 640).view(20, 32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                loss = ops.head_loss(hidden, head.weight, labels, bias=head.bias)
            else:
                loss = cross_entropy(head(hidden).float(), labels, reduction="sum")
        losses.append(loss)
        gradients += torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert largest(gradients[0] - gradients[1]) <= 0.01 * largest(gradients[1])


@pytest.mark.parametrize("trains", [True, False])
def test_no_more_logits_exist_at_a_time_than_a_part(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_PART_ON_CPU", 1)
    monkeypatch.setattr(_op, "_FEWEST_ROWS", 8)
    hidden, weight = torch.randn(80, 16, requires_grad=trains), torch.randn(500, 16)
    with Largest() as largest_result:
        loss = ops.head_loss(hidden, weight, torch.zeros(80, dtype=torch.int64))
        if trains:
            loss.backward()
    assert largest_result.elements == 8 * 500


@pytest.mark.parametrize(("rows", "in_forward", "in_backward"), [(64, 1, 1), (256, 1, 1), (257, 4, 0)])
def test_a_forward_pass_of_one_part_makes_no_gradient(rows: int, in_forward: int, in_backward: int) -> None:
    """So it costs what it costs with logits, if no backward pass follows."""
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(70_000, 8)
    with torch.profiler.profile() as forward:
        loss = ops.head_loss(hidden, weight, torch.zeros(rows, dtype=torch.int64))
    with torch.profiler.profile() as backward:
        loss.backward()
    found = [sum(e.count for e in p.key_averages() if e.key == "aten::mm") for p in (forward, backward)]
    assert found == [in_forward, in_backward]


def test_rows_without_labels_do_not_go_through_the_head() -> None:
    hidden, weight, labels = torch.randn(40, 8), torch.randn(500, 8), torch.full((40,), -100)
    labels[7] = 3
    with Largest() as largest_result:
        ops.head_loss(hidden, weight, labels)
    assert largest_result.elements == 500


def test_factors_weigh_each_row() -> None:
    hidden, weight = torch.randn(9, 8, dtype=torch.float64, requires_grad=True), torch.randn(11, 8, dtype=torch.float64)
    labels, factors = torch.arange(9), torch.linspace(0, 2, 9, dtype=torch.float64)
    labels[4] = -100
    results = []
    for loss in (
        ops.head_loss(hidden, weight, labels, factors=factors),
        (cross_entropy(hidden @ weight.T, labels, reduction="none") * factors).sum(),
    ):
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("scaling", [{"soft_cap": 2.0}, {"scale": 0.25}, {"soft_cap": 3.0, "scale": -1.5}], ids=str)
@pytest.mark.parametrize("rows", [9, 600])
@dtypes
def test_soft_caps_and_scales_are_as_accurate_as_pytorchs(
    rows: int, scaling: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_op, "_PART_ON_CPU", 1)
    source = generator(rows)
    labels = torch.randint(0, 33, (rows,), generator=source, device="cpu")
    labels[1::3] = -100
    weight, inputs = normal((33, 24), dtype, source), {"hidden": normal((rows, 24), dtype, source)}

    def plain(x: Tensors) -> Tensor:
        logits = linear(x["hidden"], weight.to(x["hidden"].dtype))
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * scaling.get("scale", 1)
        if cap := scaling.get("soft_cap"):
            logits = torch.tanh(logits / cap) * cap
        return cross_entropy(logits, labels, reduction="sum")

    d_out = torch.tensor(0.37)
    found = evaluate(lambda x: ops.head_loss(x["hidden"], weight, labels, **scaling), inputs, d_out)
    assert_as_accurate(found, plain, plain, inputs, d_out)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden of three dimensions": ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"hidden: expected shape \(R, D\)"),
    "whole numbers": ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "hidden: expected a floating"),
    "another width": ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected shape \(V, D\) = \(5, 4\)"),
    "a trained head": ({"weight": torch.zeros(5, 4, requires_grad=True)}, ValueError, "weight: expected a frozen"),
    "a trained bias": ({"bias": torch.zeros(5, requires_grad=True)}, ValueError, "bias: expected a frozen tensor"),
    "a bias of another size": ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(V,\) = \(5,\)"),
    "too few labels": ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels: expected shape \(R,\)"),
    "narrow labels": ({"labels": torch.zeros(3, dtype=torch.int32)}, TypeError, "labels: expected torch.int64"),
    "whole factors": ({"factors": torch.ones(3, dtype=torch.int64)}, TypeError, "factors: expected a floating"),
    "mixed dtypes": ({"weight": torch.zeros(5, 4).half()}, TypeError, "weight: expected the dtype of hidden"),
    "another device": ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "weight: expected the device of"),
    "a soft cap of nothing": ({"soft_cap": 0.0}, ValueError, "soft_cap: expected a positive number or None, got 0.0"),
    "a soft cap that is none": ({"soft_cap": float("nan")}, ValueError, "soft_cap: expected a positive number"),
    "a scale of nothing": ({"scale": 0}, ValueError, "scale: expected a number other than 0, got 0"),
    "a scale without end": ({"scale": float("inf")}, ValueError, "scale: expected a number other than 0, got inf"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": labels}
    assert ops.head_loss(**arguments).shape == ()
    with pytest.raises(error, match=message):
        ops.head_loss(**{**arguments, **changes})


@pytest.mark.parametrize("rows", [6, 600])
def test_on_other_devices_the_host_waits_for_nothing(rows: int) -> None:
    """On the meta device, which has no values to wait for."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            if func.name() == "fusedprompt::head_loss":
                with self:
                    return reference.IMPLEMENTATION.run(*args)
            return func(*args, **(kwargs or {}))

    hidden = torch.empty(rows, 8, device="meta", requires_grad=True)
    weight, labels = torch.empty(300_000, 8, device="meta"), torch.empty(rows, device="meta", dtype=torch.int64)
    with Names():
        reference.IMPLEMENTATION.head_loss(
            hidden, weight, None, labels, None
        ).backward()  # autocast knows no meta device
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    waits = ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "equal", "unique")
    assert names and not any(name.removeprefix("aten::").split(".")[0] in waits for name in names)
