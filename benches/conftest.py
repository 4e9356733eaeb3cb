"""What a run of the benchmarks writes down about the machine and the software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from . import _rows
from ._limits import limits

SCHEMA = 2  # 2 added schema, limits, bytes, flops, floor_ms, share and peak_mb to 1, and took nothing away
PACKAGES = ("torch", "transformers", "peft", "fusedprompt", "pytest-benchmark")


def _version(package: str) -> str:
    if package == "fusedprompt":  # a checkout is measured as it is, installed or not
        import fusedprompt

        return fusedprompt.__version__
    return importlib.metadata.version(package)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def pytest_addoption(parser: Any) -> None:
    """--device cuda runs the same benchmarks on a GPU."""
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where all tensors are")
    parser.addoption("--rows", type=Path, help="add each row to this file (.jsonl) as soon as it is measured")


def pytest_configure(config: Any) -> None:
    """Make the result's folder now: minutes later is too late to find that there is none."""
    torch.set_default_device(config.getoption("--device"))
    # "fp32" means IEEE, for contenders and truths alike: cuDNN takes TF32 unless it is told not to.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    result = config.getoption("benchmark_json", None)
    if result is not None:
        result.parent.mkdir(parents=True, exist_ok=True)


def _gpu() -> dict[str, Any]:
    """What figures on a GPU depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Replace pytest-benchmark's description, which has the host's name in it, by what the figures depend on."""
    machine_info.clear()
    if torch.get_default_device().type == "cuda":
        machine_info.update(_gpu())
    machine_info.update(
        cpu=_cpu_model(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={package: _version(package) for package in PACKAGES},
        limits=limits(),
    )


_BEGUN = pytest.StashKey[bool]()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """With --rows, a row is in its file before the next is measured; benches.report reads it as it does a result."""
    path, benchmark = item.config.getoption("--rows"), getattr(item, "funcargs", {}).get("benchmark")
    row = getattr(benchmark, "extra_info", {})
    if path is None or "contenders" not in row:
        return
    if _BEGUN not in item.config.stash:
        from pytest_benchmark.utils import get_commit_info

        about: dict[str, Any] = {
            "schema": SCHEMA,
            "datetime": datetime.now(timezone.utc).isoformat(),
            "commit_info": {key: get_commit_info().get(key) for key in ("id", "dirty")},
            "machine_info": {},
        }
        pytest_benchmark_update_machine_info(item.config, about["machine_info"])
        _rows.append(path, about)
        item.config.stash[_BEGUN] = True
    _rows.append(path, {"name": item.name, "extra_info": row})


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Leave out every single time and what describes the process: the figures are in `extra_info`."""
    output_json["schema"] = SCHEMA
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}
    for row in output_json["benchmarks"]:
        for key in ("stats", "options", "params", "param", "group"):
            row.pop(key, None)
