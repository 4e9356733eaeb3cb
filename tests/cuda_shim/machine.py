"""Builds the CUDA kernels and their launches with g++ against the fiber shim, and runs single passes of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("csrc/lstm_plan.cpp", "csrc/shim/fibers.cpp", "csrc/shim/memory.cpp")
COMPILER = shutil.which("g++")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VARIANTS = ("S", "M", "L", "STREAM")


class KernelFailed(Exception):
    """A kernel could not run to its end: the message of the shim or of the launch."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The device that the shim pretends to be, and how a launch on it goes."""

    blocks: int = 4  # multiprocessors
    shared: int = 64 << 10
    registers: int = 256 << 10
    clusters: bool = False
    variant: str | None = None
    threads: int = 64
    seed: int = 0
    lose_store: int = -1
    resident: int = -1
    misaligned: bool = False
    workspace: int = 0xFF  # the byte that it is full of, which is that of words nobody has written; -1: random ones
    clusters_run: bool = True
    lose_fills: bool = False
    most_polls: int = -1
    deaf_barrier: int = -1  # which barrier of each thread orders nothing
    fault: str = ""  # of a driver that was built with faults


@dataclasses.dataclass(frozen=True)
class Plan:
    variant: str
    directions_at_once: int
    blocks: int
    units: int
    row_groups: int
    split: int
    tiles: int
    tile_rows: int
    depth: int
    held_depth: int
    shared_slots: int
    streamed_bytes: int
    launches: int
    queries: int  # of what fits on the device, when this was planned
    queries_again: int  # when it was planned three times more, for other lengths
    queries_elsewhere: int  # and in another environment
    barriers: int


FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi", "-DFP_SHIM"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _build(folder: Path, root: Path, flags: Sequence[str], driver_flags: Sequence[str]) -> Path:
    objects = []
    for source in (*SOURCES, "tests/cuda_shim/driver.cpp"):
        objects.append(str(folder / (Path(source).stem + ".o")))
        more = driver_flags if "driver" in source else []
        subprocess.run([str(COMPILER), *FLAGS, *flags, *more, "-c", str(root / source), "-o", objects[-1]], check=True)
    driver = folder / "driver"
    subprocess.run([str(COMPILER), *flags, *objects, "-o", str(driver)], check=True)
    return driver


def build(folder: Path) -> Path:
    """The driver with AddressSanitizer and UBSan, whose first finding ends it."""
    return _build(folder, ROOT, SANITIZERS, [])


def build_watched(folder: Path, root: Path = ROOT) -> Path:
    """The driver whose kernels report each load and store to csrc/shim/memory.cpp, which looks for races."""
    return _build(folder, root, [], ["-fsanitize=thread", "-fno-threadsafe-statics"])


def build_with_faults(folder: Path, faults: Mapping[str, Sequence[tuple[str, str, str]]]) -> Path:
    """`build_watched` of a copy, in which the environment's FAULT chooses what is wrong.

    faults: of each name, files of csrc/, an expression that stands there once, and the wrong one that takes its place.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "cuda_shim", folder / "tests" / "cuda_shim")
    for name, changes in faults.items():
        for file, right, wrong in changes:
            path = folder / "csrc" / file
            text = path.read_text()
            assert text.count(right) == 1, f"{name}: {text.count(right)} times in {file}: {right}"
            path.write_text(text.replace(right, f'(shim::settings.fault == "{name}" ? {wrong} : {right})'))
    return build_watched(folder, folder)


def to_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


class Machine:
    def __init__(self, driver: Path) -> None:
        self.driver = driver

    def _run(self, gpu: Gpu, numbers: Sequence[int], arrays: Sequence[Tensor]) -> tuple[Plan, bytes]:
        data = struct.pack(f"={len(numbers)}q", *numbers) + b"".join(to_bytes(array) for array in arrays)
        environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:abort_on_error=0"}
        environment["FAULT"] = gpu.fault
        environment.pop("LD_PRELOAD", None)
        done = subprocess.run([str(self.driver)], input=data, capture_output=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        length = struct.unpack_from("=q", done.stdout)[0]
        if length:
            raise KernelFailed(done.stdout[8 : 8 + length].decode())
        count = len(dataclasses.fields(Plan))
        first, *rest = struct.unpack_from(f"={count}q", done.stdout, 8)
        return Plan(VARIANTS[first], *rest), done.stdout[8 * (1 + count) :]

    def _numbers(self, gpu: Gpu, backward: bool, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
        variant = -1 if gpu.variant is None else VARIANTS.index(gpu.variant)
        numbers = [
            int(backward),
            *shape,
            CODES[dtype],
            gpu.blocks,
            gpu.shared,
            gpu.registers,
            int(gpu.clusters),
            variant,
        ]
        return [
            *numbers,
            gpu.threads,
            gpu.seed,
            gpu.lose_store,
            gpu.resident,
            int(gpu.misaligned),
            gpu.workspace,
            int(gpu.clusters_run),
            int(gpu.lose_fills),
            gpu.most_polls,
            gpu.deaf_barrier,
        ]

    def forward(self, gpu: Gpu, weights: Sequence[Tensor], pre: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor]:
        """weights: W_hh, b_ih, b_hh of each direction; pre (directions, P, B, 4H) fp32, without biases.

        Returns the plan, gates, cells and output, as in csrc/lstm.h.
        """
        directions, steps, batch, width = pre.shape
        hidden, dtype = width // 4, weights[0].dtype
        numbers = self._numbers(gpu, False, (steps, batch, hidden, directions), dtype)
        plan, data = self._run(gpu, numbers, [*weights, pre])
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gates, cell, output = flat.split([pre.numel() * 4, pre.numel(), pre.numel() // 4 * dtype.itemsize])
        return (
            plan,
            gates.view(torch.float32).view(pre.shape),
            cell.view(torch.float32).view(directions, steps, batch, hidden),
            output.view(dtype).view(steps, batch, directions * hidden),
        )

    def backward(
        self, gpu: Gpu, weights: Sequence[Tensor], gates: Tensor, cell: Tensor, d_output: Tensor
    ) -> tuple[Plan, Tensor]:
        """Returns the plan and d_gates (directions, P, B, 4H)."""
        directions, steps, batch, hidden = cell.shape
        numbers = self._numbers(gpu, True, (steps, batch, hidden, directions), d_output.dtype)
        plan, data = self._run(gpu, numbers, [*weights, gates, cell, d_output])
        return plan, torch.frombuffer(bytearray(data), dtype=d_output.dtype).view(gates.shape)
