"""P-tuning: a prompt encoder."""

from __future__ import annotations

import enum
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..base import check
from ..ops import _native
from .config import PeftType, PromptLearningConfig, as_config, as_enum, check_count, check_number
from .method import Method, Part, PeftEncoder, register_method
from .module import PromptModule


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The networks that can stand between the prompt embedding and the base model in P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (Liu et al., arXiv 2103.10385); PEFT class `PromptEncoderConfig`.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: hidden width of the encoder; None takes `token_dim`.
        encoder_num_layers: hidden layers of the MLP, or layers of the LSTM; 2 is PEFT's MLP.
        encoder_dropout: dropout after each hidden ReLU (MLP) or between layers (LSTM), in training, in [0, 1).
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    method: ClassVar[PeftType | str | None] = PeftType.P_TUNING

    def validate(self) -> None:
        super().validate()
        field, kind = "encoder_reparameterization_type", PromptEncoderReparameterizationType
        self.encoder_reparameterization_type = as_enum(kind, field, self.encoder_reparameterization_type)
        check_count("encoder_hidden_size", self.encoder_hidden_size)
        if self.encoder_num_layers is None:
            raise TypeError("encoder_num_layers: expected a positive int, got None")
        check_count("encoder_num_layers", self.encoder_num_layers)
        check_number("encoder_dropout", self.encoder_dropout, 0.0, 1.0, "a number in [0, 1)")

    def resolved(self, base_config: Any, **overrides: Any) -> PromptEncoderConfig:
        filled = super().resolved(base_config, **overrides)
        if filled.encoder_hidden_size is None:
            filled.encoder_hidden_size = filled.token_dim
        return filled


class LSTMHead(nn.RNNBase):
    """The parameters of an `nn.LSTM`, under its names and with its initialisation, run by `ops.lstm`.

    Not an `nn.LSTM`: torch.compile refuses to trace anything that touches one (`torch._dynamo.config.allow_rnn`).
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float) -> None:
        # nn.RNNBase warns about dropout that has no layer to act between.
        dropout = dropout if num_layers > 1 else 0.0
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("LSTM", *sizes, batch_first=True, dropout=dropout, bidirectional=True)

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        """(B, P, D) to (B, P, 2H), as the first item of a pair, where `nn.LSTM` has it."""
        return run_lstm(self, rows), None


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
        config = as_config(config, PromptEncoderConfig)
        super().__init__(config)
        self.input_size = self.output_size = self.token_dim
        self.hidden_size = config.encoder_hidden_size or self.token_dim
        self.encoder_type = PromptEncoderReparameterizationType(config.encoder_reparameterization_type)
        self.dropout = config.encoder_dropout
        if config.inference_mode:
            return
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            if (reason := _native.WHY_NOT_CPU) is not None:  # pip hides what the build said, and shows this once
                warnings.warn(f"P-tuning's LSTM runs without its compiled kernels: it {reason}", stacklevel=2)
            self.lstm_head = LSTMHead(self.input_size, self.hidden_size, config.encoder_num_layers, self.dropout)
            sizes = [2 * self.hidden_size, 2 * self.hidden_size, self.output_size]
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
        check.tensor("indices", indices, "(B, P)", 2)
        check.token_ids("indices", indices)
        if not indices.numel():
            return self.embedding.weight.new_empty(*indices.shape, self.token_dim)
        distinct, which = indices, None
        if indices.shape[0] > 1 and not torch.compiler.is_compiling():
            distinct, which = torch.unique(indices, dim=0, return_inverse=True)
        rows = torch.stack([self._encode(self.embedding(sequence)) for sequence in distinct.unbind(0)])
        return rows if which is None else rows[which]

    def _encode(self, rows: Tensor) -> Tensor:
        dropout = self.dropout
        if self.encoder_type is PromptEncoderReparameterizationType.LSTM:
            rows = self.lstm_head(rows.unsqueeze(0))[0].squeeze(0)
            dropout = 0.0  # PEFT's LSTM encoder has none in its head
        return run_mlp(self.mlp_head, rows, dropout, self.training)


def run_lstm(lstm: Any, rows: Tensor) -> Tensor:
    """(B, P, D) to (B, P, 2H): `ops.lstm` with the weights of an `nn.LSTM` or an `LSTMHead`."""
    return ops.lstm(
        rows,
        [getattr(lstm, name) for names in lstm._all_weights for name in names],
        num_layers=lstm.num_layers,
        bidirectional=lstm.bidirectional,
        dropout=float(lstm.dropout),
        training=lstm.training,
    )


def run_mlp(
    head: nn.Sequential, rows: Tensor, dropout: float = 0.0, training: bool = False, activation: str = "relu"
) -> Tensor:
    """(P, H) to (P, D): `ops.mlp` with the weights of a `Sequential` of Linear and ReLU or Tanh."""
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    return ops.mlp(rows, weights, biases, activation=activation, dropout=dropout, training=training)


def _uses_lstm(encoder: nn.Module) -> bool:
    return "lstm_head" in encoder._modules


def _parts(encoder: Any) -> Iterator[Part]:
    yield "mlp_head", encoder.mlp_head, nn.Sequential
    for index, layer in enumerate(encoder.mlp_head):
        yield f"mlp_head.{index}", layer, nn.ReLU if index % 2 else nn.Linear
    if _uses_lstm(encoder):
        yield "lstm_head", encoder.lstm_head, nn.LSTM


def _run_peft(encoder: Any, indices: Tensor) -> Tensor:
    rows = encoder.embedding(indices)
    if _uses_lstm(encoder):
        rows = run_lstm(encoder.lstm_head, rows)
    return run_mlp(encoder.mlp_head, rows[0])


register_method(
    Method(
        PromptEncoderConfig,
        lambda config, word_embeddings: PromptEncoder(config),
        ops=lambda encoder: ("lstm", "mlp") if _uses_lstm(encoder) else ("mlp",),
        peft=PeftEncoder("PromptEncoder", _parts, _run_peft),
    )
)
