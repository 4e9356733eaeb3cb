"""A bank of 10,000 prompts: opening it, first uses, and a batch of 64 of them against one shared prompt.

    python -m pytest benches/test_bench_bank.py -s --benchmark-quiet

writes 0.8 GB into a temporary folder. The first test prints figures that are no ratios, and depend on the disk.
"""

from __future__ import annotations

import os
import random
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedprompt as fp
from fusedprompt.layouts.mixture import Mixture
from fusedprompt.model.banked import BankedCall
from fusedprompt.ops import splice

from ._interleave import FORWARD, OURS, Case, Contender, check, measure
from .test_bench_step import llama

COUNT, ROWS, WIDTH, BATCH = 10_000, 20, 1024, 64
ONE_PROMPT = "one shared prompt"


@pytest.fixture(scope="module")
def base() -> Any:
    return llama(1, WIDTH, 32000)


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of prompts p0 ... p9999."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bank")
    bank, rows = fp.PromptBank(path, base), torch.randn(ROWS, WIDTH)
    for first in range(0, COUNT, 1000):
        bank.add_all({f"p{index}": rows + index / 100 for index in range(first, first + 1000)})
    yield path


def uncached(file: Path) -> None:
    """Let the system forget a file's pages."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_opening_and_first_uses(folder: Path) -> None:
    opened = [seconds(lambda: fp.PromptBank(folder)) for _ in range(5)]
    tracemalloc.start()
    bank = fp.PromptBank(folder)
    memory = tracemalloc.get_traced_memory()[0] / COUNT
    tracemalloc.stop()
    files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / COUNT
    first = []
    for name in random.Random(0).sample(bank.names, 500):
        uncached(bank._folder.file(bank._version(name)))
        first.append(seconds(lambda name=name: bank.rows(name)))
    beside = memory + files - ROWS * WIDTH * 4
    print(f"\nopened in {statistics.median(opened):.2f} s (longest of 5: {max(opened):.2f})")
    print(f"beside its rows a prompt takes {beside:.0f} bytes: {memory:.0f} of memory, the others on disk")
    print(f"first use: median {statistics.median(first) * 1e3:.2f} ms, longest of 500 {max(first) * 1e3:.2f}")
    assert len(bank) == COUNT and beside < 1024


def build_batch(base: Any, folder: Path, length: int) -> Case:
    """Embeddings of 64 rows with a prompt each, from their names on; against one prompt's rows in front of all."""
    torch.manual_seed(0)
    bank = fp.PromptBank(folder)
    model = fp.PromptModel(base, bank=bank).eval()
    table = base.get_input_embeddings().weight.detach()
    ids = torch.randint(0, len(table), (BATCH, length))
    names = [f"p{index}" for index in random.Random(0).sample(range(COUNT), BATCH)]
    bank.prefetch(names)
    alone, shared = bank.rows(names[0]), fp.Layout.prefix(ROWS)

    def distinct() -> Tensor:
        host = BankedCall(model, bank, names, "splice")
        mixture = Mixture.of(host.prompts, host.prompts[host.in_use], host.names, ids)
        return splice(host.table(mixture.prompts), mixture.prefix(), input_ids=ids, table=table)

    def indexed() -> Tensor:
        return torch.cat((torch.stack([bank.rows(name) for name in names]), table[ids]), 1)

    def one(name: str) -> Contender:
        def forward() -> Tensor:
            return splice(alone, shared, input_ids=ids, table=table)

        return Contender(name, forward, lambda _: None, lambda out: {}, {})

    case = Case(
        group="a bank: splice",
        name=f"B={BATCH} T={length} P={ROWS} D={WIDTH}, {BATCH} of {COUNT} prompts",
        dtype="fp32",
        contenders=[Contender(OURS, distinct, lambda _: None, lambda out: {"all": out}, {})],
        truth=Contender("indexing", indexed, lambda _: None, lambda out: {"all": out}, {}),
        tolerance=(0.0, 0.0),
        rounds=(20, 120),
        seconds=6.0,
    )
    check(case)
    # These compute something else: one prompt for all rows.
    case.contenders += [one(ONE_PROMPT), one(f"{ONE_PROMPT} again")]
    return case


@pytest.mark.parametrize("length", [128, 512])
def test_splice_of_prompts_out_of_the_bank(benchmark: Any, base: Any, folder: Path, length: int) -> None:
    measure(benchmark, build_batch(base, folder, length), FORWARD)
