"""These tests run Triton's kernels in its interpreter, on a CPU. Triton decides on that when it is imported, so they
need a process of their own: `tests/test_triton.py` starts it, or `TRITON_INTERPRET=1 pytest tests/triton_interpreter`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from triton_programs import shuffled_and_accounted_for

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small steps: two threads that wait for each other on a shared machine take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def any_order_and_each_element_once() -> Iterator[None]:
    """See tests/triton_programs.py."""
    with shuffled_and_accounted_for():
        yield
