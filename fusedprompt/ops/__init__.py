"""The ops, usable alone: `mlp`, `lstm`, `splice`, `cpt`, `head_loss`, `prefix_attention`.

Each picks a backend and checks its arguments.
"""

from __future__ import annotations

from typing import Any

from . import cpt as _cpt
from . import head_loss as _head_loss
from . import lstm as _lstm
from . import mlp as _mlp
from . import prefix_attention as _prefix_attention
from . import splice as _splice
from ._backend import BackendUnavailable, use_backend

OPS = {op.name: op for op in (_mlp.OP, _lstm.OP, _splice.OP, _cpt.OP, _head_loss.OP, _prefix_attention.OP)}

cpt, cpt_loss = _cpt.cpt, _cpt.cpt_loss
head_loss = _head_loss.head_loss
lstm = _lstm.lstm
mlp = _mlp.mlp
prefix_attention = _prefix_attention.prefix_attention
splice, splice_batch, SplicedBatch = _splice.splice, _splice.splice_batch, _splice.SplicedBatch


def explain(op: str, *args: Any) -> dict[str, str]:
    """Why each backend of an op can or cannot run on these arguments.

    Args:
        op: "mlp", "lstm", "splice", "cpt", "head_loss" or "prefix_attention".
        args: the op's tensors, in the order of its public function.

    Returns:
        backend name -> "runs", or a clause that says why not; the fastest backend comes first.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {sorted(OPS)}, got {op!r}")
    return OPS[op].explain(*args)


__all__ = [
    "BackendUnavailable",
    "SplicedBatch",
    "cpt",
    "cpt_loss",
    "explain",
    "head_loss",
    "lstm",
    "mlp",
    "prefix_attention",
    "splice",
    "splice_batch",
    "use_backend",
]
