"""Every Triton kernel, compiled for every chip without a GPU: here in one of EVERY configurations that can be chosen.

`make kernels` compiles them all, and writes the table that is compared with these.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benches import compile_table
from benches._machine_code import why_too_early
from benches.compile_table import Compiled

ROOT = Path(__file__).resolve().parent.parent
COMPILE = """
import dataclasses, json
from benches import compile_table
if __name__ == "__main__":
    rows = compile_table.compile_all(list(compile_table.CHIPS), [90], EVERY)
    every = [(one.name, one.label) for one in compile_table.configurations(90)]
    print(json.dumps([[dataclasses.asdict(row) for row in rows], every]))
"""
EVERY = 11  # no divisor of the numbers of dtypes, widths and layouts, which take turns
# Kernels that break the rule, each in its own way.
TOO_EARLY = """
import dataclasses, json
import triton
import triton.language as tl
from benches import compile_table
from benches._machine_code import why_too_early
from benches.compile_table import Configuration

@triton.jit
def right(x_ptr, out_ptr, PDL: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(out_ptr, tl.load(x_ptr))

@triton.jit
def loads(x_ptr, out_ptr, PDL: tl.constexpr):
    x = tl.load(x_ptr)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(out_ptr, x)

@triton.jit
def stores(x_ptr, out_ptr, PDL: tl.constexpr):
    tl.store(out_ptr, 1.0)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()

@triton.jit
def lets_start(x_ptr, out_ptr, PDL: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tl.store(out_ptr, tl.load(x_ptr))

@triton.jit
def never_waits(x_ptr, out_ptr, PDL: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr))

@triton.jit
def waits_at_times(x_ptr, out_ptr, PDL: tl.constexpr):
    if tl.program_id(0) == 1:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out_ptr, tl.load(x_ptr))

types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "PDL": "constexpr"}
found = {}
for kernel in (right, loads, stores, lets_start, never_waits, waits_at_times):
    configuration = Configuration(kernel, types, {"PDL": True}, (), 4, 3, "")
    found[configuration.name] = compile_table.compile_for(configuration, 90).objection
print(json.dumps(found))
"""
ADDRESSES = """
import json
from benches import compile_table
texts = []
for configuration in compile_table.configurations(90):
    if configuration.name.startswith(("splice", "segment")) and "bf16" in configuration.label:
        text = compile_table.compile_with_triton(configuration, 90).asm["ttir"]
        texts.append((configuration.name, configuration.label, configuration.constants["BLOCK_D"], text))
print(json.dumps(texts))
"""


POLICIES = """
from benches import compile_table
(splice,) = (c for c in compile_table.configurations(90) if c.label == "prefix, table bf16, D=4096")
print(compile_table.compile_with_triton(splice, 90).asm["ptx"].count("evict_last"))
"""
LINE = r"^\| `(\w+)` \| ([^|]+) \|"


def run(script: Path | str, **settings: str) -> str:
    """In a process of its own: kernels cannot be compiled where they are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, str(script)] if isinstance(script, Path) else [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def compiled_and_all(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Compiled], set[tuple[str, str]]]:
    """Some that are compiled; kernel and label of all."""
    script = tmp_path_factory.mktemp("compile") / "compile_some.py"  # its workers import it
    script.write_text(COMPILE.replace("EVERY", str(EVERY)))
    rows, every = json.loads(run(script))
    return [Compiled(**row) for row in rows], {(name, label) for name, label in every}


@pytest.fixture(scope="module")
def compiled(compiled_and_all: tuple[list[Compiled], set[tuple[str, str]]]) -> list[Compiled]:
    return compiled_and_all[0]


def test_configurations_fit_spill_nothing_and_wait_before_they_touch_memory(compiled: list[Compiled]) -> None:
    names = {"splice_forward", "splice_prefix_backward", "segment_sum", "linear_forward", "linear_backward"}
    names |= {"sum_of_parts", "loss_in_place", "cpt_forward", "cpt_backward"}
    names |= {"attention_forward", "attention_d_query", "attention_d_keys"}
    for chip in compile_table.CHIPS:
        assert {row.kernel for row in compiled if row.capability == chip} == names
    assert [(row.kernel, row.label, row.capability, row.objection) for row in compiled if row.objection] == []


@pytest.fixture(scope="module")
def disassembled(compiled: list[Compiled]) -> list[Compiled]:
    """Those for sm_90; `make kernels` reads the instructions for all chips."""
    return [row for row in compiled if row.capability == 90]


