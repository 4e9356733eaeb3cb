"""What a backend needs from the machine and from its arguments, asked without importing what may not be there."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # an import hook that refuses it
        return False


_HAS_TRITON = _is_installed("triton")
_TRITON_ON_CPU = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's interpreter, as in `_triton.INTERPRETED`
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, got an AMD one"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"needs a GPU of compute capability 8.0 or later, got {major}.{minor}"


# torch.compile takes its answer for a constant. `torch.compiler.assume_constant_result` does this too, but only after
# importing the compiler, and with it Triton.
_why_not_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def multiplies_exactly() -> bool:
    """Whether products of fp32 numbers are IEEE's on a GPU, and not TF32's."""
    # torch.get_float32_matmul_precision() raises once anyone, such as transformers' Trainer, used the newer setting.
    return str(torch.backends.cuda.matmul.fp32_precision) != "tf32"


multiplies_exactly._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_triton(*tensors: Tensor) -> str | None:
    """None, or one clause that says why Triton kernels cannot run on these floating-point tensors of one device."""
    if not _HAS_TRITON:
        return "needs Triton, which is not installed"
    device = tensors[0].device
    if _TRITON_ON_CPU:
        if device.type != "cpu":
            return f"needs a CPU tensor under TRITON_INTERPRET=1, got {device.type}"
    elif device.type != "cuda":
        return f"needs a CUDA tensor, got {device.type}"
    else:
        reason = _why_not_gpu(device.index)
        if reason is not None:
            return reason
    for tensor in tensors:
        if tensor.dtype not in _TRITON_DTYPES:
            return f"needs float32, bfloat16 or float16, got {tensor.dtype}"
    return None
