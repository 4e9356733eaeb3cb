"""What is measured on a GPU: of each shape its name, the least work, and what the kernels should take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import _work, predicted
from .._limits import floor_seconds, predicted_seconds
from .._work import Work

# Bytes of a parameter. In fp32 and tf32 they are the same, and products differ; under autocast parameters are fp32.
ITEMSIZE = {"fp32": 4, "tf32": 4, "bf16": 2, "bf16 autocast": 4}
PROMPT_ROWS = 20  # of splice


@dataclass(frozen=True)
class Shape:
    """group, name, dtype: as in a result's row. work: the least, by mode.

    seconds: (limits as of `_limits.limits`, figures as of `predicted.figures`) to what the kernels should take, by
        mode.
    """

    group: str
    name: str
    dtype: str
    work: Mapping[str, Work]
    seconds: Callable[[Any, Any], Mapping[str, float]]

    def floor(self, limits: Any) -> dict[str, float]:
        """Seconds that the least work takes, by mode."""
        return {mode: floor_seconds(work, _products(self.dtype), limits) for mode, work in self.work.items()}


def _products(dtype: str) -> str:
    return dtype.split()[0]


def _by_kernels(group: str, name: str, dtype: str, work: Any, kernels: Mapping[str, list[Work]]) -> Shape:
    def seconds(limits: Any, _: Any) -> dict[str, float]:
        return {mode: predicted_seconds(each, _products(dtype), limits) for mode, each in kernels.items()}

    return Shape(group, name, dtype, work, seconds)


def mlp(rows: int, width: int, kind: str) -> Shape:
    """P-tuning's encoder: three layers, D = H = width."""
    sizes = (rows, width, width, ITEMSIZE[kind])
    return _by_kernels("mlp", f"P={rows} D=H={width}", kind, _work.mlp(*sizes), _work.mlp_kernels(*sizes))


def projection(rows: int, layers: int, width: int, kind: str) -> Shape:
    """Prefix tuning's projection to keys and values of L layers: two layers, D = H = width."""
    sizes = (rows, layers, width, ITEMSIZE[kind])
    name = f"P={rows} L={layers} D=H={width}"
    return _by_kernels("projection", name, kind, _work.projection(*sizes), _work.projection_kernels(*sizes))


def cpt(rows: int, width: int) -> Shape:
    """A context and its change."""
    sizes = (rows, width, ITEMSIZE["fp32"])
    return _by_kernels("cpt", f"P={rows} D={width}", "fp32", _work.cpt(*sizes), _work.cpt_kernels(*sizes))


def lstm(rows: int, width: int, hidden: int, kind: str) -> Shape:
    """P-tuning's LSTM: two layers, bidirectional, batch 1."""
    dtype = "bfloat16" if kind == "bf16" else "float32"

    def seconds(_: Any, gpu: Any) -> dict[str, float]:
        return predicted.lstm(rows, width, hidden, dtype, gpu)

    work = _work.lstm(rows, width, hidden, ITEMSIZE[kind])
    return Shape("lstm", f"P={rows} D={width} H={hidden}", kind, work, seconds)


def splice(batch: int, length: int, width: int, rows: int = PROMPT_ROWS) -> Shape:
    """The prompt in front of a batch, with mask and labels; a bf16 model, an fp32 prompt."""
    sizes = (batch, length, rows, width, ITEMSIZE["bf16"], ITEMSIZE["fp32"])
    name = f"B={batch} T={length} D={width}"
    return _by_kernels("splice", name, "bf16", _work.splice(*sizes), _work.splice_kernels(*sizes))


def head(rows: int, width: int, vocabulary: int, kind: str) -> Shape:
    """A language model's head and loss."""
    sizes, name = (rows, width, vocabulary, ITEMSIZE[kind]), f"R={rows} D={width} V={vocabulary}"
    return _by_kernels("head loss", name, kind, _work.head_loss(*sizes), _work.head_loss_kernels(*sizes))


def prefix_attention(batch: int, heads: int, kv_heads: int, length: int, prefix: int, width: int, kind: str) -> Shape:
    """Attention of every row to one prefix and to itself."""
    sizes = (batch, heads, kv_heads, length, prefix, width, ITEMSIZE[kind])
    name = f"B={batch} H={heads}/{kv_heads} T={length} N={prefix} d={width}"
    work, kernels = _work.prefix_attention(*sizes), _work.prefix_attention_kernels(*sizes)
    return _by_kernels("prefix attention", name, kind, work, kernels)


SPLICES = ((32, 2048, 4096), (8, 512, 4096))
LSTMS = ((100, 1024, 1024), (20, 768, 256), (50, 3072, 3072), (20, 768, 768), (100, 4096, 4096))
HEADS = ((840, 3072, 128256), (8192, 4096, 32000))
MLPS = ((20, 4096), (50, 3072), (20, 768), (100, 4096), (20, 3072), (100, 8192))
PROJECTIONS = ((30, 28, 1024),)
CPTS = ((250, 4096),)
# Of a layer of Llama 3.2 3B, in training.
ATTENTIONS = ((4, 24, 8, 210, 200, 128), (64, 24, 8, 100, 2000, 128))


def shown() -> Iterator[Shape]:
    """Those of docs/gpu.md."""
    for sizes in SPLICES:
        yield splice(*sizes)
    for sizes in CPTS:
        yield cpt(*sizes)
    for attention in ATTENTIONS:
        yield prefix_attention(*attention, "bf16")
    for function, all_sizes in ((mlp, MLPS), (projection, PROJECTIONS), (lstm, LSTMS), (head, HEADS)):
        for sizes in sorted(all_sizes):
            for kind in ("fp32", "bf16"):
                yield function(*sizes, kind)
