"""The `fusedprompt` operator library: op schemas are defined once, and gradients attached in one way.

`define` + `impl` + `autograd.Function` costs 4-5 us per call on the host; `torch.library.custom_op` with
`register_autograd` costs 11 us (measured on a 2-core CPU machine, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Tensors = Sequence[Tensor]  # what a schema calls Tensor[]
LIBRARY: Any = torch.library.Library("fusedprompt", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
) -> None:
    """Register an op that is opaque to autograd and to `torch.compile`.

    schema: as in `torch.library.Library.define`.
    implementation: runs on every device.
    fake: the same signature, on tensors without data.
    differentiable: the op with its gradient: the same arguments, passed on to an `autograd.Function` whose forward
        calls the op `below_autograd`.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedprompt::{name}", fake, lib=LIBRARY)
    if differentiable is not None:
        LIBRARY.impl(name, differentiable, "Autograd")


def below_autograd(name: str, *args: Any) -> Any:
    """Call an op of this library without recording a graph, from within an `autograd.Function`."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.fusedprompt, name)(*args)


def is_traced(tensor: Tensor) -> bool:
    """Whether a call must go through the dispatcher, because someone else wants to see it: `torch.compile`, a dispatch
    mode, a functorch transform, a tensor subclass. Otherwise it need not, which saves about 15 us of host time.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def not_leaf(tensor: Tensor) -> Tensor:
    """A view of a parameter that is trained, for an `autograd.Function`; any other tensor as it is.

    Threads that train one parameter could stop each other for ever: a function of Python's takes a leaf's lock (to make
    its gradient accumulator) while it holds the interpreter's, and PyTorch's own ops take them the other way round
    (torch 2.13; tests/test_threads.py).
    """
    return tensor.view_as(tensor) if tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled() else tensor