def test_kernels_that_touch_memory_too_early_are_found(tmp_path: Path) -> None:
    script = tmp_path / "too_early.py"
    script.write_text(TOO_EARLY)
    assert json.loads(run(script)) == {
        "right": None,
        "loads": "LDG.E before the wait",
        "stores": "STG.E before the wait",
        "lets_start": "PREEXIT before the wait",
        "never_waits": "never waits",
        "waits_at_times": "BRA around the wait",
    }


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("NOP ; RET.REL.NODEC R2 0x0 ;", None),
        ("LDG.E R4, [R2] ; RET.REL.NODEC R2 0x0 ;", "CALL.REL.NOINC before the wait"),
        ("BRA 0x10 ; RET.REL.NODEC R2 0x0 ;", "CALL.REL.NOINC before the wait"),
        ("NOP ;", "CALL.REL.NOINC before the wait"),
    ],
)
def test_a_call_before_the_wait_must_touch_nothing_and_return(body: str, found: str | None) -> None:
    start = "CALL.REL.NOINC 0x40 ; ACQBULK ; PREEXIT ; EXIT ; "
    lines = [line.strip() for line in (start + body).split(";") if line.strip()]
    text = "\n".join(f"        /*{16 * index:04x}*/  {line} ;" for index, line in enumerate(lines))
    assert why_too_early(text) == found


def test_rows_are_moved_in_128_bit_accesses_where_widths_allow(disassembled: list[Compiled]) -> None:
    for row in disassembled:
        assert row.wide_accesses is not None
        is_odd = "odd widths" in row.label or row.label.endswith(("D=4097", "V=50257", "V=67"))
        # A program of CPT has one row: 64 numbers are fewer than 16 bytes for each thread of even one warp.
        is_short = row.kernel.startswith("cpt") and row.label.endswith("D=64")
        assert is_odd or is_short or row.wide_accesses > 0, row


def test_products_use_tensor_cores_unless_they_must_be_exact(disassembled: list[Compiled]) -> None:
    for row in disassembled:
        of_attention = row.kernel.startswith("attention")
        is_exact = "in fp32" in row.label or (of_attention and row.label.startswith("fp32"))
        is_product = (of_attention or row.kernel.startswith("linear")) and not is_exact
        assert (row.tensor_instructions != "none") == is_product, row


def test_the_committed_table_is_that_of_these_kernels(
    compiled_and_all: tuple[list[Compiled], set[tuple[str, str]]],
) -> None:
    compiled, every = compiled_and_all
    text = (ROOT / "docs" / "kernels-compiled.md").read_text()
    listed = set(re.findall(LINE, text, re.MULTILINE))
    assert listed == every, "run `make kernels`"
    if f"Triton {importlib.metadata.version('triton')};" in text:
        lines = {(kernel, label): line for line in text.splitlines() for kernel, label in re.findall(LINE, line)}
        for row in compiled:
            cells = [cell for cell in row.cells if cell != "None"]
            assert f"| {' | '.join(cells)} |" in lines[row.kernel, row.label], "run `make kernels`"


def test_splice_adds_64_bit_offsets_to_every_row(compiled: list[Compiled]) -> None:
    """B * S * D passes 2**31. Only the way along a row, shorter than BLOCK_D or D, is reckoned in 32 bits."""
    texts = json.loads(run(ADDRESSES))
    assert {name for name, *_ in texts} == {"splice_forward", "splice_prefix_backward", "segment_sum"}
    for name, label, block, text in texts:
        offsets = re.findall(r"tt\.addptr [^:]*: [^,]*, (?:tensor<([\dx]*)x)?(i\d+)", text)
        assert len(offsets) >= 3, text
        for shape, width in offsets:
            # Without a shape: the way from one bound of a segment to the next.
            along = name == "segment_sum" and not shape
            assert width == "i64" or along or shape.split("x")[-1] == str(block), (name, label, shape, width)


def test_rows_of_the_table_may_be_loaded_without_a_hint() -> None:
    """The prompt's keep theirs."""
    hints = {policy: int(run(POLICIES, FUSEDPROMPT_SPLICE_TABLE=policy)) for policy in ("evict_last", "")}
    assert hints["evict_last"] > hints[""] > 0


def test_a_spill_and_too_much_shared_memory_are_objected_to() -> None:
    fine = Compiled("k", "l", 4, 3, 80, 32, 0, 99 * 1024, 1, "none")
    assert fine.objection is None
    assert dataclasses.replace(fine, stack=8).objection == "8 bytes of stack a thread"
    assert dataclasses.replace(fine, too_early="STG before the wait").objection == "STG before the wait"
    assert dataclasses.replace(fine, shared=99 * 1024 + 1).objection == "101377 bytes of shared memory, of 101376"
