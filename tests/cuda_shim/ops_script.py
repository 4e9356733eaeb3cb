"""Run by test_lstm_cuda_ops.py in a process of its own; the argument is csrc/lstm_cuda.cu, built for CPU tensors."""

from __future__ import annotations

import os
import sys

import torch

import test_ops_lstm as cases
from fusedprompt.ops.lstm import native  # noqa: F401  (the schemas)
from tolerance import Tensors, assert_as_accurate, assert_identical, bytes_hold, evaluate, generator

torch.ops.load_library(sys.argv[1])
torch.set_num_threads(1)


def run(shape: cases.Shape, masks: list[torch.Tensor]) -> cases.Any:
    def call(inputs: Tensors) -> torch.Tensor:
        x, weights = cases.parts(inputs)
        return torch.ops.fusedprompt.lstm_native(x, weights, masks, shape[5])

    return call


for dtype, variant in ((torch.float32, "M"), (torch.bfloat16, ""), (torch.bfloat16, "STREAM")):
    os.environ["FUSEDPROMPT_LSTM_VARIANT"] = variant
    for shape in ((1, 5, 7, 9, 2, True), (3, 4, 5, 6, 2, True), (2, 1, 3, 4, 1, True), (1, 6, 3, 5, 2, False)):
        inputs, d_out = cases.make(shape, dtype), cases.d_output(shape, dtype)
        actual = evaluate(run(shape, []), inputs, d_out)
        assert_as_accurate(actual, cases.stock(shape), cases.exact(shape), inputs, d_out, neighbours=3)
        for byte in (0xFF, 0x00, None):
            with bytes_hold(byte, "CPU"):
                assert_identical(evaluate(run(shape, []), inputs, d_out), actual)
        with torch.no_grad():
            assert torch.equal(run(shape, [])(inputs), actual["output"])

    shape = (2, 4, 5, 6, 3, True)
    inputs, d_out = cases.make(shape, dtype), cases.d_output(shape, dtype)
    masks = [torch.bernoulli(torch.full((4, 2, 12), 0.6), generator=generator(layer)).div(0.6) for layer in range(2)]
    masks = [mask.to(dtype) for mask in masks]
    actual = evaluate(run(shape, masks), inputs, d_out)
    assert_as_accurate(
        actual, cases.stock_with_masks(shape, masks), cases.exact(shape, masks), inputs, d_out, neighbours=3
    )

for name, value, message in (
    ("VARIANT", "S", "expected one that fits this GPU, got S"),
    ("VARIANT", "XL", "expected S, M, L or STREAM, got XL"),
    ("L2_MB", "much", "FUSEDPROMPT_LSTM_L2_MB: expected a number of megabytes, got much"),
):
    os.environ["FUSEDPROMPT_LSTM_VARIANT"] = ""
    os.environ[f"FUSEDPROMPT_LSTM_{name}"] = value
    try:
        run(shape, masks)(inputs)
    except Exception as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{name}={value} ran")
