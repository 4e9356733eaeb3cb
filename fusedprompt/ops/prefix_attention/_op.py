"""What the backends of prefix_attention share: schemas, fakes, the gradient, and the meaning of their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import below_autograd, define, is_traced, not_leaf

# The log-sum-exp of no keys at all, where -inf would make NaN of differences. Scores cannot come near it, and adding it
# to one rounds the score away. Finite in bf16 too.
NOTHING = -1e30
_INPUTS = 5  # query, prefix_key, prefix_value, key, value


class Arguments(NamedTuple):
    """What a backend is called with: the public arguments, with `readers` for index, and 0 for no window or softcap."""

    query: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    key: Tensor
    value: Tensor
    readers: Tensor | None
    prefix_mask: Tensor | None
    mask: Tensor | None
    scale: float
    window: int
    softcap: float

    @property
    def group(self) -> int:
        """Queries' heads for each head of keys."""
        return self.query.shape[1] // self.key.shape[1]


def new_heads(like: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """(batch, heads, length, width), laid out as projections are: the heads of a position side by side."""
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def new_lse(like: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """(batch, heads, length) in fp32 at least, laid out like `new_heads`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(batch, length, heads, dtype=dtype).transpose(1, 2)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    given = Arguments(*args)
    batch, heads, length, _ = given.query.shape
    out = new_heads(given.query, batch, heads, length, given.value.shape[3])
    return out, new_lse(given.query, batch, heads, length)


def _backward_fake(d_out: Tensor, out: Tensor, lse: Tensor, needs: list[bool], *args: Any) -> list[Tensor]:
    return new_gradients(needs, Arguments(*args))


def new_gradients(needs: list[bool], given: Arguments) -> list[Tensor]:
    """Of each of the five inputs, or empty (0,) if it is not wanted."""
    inputs = (given.query, given.prefix_key, given.prefix_value, given.key, given.value)
    return [new_heads(one, *one.shape) if needed else one.new_empty(0) for one, needed in zip(inputs, needs)]


class _PrefixAttention(torch.autograd.Function):
    """run: (*arguments) -> out (B, Hq, T, dv), and the log-sum-exp of each query's scores (B, Hq, T), inf where it sees
    nothing. backward: (d_out, out, lse, needs, *arguments) -> five gradients, empty where not needed."""

    @staticmethod
    def forward(ctx: Any, run: Any, backward: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = run(*args)
        given = Arguments(*args)
        ctx.save_for_backward(*given[:8], out, lse)
        ctx.options, ctx.run_backward = given[8:], backward
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * (2 + len(Arguments._fields))
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: expected False, for prefix_attention has no gradient of its gradient")
        *tensors, out, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2 : 2 + _INPUTS])
        gradients = ctx.run_backward(d_out, out, lse, needs, *tensors, *ctx.options)
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs))
        return (None, None, *wanted, *(None,) * (len(Arguments._fields) - _INPUTS))


def register(
    suffix: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., list[Tensor]],
) -> Callable[..., Tensor]:
    """Register one backend's ops, `prefix_attention` + suffix and `prefix_attention_backward` + suffix; returns what is
    called. forward, backward: see `_PrefixAttention`."""
    name, backward_name = f"prefix_attention{suffix}", f"prefix_attention_backward{suffix}"
    arguments = (
        "Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor key, Tensor value, Tensor? index, "
        "Tensor? prefix_mask, Tensor? mask, float scale, int window, float softcap"
    )
    apply: Any = _PrefixAttention.apply
    define(
        f"{backward_name}(Tensor d_out, Tensor out, Tensor lse, bool[] needs, {arguments}) -> Tensor[]",
        backward,
        _backward_fake,
    )
    operator: Any = getattr(torch.ops.fusedprompt, backward_name)

    def run_backward(d_out: Tensor, *args: Any) -> Any:
        return operator(d_out, *args) if is_traced(d_out) else backward(d_out, *args)

    define(
        f"{name}({arguments}) -> (Tensor out, Tensor lse)",
        forward,
        _fake,
        lambda *args: apply(functools.partial(below_autograd, name), run_backward, *args),
    )
    differentiable: Any = getattr(torch.ops.fusedprompt, name)

    def prefix_attention(query: Tensor, prefix_key: Tensor, prefix_value: Tensor, *args: Any) -> Tensor:
        if is_traced(query):
            out: Tensor = differentiable(query, prefix_key, prefix_value, *args)[0]
        else:
            out = apply(forward, run_backward, query, not_leaf(prefix_key), not_leaf(prefix_value), *args)[0]
        return out

    return prefix_attention
