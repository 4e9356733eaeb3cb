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
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[list[Kernel], Path]]:
    """Of each chip all kernels, and the object file."""
    folder = tmp_path_factory.mktemp("nvcc")
    return {chip: compile_for(chip, folder) for chip in CHIPS}


@pytest.fixture(scope="module")
def compiled(built: dict[int, tuple[list[Kernel], Path]]) -> list[Kernel]:
    """All kernels of all chips."""
    return [kernel for kernels, _ in built.values() for kernel in kernels]


Code = list[tuple[int, str]]  # addresses and instructions


@pytest.fixture(scope="module")
def code(built: dict[int, tuple[list[Kernel], Path]]) -> dict[tuple[int, str], Code]:
    """The machine code of each kernel of each chip."""
    found = importlib.util.find_spec("triton")
    tool = found and found.origin and Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("no cuobjdump")
    result = {}
    for chip, (_, target) in built.items():
        text = subprocess.run([tool, "-sass", target], capture_output=True, text=True, check=True).stdout
        for kernel in re.split(r"Function : ", text)[1:]:
            lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", kernel)
            result[chip, kernel.split()[0]] = [(int(address, 16), instruction) for address, instruction in lines]
    assert len(result) == 20 * len(CHIPS)
    return result


def where(code: Code, pattern: str) -> list[int]:
    return [address for address, instruction in code if re.search(pattern, instruction)]


def step_loop(code: Code) -> int:
    """Where the loop over the steps begins: the widest that has all polls in it. Behind its end is what it jumps to."""
    polls = where(code, r"LDG\.E\.128\.STRONG\.GPU")
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*\b(0x[0-9a-f]+)", text))]
    loops = [(to, at) for to, at in jumps if all(to <= poll <= at for poll in polls)]
    assert polls and loops
    return max(loops, key=lambda loop: loop[1] - loop[0])[0]


def persistent(code: dict[tuple[int, str], Code], *chips: int) -> list[Code]:
    kernels = [lines for (chip, name), lines in code.items() if chip in chips and "lstm_persistent" in name]
    assert len(kernels) == 12 * len(chips)
    return kernels


def test_every_kernel_compiles_for_every_chip_without_spills(compiled: list[Kernel]) -> None:
    for chip in CHIPS:
        names = [kernel.name for kernel in compiled if kernel.chip == chip]
        # 3 dtypes x 2 passes, the persistent one for batch 1 and for more; 2 widths of transposes
        for part, count in (("lstm_persistent", 12), ("lstm_step", 6), ("lstm_transpose", 2)):
            assert sum(part in name for name in names) == count
    for kernel in compiled:
        assert kernel.spilled == 0 and kernel.stack == 0, kernel


def test_a_block_of_256_threads_fits_the_registers_and_asks_for_shared_memory_by_plan_only(
    compiled: list[Kernel],
) -> None:
    """65536 registers to a multiprocessor; weights in registers take 160 of a thread's 255, before sm_90 128."""
    for kernel in compiled:
        assert kernel.registers <= 255 and kernel.static_shared == 0, kernel
        if "lstm_persistent" in kernel.name and "Li1E" in kernel.name:
            assert kernel.registers > (160 if kernel.chip >= 90 else 128), kernel


def test_weights_are_read_in_128_bits_and_nothing_is_in_local_memory(code: dict[tuple[int, str], Code]) -> None:
    for name, lines in code.items():
        assert not where(lines, r"\b(LDL|STL)\b"), name
    for lines in persistent(code, 90):
        # One load of weights that stay; a vector chunk; 4 polls under way at once
        assert where(lines, r"LDG\.E\.NA\.128\.CONSTANT") and where(lines, r"LDS\.128")
        assert len(where(lines, r"LDG\.E\.128\.STRONG\.GPU")) == 4


def test_a_step_waits_for_no_store_to_global_memory_and_empties_no_cache(code: dict[tuple[int, str], Code]) -> None:
    """A fence of the GPU waits for the cell's stores to arrive: half a microsecond, as long as everything else in S.

    One is left, in the barrier before the first step. Words for other blocks of a cluster leave before those stores.
    """
    for lines in persistent(code, 90, 100):
        begin = step_loop(lines)
        for pattern in (r"MEMBAR\.\w+\.(GPU|SYS|VC)", r"\bCCTL\b", r"\bUCGABAR"):
            assert all(address < begin for address in where(lines, pattern)), pattern
        sent, stored = where(lines, r"\bSTAS\b"), where(lines, r"\bSTG\b(?!.*STRONG)")
        assert sent and stored and begin < min(sent) and max(sent) < min(stored)
        assert all(address > begin for address in where(lines, r"SYNCS.*TRYWAIT"))


def test_a_step_divides_no_integers(code: dict[tuple[int, str], Code]) -> None:
    """The remainder of a 64-bit number is a call of some 70 instructions, behind which everything waits."""
    for (chip, name), lines in code.items():
        assert not where(lines, r"[IF]2[IF]\.[UF]64"), (chip, name)
    for lines in persistent(code, *CHIPS):
        begin = step_loop(lines)
        assert not [address for address in where(lines, r"\bI2F\b") if address > begin]


def test_streamed_weights_are_under_way_before_the_vector_is_waited_for(code: dict[tuple[int, str], Code]) -> None:
    """8 rows of a group before the first step; then each row asks for its successor as soon as it is multiplied."""
    for lines in persistent(code, *CHIPS):
        begin, asked = step_loop(lines), where(lines, r"LDGSTS\.E\.BYPASS\S*\.128")
        assert (sum(address < begin for address in asked), sum(address > begin for address in asked)) == (8, 8)
        waits = [text for _, text in lines if "DEPBAR" in text and "LDGDEPBAR" not in text]
        assert sum("SB0, 0x7" in text for text in waits) == 8, waits


def test_polls_are_bounded_by_a_call_that_does_not_return(code: dict[tuple[int, str], Code]) -> None:
    """Of each kind of poll; on sm_80 there are no clusters, so that one of the two never happens."""
    for chip, count in ((80, 1), (90, 2), (100, 2)):
        for lines in persistent(code, chip):
            assert len(where(lines, r"CALL\.ABS")) >= count
