"""The compiled libraries: `fusedprompt._C` for CPU, `fusedprompt._cuda` for CUDA. Both may be missing.

Loaded when this module is imported, which registers their kernels; so whatever calls the ops by name finds them, and
torch.compile traces over plain constants.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch


def _load_module() -> tuple[ModuleType | None, str | None]:
    """`fusedprompt._C`, or one clause that says why it is not there."""
    try:
        return importlib.import_module("fusedprompt._C"), None
    except ModuleNotFoundError:
        return None, "needs the compiled extension, which this installation lacks (README.md, Installing)"
    except ImportError as error:  # a torch older than its ABI, say
        return None, f"needs the compiled extension, which does not load: {error}"


def _why_not_cuda() -> str | None:
    """Load the CUDA library; None, or one clause that says why not."""
    if MODULE is None:
        return WHY_NOT_CPU
    if torch.version.cuda is None:
        return "needs a torch that is built with CUDA"
    spec = importlib.util.find_spec("fusedprompt._cuda")
    if spec is None or spec.origin is None:
        return f"needs the CUDA library: {MODULE.build_info()['cuda']}"
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"needs the CUDA library, which does not load: {error}"
    return None


MODULE, WHY_NOT_CPU = _load_module()
WHY_NOT_CUDA = _why_not_cuda()


def build_info() -> dict[str, Any]:
    """What was compiled and how, and what of it runs here; for `python -m fusedprompt doctor`."""
    if MODULE is None:
        return {"extension": WHY_NOT_CPU}
    return {
        **MODULE.build_info(),
        "cpu kernels": f"{MODULE.cpu_level()} of {', '.join(MODULE.cpu_levels())}",
        "cuda kernels": WHY_NOT_CUDA or "loaded",
    }
