"""Head and loss on a GPU against fp64, in one part and in several; the host waits for nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fusedprompt import ops
from fusedprompt.ops.head_loss import reference
from tolerance import generator, normal


@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 33), (300, 1000), (700, 2000)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_head_loss_and_its_gradient_match_fp64(
    rows: int,
    vocabulary: int,
    weighted: bool,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_PART", 1)  # parts of 256 rows
    source = generator(rows)
    hidden, weight = normal((rows, 40), dtype, source), normal((vocabulary, 40), dtype, source) / 4
    labels = torch.randint(0, vocabulary, (rows,), generator=source, device="cpu")
    labels[1::3] = -100
    factors = torch.rand(rows, generator=source, device="cpu") if weighted else None
    exact = hidden.double().requires_grad_()
    losses = cross_entropy(exact @ weight.double().T, labels, reduction="none")
    truth = (losses if factors is None else losses * factors).sum()
    (d_truth,) = torch.autograd.grad(truth, exact)
    own, head, targets = hidden.to(device).requires_grad_(), weight.to(device), labels.to(device)
    given = None if factors is None else factors.to(device)
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        loss = ops.head_loss(own, head, targets, factors=given)
        loss.backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)
    assert own.grad is not None
    assert abs(loss.item() - truth.item()) <= tolerance * truth.item()
    found = own.grad.cpu().double()
    assert float((found - d_truth).norm()) <= tolerance * float(d_truth.norm())
    assert not found[labels == -100].any()
