"""The reference LSTM where it borrows from PyTorch's: both sides of each choice, against the fp64 oracle.

tests/test_ops_lstm.py holds it to the claims that every backend of the op must meet.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusedprompt.ops.lstm import reference, stock
from test_ops_lstm import Shape, d_output, exact, fused, make, parts
from test_ops_lstm import stock_with_masks as nn_lstm
from tolerance import (
    Tensors,
    assert_as_accurate,
    assert_identical,
    evaluate,
    one_thread,  # noqa: F401
)

SMALL, LARGE = (2, 5, 17, 33, 2, True), (1, 3, 17, stock._SMALL_HIDDEN + 1, 2, True)
stock_forwards = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
shapes = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])


def masks_of(shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [F.dropout(torch.ones(shape[1], shape[0], 2 * shape[3], dtype=dtype), 0.4)]


@shapes
@pytest.mark.parametrize("amx", [False, True], ids=["", "amx"])
def test_bf16_reference_with_dropout_matches_fp64_oracle_whichever_backward_runs(
    shape: Shape, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "_HAS_AMX", amx)
    inputs, d_out, masks = make(shape, torch.bfloat16), d_output(shape, torch.bfloat16), masks_of(shape, torch.bfloat16)
    assert stock.has_backward(*parts(inputs)) == (shape == SMALL and not amx)
    actual = evaluate(lambda values: reference.lstm(*parts(values), masks, True), inputs, d_out)
    assert_as_accurate(actual, nn_lstm(shape, masks), exact(shape, masks), inputs, d_out)


@stock_forwards
@shapes
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_the_op_that_is_traced_has_the_bits_of_the_eager_call_and_matches_fp64_oracle(
    shape: Shape, dtype: torch.dtype, dropout: bool
) -> None:
    inputs, d_out = make(shape, dtype), d_output(shape, dtype)
    masks = masks_of(shape, dtype) if dropout else []
    actual = evaluate(lambda values: torch.ops.fusedprompt.lstm(*parts(values), masks, True), inputs, d_out)
    assert torch.equal(actual["output"], reference.lstm(*parts(inputs), masks, True))
    if not dropout:
        masks = [torch.ones_like(mask) for mask in masks_of(shape, dtype)]
    assert_as_accurate(actual, nn_lstm(shape, masks), exact(shape, masks), inputs, d_out)


@stock_forwards
@shapes
def test_reference_gives_the_same_bits_with_gradients_without_and_in_inference_mode(
    shape: Shape, dtype: torch.dtype
) -> None:
    def with_gradients(values: Tensors) -> torch.Tensor:
        return fused(shape, "reference")({name: value.requires_grad_() for name, value in values.items()})

    inputs = make(shape, dtype)
    with torch.no_grad():
        without = fused(shape, "reference")(inputs)
    with torch.inference_mode():
        inference = fused(shape, "reference")(inputs)
    assert not without.requires_grad
    assert_identical({"": with_gradients(inputs).detach()}, {"": without})
    assert torch.equal(inference, without)
