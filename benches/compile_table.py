"""Compile every Triton kernel for every chip, without a GPU, and tabulate it: `python -m benches.compile_table`.

For each configuration that the package can select: registers and spilled bytes as ptxas reports them, shared memory,
how many 128-bit accesses to global memory the program holds, and which tensor-core instructions.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHIPS = {80: "A100", 90: "H100, H200", 100: "B200"}
# Most shared memory one block may have, bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_WIDE = re.compile(r"(?:ld|st)\.global[^;]*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg[^;]*0x10")
MODULES = ("fusedprompt.ops.splice.triton", "fusedprompt.ops.mlp.triton")


@dataclass(frozen=True)
class Configuration:
    """One compilation: a kernel with the types of its arguments and the values of its constants.

    signature: argument name to Triton type ("*bf16", "i32", "constexpr"), in the kernel's order.
    aligned: arguments known to be multiples of 16 (pointers always are).
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    label: str


@dataclass(frozen=True)
class Compiled:
    """What the compilers made of a configuration for one chip."""

    configuration: Configuration
    capability: int
    registers: int
    spilled: int
    shared: int
    wide_accesses: int
    tensor_instructions: str


def configurations() -> Iterator[Configuration]:
    """Everything that the ops can select."""
    for name in MODULES:
        for fields in importlib.import_module(name).configurations():
            yield Configuration(**fields)


def compile_for(configuration: Configuration, capability: int) -> Compiled:
    """Compile to PTX with Triton and to machine code with the ptxas that Triton brings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(configuration.signature)
    pointers = [name for name, kind in configuration.signature.items() if kind.startswith("*")]
    source = ASTSource(
        fn=configuration.kernel,
        signature=configuration.signature,
        constexprs={(names.index(name),): value for name, value in configuration.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *configuration.aligned)},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text: str = compiled.asm["ptx"]
    registers, spilled = _assemble(text)
    return Compiled(
        configuration,
        capability,
        registers,
        spilled,
        int(compiled.metadata.shared),
        len(_WIDE.findall(text)),
        ", ".join(sorted(set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", text)))) or "none",
    )


def _assemble(text: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from ptxas."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = re.search(r"\.target (sm_\w+)", text)
    assert found is not None
    chip = found.group(1)
    # Newer releases bring a second, newer assembler, which reads the PTX they write for every chip.
    program = next(path for path in (ptxas / "ptxas-blackwell", ptxas / "ptxas") if path.exists())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [str(program), "-v", f"--gpu-name={chip}", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"ptxas failed for {chip}: {result.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", result.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert registers is not None and spills is not None, result.stderr
    return int(registers.group(1)), int(spills.group(1)) + int(spills.group(2))


def table(rows: list[Compiled], version: str) -> str:
    """The rows as Markdown, one line per configuration with the chips side by side."""
    chips = sorted({row.capability for row in rows})
    head = ["kernel", "configuration", "warps", "stages"]
    for chip in chips:
        head += [f"sm_{chip} registers", "spilled", "shared", "128-bit", "tensor"]
    lines = [
        "# Compiled kernels",
        "",
        f"Written by `make kernels` with Triton {version}; no GPU is needed. Registers and spilled bytes a thread;",
        "shared memory a block in bytes; 128-bit accesses to global memory in the program; tensor-core instructions.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    by_configuration: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        key = (row.configuration.kernel.__name__, row.configuration.label)
        by_configuration.setdefault(key, []).append(row)
    for (kernel, label), compiled in by_configuration.items():
        first = compiled[0].configuration
        cells = [f"`{kernel}`", label, str(first.num_warps), str(first.num_stages)]
        for row in sorted(compiled, key=lambda row: row.capability):
            cells += [
                str(row.registers),
                str(row.spilled),
                str(row.shared),
                str(row.wide_accesses),
                row.tensor_instructions,
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 1 if a kernel spills or takes too much shared memory."""
    parser = argparse.ArgumentParser(prog="benches.compile_table", description=__doc__)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), help="compute capabilities, such as 80 90")
    options = parser.parse_args(arguments)
    import triton

    rows = [compile_for(configuration, chip) for configuration in configurations() for chip in options.chips]
    text = table(rows, triton.__version__)
    print(text)
    if options.write:
        options.write.write_text(text)
    bad = [row for row in rows if row.spilled or row.shared > SHARED_LIMIT[row.capability]]
    for row in bad:
        name = f"{row.configuration.kernel.__name__} ({row.configuration.label}) on sm_{row.capability}"
        print(f"FAILED: {name}: spills {row.spilled} bytes, {row.shared} bytes of shared memory", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
