"""`python -m fusedprompt doctor`: what is installed, which backend each op uses and why, and whether each op is right.

Only the standard library is imported at the top, and every probe is guarded: the doctor must be able to report on an
installation that is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from .._version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
# Settings that change what runs; beside all of our own.
_SETTINGS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET")
_SECTIONS = ("versions", "system", "devices", "environment", "native code", "backends", "checks")


def main(arguments: list[str]) -> int:
    """Print the report; returns 1 if an op's self-check failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fusedprompt doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0 if report["healthy"] else 1


def examine() -> dict[str, Any]:
    """The whole report: strings, numbers, lists and dictionaries only; it names no user and no host."""
    report: dict[str, Any] = {
        "versions": {
            "fusedprompt": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "system": _guarded(_system),
        "devices": _guarded(_devices),
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith("FUSEDPROMPT_") or key in _SETTINGS
        },
        "native code": _guarded(_native_code),
        "backends": _guarded(_backends),
        "checks": _guarded(_checks),
    }
    report["healthy"] = all(result == "ok" for result in report["checks"].values())
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report for people; an issue takes it as it is."""
    lines = []
    for title in _SECTIONS:
        section = report[title] or {"none": ""}
        width = max(map(len, section))
        lines.append(f"{title}:")
        for key, value in section.items():
            shown = "; ".join(f"{name}: {why}" for name, why in value.items()) if isinstance(value, dict) else value
            lines.append(f"  {key:<{width}}  {shown}".rstrip())
    lines.append("healthy" if report["healthy"] else "NOT HEALTHY: see the checks")
    return "\n".join(lines)


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception:  # the report must be finished whatever is broken
        return {"error": traceback.format_exc().strip().splitlines()[-1]}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _system() -> dict[str, Any]:
    import torch

    return {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda of torch": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "cuda driver": _driver(),
    }


def _driver() -> str:
    """The version of NVIDIA's driver, from the kernel: nothing has to be started for it."""
    version = Path("/sys/module/nvidia/version")
    return version.read_text().strip() if version.exists() else "none"


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"cpu": f"{platform.machine()}, {os.cpu_count()} processors"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _native_code() -> dict[str, Any]:
    from ..ops import _native

    return _native.build_info()


def _backends() -> dict[str, Any]:
    from .. import ops
    from . import op_checks

    return {
        f"{op} on {device}": ops.explain(op, *arguments)
        for device in op_checks.devices()
        for op, (_, *arguments) in op_checks.samples(device).items()
        if op in ops.OPS  # the first sample of each
    }


def _checks() -> dict[str, Any]:
    from . import op_checks

    return op_checks.check_all()
