"""`torch.compile` as a contender: what its name promises, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters


def compiled(function: Any) -> Callable[..., Any]:
    """`torch.compile` with default options, and without what other cases' shapes have taught it."""
    torch._dynamo.reset()
    counters.clear()
    result: Callable[..., Any] = torch.compile(function)
    return result


def nothing_traced() -> str | None:
    """After a run of the function compiled last: an objection if all of it ran eagerly, as PEFT's LSTM encoder does."""
    return None if counters["frames"]["ok"] else "torch.compile traces nothing of it, so it runs as PEFT does"


# Fields of a compiled contender.
COMPILED_ONLY: dict[str, Any] = {
    "refusals": (torch._dynamo.exc.TorchDynamoException,),
    "objection": nothing_traced,
}
