"""What a call of the native LSTM costs the host: `python -m benches.call_overhead`.

Two layers in both directions (16 weights), so small that the arithmetic costs next to nothing; one thread. Each call is
measured forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedprompt import ops

from .launch_cost import microseconds


class Floor(torch.autograd.Function):
    """As many inputs as the LSTM has, and nothing done with them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(1)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * 17


def main() -> None:
    """Print microseconds a call."""
    torch.set_num_threads(1)
    module = nn.LSTM(4, 4, 2, bidirectional=True, batch_first=True)
    weights, x = list(module.parameters()), torch.randn(1, 2, 4)
    native = torch.ops.fusedprompt

    def bare(operator: Any) -> Callable[[], object]:
        def call() -> object:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(x, weights, [], True)

        return call

    def ours() -> object:
        return ops.lstm(x, weights, num_layers=2)

    def stock() -> object:
        return module(x)

    apply: Any = Floor.apply
    print(f"torch {torch.__version__}; microseconds a call")
    with torch.no_grad():
        show(
            {"C++ op": bare(native.lstm_native.default), "ops.lstm, no gradients": ours, "nn.LSTM, no gradients": stock}
        )
    show(
        {
            "C++ op that keeps what backward needs": bare(native.lstm_native_forward.default),
            "empty autograd.Function of 17 tensors": lambda: apply(x, *weights),
            "ops.lstm": ours,
            "nn.LSTM": stock,
        }
    )


def show(calls: dict[str, Callable[[], object]]) -> None:
    """Measure in turns, and print."""
    for name, value in microseconds(calls).items():
        print(f"{name:40} {value:6.1f}")


if __name__ == "__main__":
    main()
