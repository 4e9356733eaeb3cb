"""Time GPU work: inside a CUDA graph, where the host costs nothing, and called from Python, where it does.

Contenders take turns, A B B A, so that a clock that drifts drifts for all. Cold: each call in a graph works on the next
of several sets of inputs, more than three L2 caches of them in all. Warm: all calls work on the same set.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .._limits import TOY, synchronize

Call = Callable[[], object]


@dataclass(frozen=True)
class Figures:
    """Milliseconds a call: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Figures:
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return Figures(statistics.median(samples), p20, p80)

    def as_dict(self) -> dict[str, float]:
        return {"median_ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80}


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls in order. They have run before, so that nothing is compiled during capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls[:2]:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_graphs(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int = 20) -> dict[str, Figures]:
    """Device time a call. graphs: name to a graph and the calls in it."""
    names = list(graphs)
    events = {name: [(_event(), _event()) for _ in range(rounds)] for name in names}
    for name in names:
        graphs[name][0].replay()
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            begin, end = events[name][turn]
            begin.record()
            graphs[name][0].replay()
            end.record()
        torch.cuda.synchronize()
    return {
        name: Figures.of([begin.elapsed_time(end) / graphs[name][1] for begin, end in events[name]]) for name in names
    }


def time_calls(
    calls: dict[str, Call], rounds: int = 2 if TOY else 12, inner: int = 1 if TOY else 20
) -> dict[str, Figures]:
    """Wall time a call from Python: `inner` calls in a row, then a wait for the GPU."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for name in names:
            calls[name]()
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                synchronize()
                start = time.perf_counter()
                for _ in range(inner):
                    calls[name]()
                synchronize()
                samples[name].append((time.perf_counter() - start) / inner * 1e3)
    finally:
        gc.enable()
    return {name: Figures.of(values) for name, values in samples.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
