"""The CUDA recurrence as nvcc compiles it: registers, spills, shared memory, width of loads. Needs no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
CHIPS = (80, 90, 100)

pytestmark = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit")


@dataclasses.dataclass(frozen=True)
class Kernel:
    chip: int
    name: str
    registers: int
    stack: int
    spilled: int
    static_shared: int


def compile_for(chip: int, folder: Path) -> tuple[list[Kernel], Path]:
    """sm_90 with the ops around the kernels, the others without: torch's headers take longer than a chip."""
    from torch.utils import cpp_extension

    target = folder / f"lstm_{chip}.o"
    command = [str(NVCC), "-O3", "-std=c++17", "-gencode", f"arch=compute_{chip},code=sm_{chip}", "-Xptxas", "-v"]
    if chip == 90:
        command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{path}" for path in cpp_extension.include_paths()] + [str(ROOT / "csrc" / "lstm_cuda.cu")]
    else:
        source = folder / f"kernels_{chip}.cu"
        source.write_text(f'#include "{ROOT}/csrc/lstm_launch.cuh"\nauto* use = &fusedprompt::lstm_forward_cuda;\n'
                          "auto* use_too = &fusedprompt::lstm_backward_cuda;\n")  # fmt: skip
        command += [str(source)]
    done = subprocess.run([*command, "-c", "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = []
    for part in re.split(r"Compiling entry function ", done.stderr)[1:]:
        mangled = re.match(r"'(\w+)'", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert mangled and stack and registers, part
        spilled = int(stack[2]) + int(stack[3])
        static_shared = int(shared[1]) if shared else 0
        kernels.append(Kernel(chip, mangled[1], int(registers[1]), int(stack[1]), spilled, static_shared))
    return kernels, target


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Kernel], Path]:
    """All kernels of all chips, and the object file of sm_90."""
    folder = tmp_path_factory.mktemp("nvcc")
    results = {chip: compile_for(chip, folder) for chip in CHIPS}
    return [kernel for kernels, _ in results.values() for kernel in kernels], results[90][1]


def test_every_kernel_compiles_for_every_chip_without_spills(compiled: tuple[list[Kernel], Path]) -> None:
    for chip in CHIPS:
        names = [kernel.name for kernel in compiled[0] if kernel.chip == chip]
        # 3 dtypes x 2 passes, the persistent one for batch 1 and for more; 2 widths of transposes
        for part, count in (("lstm_persistent", 12), ("lstm_step", 6), ("lstm_transpose", 2)):
            assert sum(part in name for name in names) == count
    for kernel in compiled[0]:
        assert kernel.spilled == 0 and kernel.stack == 0, kernel


def test_a_block_of_256_threads_fits_the_registers_and_asks_for_shared_memory_by_plan_only(
    compiled: tuple[list[Kernel], Path],
) -> None:
    """65536 registers to a multiprocessor; weights in registers take 128 of a thread's 255."""
    for kernel in compiled[0]:
        assert kernel.registers <= 255 and kernel.static_shared == 0, kernel
        if "lstm_persistent" in kernel.name and "Li1E" in kernel.name:
            assert kernel.registers > 128, kernel


def test_weights_are_read_in_128_bits_and_nothing_is_in_local_memory(compiled: tuple[list[Kernel], Path]) -> None:
    found = importlib.util.find_spec("triton")
    tool = found and found.origin and Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("no cuobjdump")
    text = subprocess.run([tool, "-sass", compiled[1]], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"Function : ", text)[1:]
    assert len(kernels) == 20
    for kernel in kernels:
        assert not re.search(r"\b(LDL|STL)\b", kernel), kernel[:80]
        if "lstm_persistent" in kernel[:60]:
            # 8 rows of a tile that is streamed; a vector chunk; 4 polls under way at once; barriers of the block
            assert len(re.findall(r"LDG\.E\.NA\.128\.CONSTANT", kernel)) >= 8, kernel[:80]
            assert len(re.findall(r"LDG\.E\.128\.STRONG\.GPU", kernel)) == 4, kernel[:80]
            assert re.search(r"LDS\.128", kernel), kernel[:80]
