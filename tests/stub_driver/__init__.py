"""Triton's real launcher over a CUDA driver that carries nothing out: what reaches it, on a machine without a GPU.

`install()` builds libcuda.c, gives it to Triton as its driver, and lets CPU tensors pass for CUDA's. It changes the
process for good, so it is for processes of their own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_MOST_PARAMETERS = 64


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("dependent", ctypes.c_uint),
        ("count", ctypes.c_uint),
        ("parameters", ctypes.c_ulonglong * _MOST_PARAMETERS),
    )


class DriverLaunch(NamedTuple):
    """What the driver was asked to launch. dependent: it may start while the kernel before it ends."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    dependent: bool
    parameters: tuple[int, ...]


class StubDriver:
    """The library, and what it has seen."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

    @property
    def num_launches(self) -> int:
        """Kernels launched so far."""
        return ctypes.c_uint.in_dll(self._library, "stub_launches").value

    def expect(self, sizes: list[int]) -> None:
        """Read parameters of these sizes, in bytes, from the launches that follow."""
        (ctypes.c_uint * _MOST_PARAMETERS).in_dll(self._library, "stub_sizes")[: len(sizes)] = sizes
        ctypes.c_uint.in_dll(self._library, "stub_size_count").value = len(sizes)

    @property
    def latest(self) -> DriverLaunch:
        """The latest launch."""
        launch = _Launch.in_dll(self._library, "stub_launch")
        parameters = tuple(launch.parameters[: launch.count])
        return DriverLaunch(tuple(launch.grid), tuple(launch.block), launch.shared, bool(launch.dependent), parameters)


def install(capability: tuple[int, int] = (9, 0)) -> StubDriver:
    """Make every Triton kernel of this process launch on the stub, compiled for `capability`."""
    import torch
    import triton

    folder = Path(tempfile.mkdtemp(prefix="stub_driver_"))
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("libcuda.c")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = StubDriver(library)

    patched: Any = torch.cuda
    patched.current_device = lambda: 0
    patched.get_device_capability = lambda device=None: capability
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_stream = lambda device: 0
    triton.runtime.driver.set_active(driver)

    from fusedprompt.ops import _triton

    _triton._current_device = lambda: None  # the index of a CPU tensor's device
    return stub
