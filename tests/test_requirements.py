"""Why Triton kernels cannot run somewhere, told without a GPU."""

from __future__ import annotations

import pytest
import torch

from fusedprompt.ops import _requirements

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((8, 0), None, None),
        ((10, 0), None, None),
        ((7, 5), None, "needs a GPU of compute capability 8.0 or later, got 7.5"),
        ((9, 4), "6.4", "needs an NVIDIA GPU, got an AMD one"),
    ],
)
def test_a_gpu_is_refused_with_its_reason_also_within_one_compiled_graph(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert _requirements._why_not_gpu(0) == reason

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _requirements._why_not_gpu(0) is None else x

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), X + 1 if reason is None else X)


def test_a_machine_without_triton_or_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_requirements, "_TRITON_ON_CPU", False)
    monkeypatch.setattr(_requirements, "_HAS_TRITON", True)
    assert _requirements.why_not_triton(X) == "needs a CUDA tensor, got cpu"
    monkeypatch.setattr(_requirements, "_HAS_TRITON", False)
    assert _requirements.why_not_triton(X) == "needs Triton, which is not installed"


def test_a_dtype_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_requirements, "_TRITON_ON_CPU", True)
    monkeypatch.setattr(_requirements, "_HAS_TRITON", True)
    assert _requirements.why_not_triton(X) is None
    assert _requirements.why_not_triton(X, X.double()) == "needs float32, bfloat16 or float16, got torch.float64"
    assert _requirements.why_not_triton(X.to("meta")) == "needs a CPU tensor under TRITON_INTERPRET=1, got meta"
