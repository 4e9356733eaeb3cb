"""Tests of what runs on a GPU: `make gpu-test`. Under TRITON_INTERPRET=1 they run on the CPU too, so that they are
known to work before there is a GPU; those of CUDA itself (streams, graphs, synchronisation) are left out there.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for a test that only CUDA can pass."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device
