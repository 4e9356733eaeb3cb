"""The doctor's check of every op: small arguments, and a formula that shares no code with the op."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops


def devices() -> list[str]:
    """The CPU and every CUDA device."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def samples(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """The formula of each op, and behind it small arguments in the order its backends take them, always the same.

    A second word tells two samples of an op from each other.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
        return values.to(device, dtype).requires_grad_()

    ids = torch.randint(0, 11, (2, 4), generator=generator, device="cpu").to(device)
    lstm_weights = [draw(*shape) for _ in range(2) for shape in ((12, 5), (12, 3), (12,), (12,))]
    epsilon = torch.tensor([0.1, 9.0, 0.5], device=device, dtype=dtype, requires_grad=True)
    trainable = torch.tensor([True, False, True], device=device)
    labels = torch.tensor([3, -100, 0, 10], device=device)
    prefix, own = [draw(1, 1, 3, 8), draw(1, 1, 3, 8)], [draw(2, 1, 4, 8), draw(2, 1, 4, 8)]
    perceptron: tuple[Any, ...] = (_mlp, draw(4, 5), [draw(6, 5), draw(5, 6)], [draw(6), draw(5)], [])
    return {
        "mlp": perceptron,
        "mlp tanh": (*perceptron, "tanh"),
        "lstm": (_lstm, draw(1, 4, 5), lstm_weights, [], True),
        "splice": (_splice, draw(3, 5), None, ids, draw(11, 5), None, [], []),
        "cpt": (_cpt, draw(3, 5), draw(3, 5), epsilon, trainable),
        "head_loss": (_head_loss, draw(4, 5), draw(11, 5), draw(11), labels, None),
        "prefix_attention": (_prefix_attention, draw(2, 2, 4, 8), *prefix, *own, None, None, None, 0.3, 0, 0.0),
    }


def check_all() -> dict[str, Any]:
    """Each op and its gradients, on each device and backend that runs, against the formula in fp64 on the CPU."""
    results: dict[str, Any] = {}
    exact = samples("cpu", torch.float64)
    for device in devices():
        for name, (_, *arguments) in samples(device).items():
            for backend in ops.OPS[name.split()[0]].backends:
                if backend.why_not(*arguments) is None:
                    try:
                        with _ieee_products():
                            result = _compare(_differentiate(backend.call, *arguments), _differentiate(*exact[name]))
                    except Exception:  # the others shall be checked whatever is broken
                        result = traceback.format_exc().strip().splitlines()[-1]
                    results[f"{name} {backend.name} on {device}"] = result
    return results


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """On a GPU cuDNN takes TF32 unless it is told not to: a right LSTM, 5e-4 away from the truth, would look wrong."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value


def _differentiate(function: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    """The output, and the gradient for each floating argument."""
    result = function(*arguments)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    flat = [item for value in arguments for item in (value if isinstance(value, list) else [value])]
    inputs = [item for item in flat if isinstance(item, Tensor) and item.requires_grad]
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), inputs, materialize_grads=True)]


def _compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """ "ok", or what differs."""
    for index, (found, right) in enumerate(zip(actual, expected)):
        error = (found.detach().cpu().double() - right.detach()).abs().max().item()
        if not error <= 1e-4 * max(1.0, right.abs().max().item()):  # also true for NaN
            return f"{'output' if index == 0 else f'gradient {index}'} differs from the formula by {error:.1e}"
    return "ok"


def _mlp(x: Any, weights: Any, biases: Any, _: Any, activation: str = "relu") -> Any:
    for weight, bias in zip(weights[:-1], biases[:-1]):
        x = x @ weight.T + bias
        x = 2 / (1 + torch.exp(-2 * x)) - 1 if activation == "tanh" else x.clamp(min=0)
    return x @ weights[-1].T + biases[-1]


def _lstm(x: Any, weights: Any, *_: Any) -> Any:
    begin = x.new_zeros(2, x.shape[0], weights[1].shape[1])  # bidirectional, one layer, batch first, no dropout
    return torch.lstm(x, (begin, begin), weights, True, 1, 0.0, False, True, True)[0]


def _splice(prompt: Any, slots: Any, ids: Any, table: Any, *_: Any) -> Any:
    return torch.stack([torch.cat((prompt, table[row])) for row in ids])


def _cpt(embedding: Any, delta: Any, epsilon: Any, trainable: Any) -> Any:
    scale = torch.minimum(torch.ones_like(epsilon), epsilon / delta.norm(dim=1)).detach()[:, None]
    # The gradient goes to delta as if there were no projection, where it is trainable.
    moved = torch.where(trainable[:, None], delta, delta.detach())
    return embedding.detach() + (delta * scale).detach() + moved - moved.detach()


def _head_loss(hidden: Any, weight: Any, bias: Any, labels: Any, _: Any) -> Any:
    logits = hidden @ weight.detach().T + bias.detach()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def _prefix_attention(query: Any, prefix_key: Any, prefix_value: Any, key: Any, value: Any, *rest: Any) -> Any:
    rows, prefix_length = query.shape[0], prefix_key.shape[2]
    keys, values = (
        torch.cat((a.expand(rows, -1, -1, -1), b), 2) for a, b in ((prefix_key, key), (prefix_value, value))
    )
    scores = query @ keys.mT * rest[3]  # one head of keys, which all heads of queries read
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(prefix_length + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(3) @ values
