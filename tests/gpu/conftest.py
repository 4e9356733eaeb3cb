"""Tests of what runs on a GPU: `make gpu-test`. Under TRITON_INTERPRET=1 they run on the CPU too, so that they are
known to work before there is a GPU; those of CUDA itself (streams, graphs, synchronisation) are left out there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def ieee_products() -> Iterator[None]:
    """cuDNN takes TF32 unasked, which would measure an error a thousand times as large."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for a test that only CUDA can pass."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device
