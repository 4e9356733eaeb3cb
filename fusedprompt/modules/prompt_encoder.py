"""P-tuning's prompt encoder."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PromptEncoderConfig, PromptEncoderReparameterizationType, as_config
from ..ops import _check
from ._base import PromptModule


class LSTMHead(nn.RNNBase):
    """The parameters of an `nn.LSTM`, under its names and with its initialisation, run by `ops.lstm`.

    Not an `nn.LSTM`: torch.compile refuses to trace anything that touches one (`torch._dynamo.config.allow_rnn`).
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float) -> None:
        # nn.RNNBase warns about dropout that has no layer to act between.
        dropout = dropout if num_layers > 1 else 0.0
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, batch_first=True, dropout=dropout, bidirectional=True
        )

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        """(B, P, D) to (B, P, 2H), as the first item of a pair, where `nn.LSTM` has it."""
        weights = [getattr(self, name) for names in self._all_weights for name in names]
        output = ops.lstm(
            rows,
            weights,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
        )
        return output, None


class PromptEncoder(PromptModule):
    """Prompt rows passed through an MLP or a bidirectional LSTM with an MLP head (arXiv 2103.10385).

    PEFT class `PromptEncoder`: the same attributes, parameter names, shapes and initialisation for the same seed.
    Beyond PEFT, `encoder_num_layers` sets the MLP's number of hidden layers (2 is PEFT's head) and `encoder_dropout`
    applies after each hidden ReLU in training.

    Attributes:
        embedding: `nn.Embedding` (R, D).
        mlp_head: `nn.Sequential` of Linear and ReLU; absent in inference mode.
        lstm_head: `LSTMHead` with nn.LSTM's parameters (D to H, bidirectional, batch first); only for the LSTM encoder,
            absent in inference mode.

    Args:
        config: `PromptEncoderConfig` with `token_dim` and `num_virtual_tokens`; an `encoder_hidden_size` of None is D.
    """

    mlp_head: nn.Sequential
    lstm_head: LSTMHead

    def __init__(self, config: Any) -> None:
        config = as_config(config)
        if not isinstance(config, PromptEncoderConfig):
            raise TypeError(f"config: expected a PromptEncoderConfig, got {type(config).__name__}")
        super().__init__(config)
        self.input_size = self.output_size = self.token_dim
        self.hidden_size = config.encoder_hidden_size or self.token_dim
        self.encoder_type = PromptEncoderReparameterizationType(config.encoder_reparameterization_type)
        self.dropout = config.encoder_dropout
        if config.inference_mode:
            return
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = LSTMHead(
                self.input_size, self.hidden_size, config.encoder_num_layers, config.encoder_dropout
            )
            width = 2 * self.hidden_size
            sizes = [width, width, self.output_size]
        else:
            sizes = [self.input_size, *[self.hidden_size] * config.encoder_num_layers, self.output_size]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def encode(self) -> Tensor:
        """The prompt rows (R, D): the whole table through the encoder, once."""
        if self.inference_mode:
            return self.embedding.weight
        return self._encode(self.embedding.weight)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Prompt rows for `indices` (B, P) in [0, R), as (B, P, D); without indices, `encode()`.

        An LSTM reads the sequence that `indices` spells, so each different sequence is encoded by itself, once.
        """
        if indices is None or self.inference_mode or self.encoder_type is PromptEncoderReparameterizationType.MLP:
            return super().forward(indices)
        _check.tensor("indices", indices, "(B, P)", 2)
        _check.token_ids("indices", indices)
        if not indices.numel():
            return self.embedding.weight.new_empty(*indices.shape, self.token_dim)
        if indices.shape[0] == 1 or torch.compiler.is_compiling():
            distinct, which = indices, None
        else:
            distinct, which = torch.unique(indices, dim=0, return_inverse=True)
        encoded = [self._encode(self.embedding(sequence)) for sequence in distinct.unbind(0)]
        rows = torch.stack(encoded)
        return rows if which is None else rows[which]

    def _encode(self, rows: Tensor) -> Tensor:
        linears = [layer for layer in self.mlp_head if isinstance(layer, nn.Linear)]
        dropout = self.dropout
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            rows = self.lstm_head(rows.unsqueeze(0))[0].squeeze(0)
            dropout = 0.0  # PEFT's LSTM encoder has none in its head
        return ops.mlp(
            rows,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            dropout=dropout,
            training=self.training,
        )
