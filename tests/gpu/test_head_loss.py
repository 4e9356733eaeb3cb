"""Head and loss on a GPU against fp64, in one part and in several; the host waits for nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fusedprompt import ops
from fusedprompt.ops.head_loss import _op
from tolerance import generator, normal


@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 33), (40, 1040)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scaling", [{}, {"soft_cap": 3.0, "scale": 0.5}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_head_loss_and_its_gradient_match_fp64(
    rows: int,
    vocabulary: int,
    weighted: bool,
    scaling: dict[str, float],
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("_PART", 1), ("_PART_ON_CPU", 1), ("_FEWEST_ROWS", 16)):
        monkeypatch.setattr(_op, name, value)
    source = generator(rows)
    hidden, weight = normal((rows, 40), dtype, source), normal((vocabulary, 40), dtype, source) / 4
    labels = torch.randint(0, vocabulary, (rows,), generator=source, device="cpu")
    labels[1::3] = -100
    factors = torch.rand(rows, generator=source, device="cpu") if weighted else None
    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().T * scaling.get("scale", 1.0)
    if scaling:
        logits = torch.tanh(logits / scaling["soft_cap"]) * scaling["soft_cap"]
    losses = cross_entropy(logits, labels, reduction="none")
    truth = (losses if factors is None else losses * factors).sum()
    (d_truth,) = torch.autograd.grad(truth, exact)
    own, head, targets = hidden.to(device).requires_grad_(), weight.to(device), labels.to(device)
    given = None if factors is None else factors.to(device)
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        loss = ops.head_loss(own, head, targets, factors=given, **scaling, backend=backend)
        loss.backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)
    assert own.grad is not None
    assert abs(loss.item() - truth.item()) <= tolerance * truth.item()
    found = own.grad.cpu().double()
    assert float((found - d_truth).norm()) <= tolerance * float(d_truth.norm())
    assert not found[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_wide_rows_match_fp64(vocabulary: int, dtype: torch.dtype, cuda: torch.device) -> None:
    source = generator(vocabulary)
    hidden = normal((300, 64), dtype, source).to(cuda).requires_grad_()
    weight = normal((vocabulary, 64), dtype, source).to(cuda)
    labels = torch.randint(0, vocabulary, (300,), generator=source, device="cpu").to(cuda)
    labels[::5] = -100
    loss = ops.head_loss(hidden, weight, labels, backend="triton")
    (found,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    truth = cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    (d_truth,) = torch.autograd.grad(truth, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert abs(loss.item() - truth.item()) <= tolerance * truth.item()
    assert float((found - d_truth).norm()) <= tolerance * float(d_truth.norm())
