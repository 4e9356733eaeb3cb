"""Tests of what runs on a GPU: `make gpu-test`. Under TRITON_INTERPRET=1 they run on the CPU too, so that they are
known to work before there is a GPU; those of CUDA itself (streams, graphs, synchronisation) are left out there.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]


lost: list[str] = []  # the test after which no other can pass in this process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """A kernel that trapped or read a bad address makes every later call of CUDA in its process fail."""
    report = yield
    if report.failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            lost.append(report.nodeid)
    return report


@pytest.hookimpl(trylast=True)  # after pytest-xdist has sent the report
def pytest_runtest_logfinish() -> None:
    if lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # pytest-xdist begins another worker


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if lost:
        pytest.skip(f"the device is lost since {lost[0]}")


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
