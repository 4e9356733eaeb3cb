"""Compile every Triton kernel for every chip, without a GPU, and tabulate it: `python -m benches.compile_table`.

For each configuration that the package can select: registers and bytes of stack a thread (a kernel without arrays of
its own has a stack only for what it spills), shared memory, how many accesses to global memory are 128 bits wide, and
which tensor-core instructions there are: all read from the machine code, with the disassembler that Triton brings. So
is whether a kernel that may start before the one in front of it has ended touches memory before it has waited for that.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._machine_code import why_too_early

CHIPS = {80: "A100", 90: "H100, H200", 100: "B200"}
# Most shared memory one block may have on sm_86, sm_89 and sm_120, bytes (CUDA C++ programming guide, table of compute
# capabilities). The chips above have more, but these get the same tiles.
SHARED_LIMIT = 99 * 1024
MODULES = tuple(f"fusedprompt.ops.{name}.triton" for name in ("splice", "mlp", "head_loss", "cpt", "prefix_attention"))
_WIDE = re.compile(r"\b(?:LDG|STG|LDGSTS)\.[^ ]*128|\b(?:UBLKCP|UTMALDG|UTMASTG)\b")
_TENSOR = re.compile(r"\b(HMMA\.\d+|HGMMA\.\w+|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Configuration:
    """One compilation: a kernel with the types of its arguments and the values of its constants.

    types: argument name to Triton type ("*bf16", "constexpr"); integers are not in it, whose type the kernel says.
    aligned: integers known to be multiples of 16 (pointers always are).
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    label: str

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Compiled:
    """What the compilers made of a configuration for one chip."""

    kernel: str
    label: str
    num_warps: int
    num_stages: int
    capability: int
    registers: int
    stack: int
    shared: int
    wide_accesses: int | None
    tensor_instructions: str | None
    too_early: str | None = None

    @property
    def cells(self) -> list[str]:
        """Its part of a line of the table."""
        found = (self.registers, self.stack, self.shared, self.wide_accesses, self.tensor_instructions)
        return [str(value) for value in found]

    @property
    def objection(self) -> str | None:
        """Why this must not be shipped, or None."""
        if self.stack:
            return f"{self.stack} bytes of stack a thread"
        if self.shared > SHARED_LIMIT:
            return f"{self.shared} bytes of shared memory, of {SHARED_LIMIT}"
        return self.too_early


def configurations(capability: int) -> Iterator[Configuration]:
    """Everything that the ops can select on a chip."""
    for name in MODULES:
        for fields in importlib.import_module(name).configurations(pdl=capability >= 90):
            yield Configuration(**fields)


def _sample(all_of_them: Iterable[Configuration], every: int) -> Iterator[Configuration]:
    """Of each kernel the first configuration, and then one in `every` so many."""
    seen: collections.Counter[str] = collections.Counter()
    for configuration in all_of_them:
        if seen[configuration.name] % every == 0:
            yield configuration
        seen[configuration.name] += 1


def compile_with_triton(configuration: Configuration, capability: int) -> Any:
    """What Triton compiled, with all its stages as text and the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = configuration.kernel.params
    names = [parameter.name for parameter in parameters]
    signature = {
        parameter.name: configuration.types.get(parameter.name) or parameter.annotation_type or "i32"
        for parameter in parameters
    }
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    source = ASTSource(
        fn=configuration.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in configuration.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *configuration.aligned)},
    )
    options: dict[str, Any] = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    if configuration.constants["PDL"]:
        options["launch_pdl"] = True
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_for(configuration: Configuration, capability: int, disassembled: bool = True) -> Compiled:
    """Compile, and read the machine code. Its instructions only if it is `disassembled`, which takes 0.4 s."""
    compiled = compile_with_triton(configuration, capability)
    code = _dump(compiled.asm["cubin"], "-res-usage", *(["-sass"] if disassembled else []))
    resources = re.search(r"REG:(\d+) STACK:(\d+)", code)
    assert resources is not None, code
    tensor = collections.Counter(_TENSOR.findall(code))
    return Compiled(
        configuration.name,
        configuration.label,
        configuration.num_warps,
        configuration.num_stages,
        capability,
        registers=int(resources.group(1)),
        stack=int(resources.group(2)),
        shared=int(compiled.metadata.shared),
        wide_accesses=len(_WIDE.findall(code)) if disassembled else None,
        tensor_instructions=(", ".join(f"{count} {name}" for name, count in sorted(tensor.items())) or "none")
        if disassembled
        else None,
        too_early=why_too_early(code) if disassembled and configuration.constants["PDL"] else None,
    )


def _dump(machine_code: bytes, *what: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [str(program), *what, file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout


def _compile_share(
    chips: Sequence[int], disassembled: Sequence[int], every: int, share: int, shares: int
) -> list[tuple[int, Compiled]]:
    """Every `shares`-th compilation, with its place in the whole list."""
    jobs = [(one, chip, chip in disassembled) for chip in chips for one in _sample(configurations(chip), every)]
    return [(place, compile_for(*jobs[place])) for place in range(share, len(jobs), shares)]


def compile_all(chips: Sequence[int], disassembled: Sequence[int], every: int = 1) -> list[Compiled]:
    """Configurations for chips, on all processors: all, or of each kernel one of `every` so many.

    disassembled: the chips for which instructions are read.
    """
    shares = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(shares, mp_context=context) as pool:
        futures = [pool.submit(_compile_share, chips, disassembled, every, share, shares) for share in range(shares)]
        done = [item for future in futures for item in future.result()]
    return [compiled for _, compiled in sorted(done, key=lambda item: item[0])]


def table(rows: Sequence[Compiled], version: str) -> str:
    """The rows as Markdown, one line per configuration with the chips side by side."""
    chips = sorted({row.capability for row in rows})
    head = ["kernel", "configuration", "warps", "stages"]
    for chip in chips:
        head += [f"sm_{chip} registers", "stack", "shared", "128-bit", "tensor"]
    lines = [
        "# Compiled kernels",
        "",
        f"Written by `make kernels` with Triton {version}; no GPU is needed. Registers and bytes of stack a thread",
        "(which holds what is spilled); bytes of shared memory a block; 128-bit accesses to global memory and",
        "tensor-core instructions in the machine code.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    by_configuration: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        by_configuration.setdefault((row.kernel, row.label), []).append(row)
    for (kernel, label), compiled in by_configuration.items():
        cells = [f"`{kernel}`", label, str(compiled[0].num_warps), str(compiled[0].num_stages)]
        for row in sorted(compiled, key=lambda row: row.capability):
            cells += row.cells
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 1 if a kernel has an `objection`."""
    parser = argparse.ArgumentParser(prog="benches.compile_table", description=__doc__)
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), help="compute capabilities, such as 80 90")
    parser.add_argument("--every", type=int, default=1, help="of each kernel compile only one configuration in so many")
    options = parser.parse_args(arguments)
    import triton

    rows = compile_all(options.chips, options.chips, options.every)
    if options.write:
        options.write.write_text(table(rows, triton.__version__))
    bad = [row for row in rows if row.objection]
    for row in bad:
        print(f"FAILED: {row.kernel} ({row.label}) on sm_{row.capability}: {row.objection}", file=sys.stderr)
    most, shared = max(row.registers for row in rows), max(row.shared for row in rows)
    print(
        f"Triton {triton.__version__}: {len(rows)} compilations, {len(bad)} unfit; at most {most} registers, "
        f"{max(row.stack for row in rows)} bytes of stack, {shared} bytes of shared memory"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
