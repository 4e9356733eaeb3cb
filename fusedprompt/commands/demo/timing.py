"""How long encoding a prompt takes, against plain PyTorch with the same weights."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...methods import PromptEncoder
from ..progress import bar


class PlainEncoder(nn.Module):
    """A prompt encoder of plain `nn.Embedding`, `nn.LSTM` and `nn.Sequential`, with the weights of a given one."""

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*encoder.embedding.weight.shape)
        self.mlp_head = copy.deepcopy(encoder.mlp_head)
        self.lstm_head: nn.LSTM | None = None
        if hasattr(encoder, "lstm_head"):
            head = encoder.lstm_head
            self.lstm_head = nn.LSTM(
                head.input_size, head.hidden_size, head.num_layers, batch_first=True, bidirectional=True
            )
        self.load_state_dict(encoder.state_dict())
        self.to(encoder.embedding.weight.device)

    def encode(self) -> Tensor:
        """The prompt rows, (P, D)."""
        rows = self.embedding.weight
        if self.lstm_head is not None:
            rows = self.lstm_head(rows.unsqueeze(0))[0].squeeze(0)
        result: Tensor = self.mlp_head(rows)
        return result


def compare_encoders(encoder: PromptEncoder, rounds: int) -> dict[str, Any]:
    """Time forward and backward of one encoding, ours and plain PyTorch's, taking turns in the order A B B A.

    Returns:
        `fusedprompt_ms` and `pytorch_ms`, medians in milliseconds; `calls`, the number of calls of each; and
        `largest_difference`, relative to the largest entry, over the prompt rows and all gradients.
    """
    ours, plain = copy.deepcopy(encoder).train(), PlainEncoder(encoder)
    rows_gradient = torch.randn_like(ours.embedding.weight)
    for _ in range(5):
        _step(ours, rows_gradient)
        _step(plain, rows_gradient)
    times: dict[nn.Module, list[float]] = {ours: [], plain: []}
    for _ in bar(range(rounds), desc="timing the encoders"):
        for module in (ours, plain, plain, ours):
            _wait(rows_gradient.device)
            start = time.perf_counter()
            _step(module, rows_gradient)
            _wait(rows_gradient.device)
            times[module].append(1000 * (time.perf_counter() - start))
    differences = [_relative_difference(_step(ours, rows_gradient), _step(plain, rows_gradient))]
    for name, parameter in ours.named_parameters():
        differences.append(_relative_difference(parameter.grad, plain.get_parameter(name).grad))
    return {
        "fusedprompt_ms": statistics.median(times[ours]),
        "pytorch_ms": statistics.median(times[plain]),
        "calls": 2 * rounds,
        "largest_difference": max(differences),
    }


def backends(encoder: PromptEncoder) -> dict[str, dict[str, str]]:
    """What `fusedprompt.explain` says about each op that this encoder's prompt passes through."""
    rows = encoder.embedding.weight
    arguments = {"lstm": rows.unsqueeze(0), "mlp": rows, "splice": rows}
    if not hasattr(encoder, "lstm_head"):
        del arguments["lstm"]
    return {op: ops.explain(op, argument) for op, argument in arguments.items()}


def _step(encoder: PromptEncoder | PlainEncoder, rows_gradient: Tensor) -> Tensor:
    encoder.zero_grad()
    rows = encoder.encode()
    torch.autograd.backward(rows, rows_gradient)
    return rows


def _relative_difference(ours: Tensor | None, plain: Tensor | None) -> float:
    assert ours is not None and plain is not None
    return float(((ours - plain).abs().max() / plain.abs().max()).detach())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
