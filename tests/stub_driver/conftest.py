"""These tests change their process for good (see the package): `tests/test_triton.py` starts one for them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("FUSEDPROMPT_STUB_DRIVER") == "1" else ["test_*.py"]
