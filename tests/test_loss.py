"""The sum of cross entropies that the shared route trains on, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fusedprompt.routes.cross_entropy import summed_cross_entropy
from tolerance import Tensors, assert_as_accurate, dtypes, evaluate, generator, normal


@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(1, 1), (7, 33), (70, 8191), (3, 600_000)],
    ids=["1x1", "7x33", "two chunks", "row > chunk"],
)
@dtypes
def test_loss_and_gradient_are_as_accurate_as_pytorchs(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    source = generator(0)
    labels = torch.randint(0, vocabulary, (rows,), generator=source, device="cpu")
    labels[::3] = -100
    labels[-1] = vocabulary - 1
    inputs = {"logits": normal((rows, vocabulary), dtype, source) * 4}

    def plain(x: Tensors) -> torch.Tensor:
        logits = x["logits"] if x["logits"].dtype == torch.float64 else x["logits"].float()
        return cross_entropy(logits, labels, reduction="sum")

    d_out = torch.tensor(0.37)
    found = evaluate(lambda x: summed_cross_entropy(x["logits"], labels), inputs, d_out)
    assert_as_accurate(found, plain, plain, inputs, d_out, neighbours=3 if rows * vocabulary < 1e6 else 1)
    assert found["d_logits"][labels == -100].abs().max() == 0 if rows > 1 else True


def test_no_label_gives_no_loss_and_no_gradient() -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_no_rows_give_no_loss() -> None:
    assert summed_cross_entropy(torch.randn(0, 11), torch.zeros(0, dtype=torch.int64)).item() == 0


def test_nothing_of_the_logits_size_is_kept_for_the_backward() -> None:
    logits, labels = torch.randn(50, 1000, requires_grad=True), torch.randint(0, 1000, (50,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed_cross_entropy(logits, labels)
    others = [tensor.numel() for tensor in kept if tensor.data_ptr() != logits.data_ptr()]
    assert len(kept) == 3 and max(others) <= 50


def test_a_large_gradient_is_pytorchs() -> None:
    logits = torch.randn(260, 33_000, requires_grad=True)
    labels = torch.randint(0, 33_000, (260,))
    gradients = []
    for loss in (summed_cross_entropy(logits, labels), cross_entropy(logits, labels, reduction="sum")):
        gradients += torch.autograd.grad(loss, logits)
    assert gradients[0].nbytes > 1 << 25
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
