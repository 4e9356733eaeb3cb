"""The compiled libraries: `fusedprompt._C` for CPU, `fusedprompt._cuda` for CUDA. Both may be missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

PLAIN_INSTALL = "needs the compiled extension, which this installation lacks (see README.md, Installing)"


@functools.cache
def module() -> ModuleType | str:
    """`fusedprompt._C`, whose loading registers the CPU kernels, or one clause that says why it is not there."""
    if importlib.util.find_spec("fusedprompt._C") is None:
        return PLAIN_INSTALL
    try:
        return importlib.import_module("fusedprompt._C")
    except ImportError as error:  # a torch older than the ABI, or another Python's file
        return f"needs the compiled extension, which does not load: {error}"


@functools.cache
def cuda_library() -> str | None:
    """Load `fusedprompt._cuda`, which registers the CUDA kernels; None, or one clause that says why that failed."""
    loaded = module()
    if isinstance(loaded, str):
        return loaded
    spec = importlib.util.find_spec("fusedprompt._cuda")
    if spec is None or spec.origin is None:
        return f"needs the CUDA library: {loaded.build_info()['cuda']}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"needs the CUDA library, which does not load: {error}"
    return None
