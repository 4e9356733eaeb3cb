"""The check of each op and its gradients against PyTorch's own operators, or the formula, in fp64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import ops


def sample(device: str) -> dict[str, tuple[Any, ...]]:
    """Small arguments for each op, in the order its backends take them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device)

    ids = torch.randint(0, 11, (2, 4), generator=generator).to(device)
    lstm_weights = [draw(12, 5), draw(12, 3), draw(12), draw(12)] * 2
    radius, trainable = torch.tensor([0.1, 9.0, 0.5], device=device), torch.tensor([True, False, True], device=device)
    return {
        "mlp": (draw(4, 5), [draw(6, 5), draw(5, 6)], [draw(6), draw(5)], []),
        "lstm": (draw(1, 4, 5), lstm_weights, [], True),
        "splice": (draw(3, 5), None, ids, draw(11, 5), None, [], []),
        "cpt": (draw(3, 5), draw(3, 5), radius, trainable),
        "head_loss": (draw(4, 5), draw(11, 5), draw(11), torch.tensor([3, -100, 0, 10], device=device), None),
    }


def _mlp(x: Tensor, weights: list[Tensor], biases: list[Tensor], _: Any) -> Tensor:
    for weight, bias in zip(weights[:-1], biases[:-1]):
        x = F.linear(x, weight, bias).relu()
    return F.linear(x, weights[-1], biases[-1])


def _lstm(x: Tensor, weights: list[Tensor], _: Any, bidirectional: bool) -> Tensor:
    begin = x.new_zeros(2, x.shape[0], weights[1].shape[1])
    return torch.lstm(x, (begin, begin), weights, True, 1, 0.0, False, bidirectional, True)[0]


def _splice(prompt: Tensor, _: Any, ids: Tensor, table: Tensor, *__: Any) -> Tensor:
    return torch.stack([torch.cat((prompt, table[row])) for row in ids])


def _cpt(embedding: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor) -> Tensor:
    scale = torch.minimum(torch.ones_like(epsilon), epsilon / delta.norm(dim=1)).detach()[:, None]
    # The gradient goes to delta as if there were no projection, where it is trainable.
    moved = torch.where(trainable[:, None], delta, delta.detach())
    return embedding.detach() + (delta * scale).detach() + moved - moved.detach()


def _head_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, _: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight.detach(), bias.detach()), labels, reduction="sum")


_FORMULAS: dict[str, Any] = {"mlp": _mlp, "lstm": _lstm, "splice": _splice, "cpt": _cpt, "head_loss": _head_loss}


def compare(name: str, backend: str, arguments: tuple[Any, ...]) -> str:
    """ "ok", or what differs."""
    call: Any = next(candidate for candidate in ops.OPS[name].backends if candidate.name == backend).call
    actual = _with_gradients(call, arguments, None, torch.float32)
    expected = _with_gradients(_FORMULAS[name], arguments, "cpu", torch.float64)
    for index, (found, right) in enumerate(zip(actual, expected)):
        error = (found.detach().cpu().double() - right.detach()).abs().max().item()
        if not error <= 1e-4 * max(1.0, right.abs().max().item()):  # also true for NaN
            return f"{'output' if index == 0 else f'gradient {index}'} differs from the formula by {error:.1e}"
    return "ok"


def _with_gradients(call: Any, arguments: tuple[Any, ...], device: str | None, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradient of each floating-point argument under a weighted sum."""

    def leaf(value: Tensor) -> Tensor:
        floats = value.is_floating_point()
        moved = value.detach().to(device or value.device, dtype if floats else value.dtype, copy=True)
        return moved.requires_grad_(floats)

    given = tree_map_only(Tensor, leaf, list(arguments))
    inputs = [value for value in tree_leaves(given) if isinstance(value, Tensor) and value.requires_grad]
    output = call(*given)
    output = output[0] if isinstance(output, tuple) else output
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    found = torch.autograd.grad((output * weight).sum(), inputs, materialize_grads=True, allow_unused=True)
    return [output, *found]
