"""Settings for every test: no network, fixed seeds, quiet libraries."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # processes share the cores; so do their children
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A default device or dtype that a test leaves changes what tests after it see, in one order of files only."""
    yield
    left = len(torch.overrides._get_current_function_mode_stack()), torch.get_default_dtype()
    assert left == (0, torch.float32), f"left behind: modes and default dtype {left}"


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
