"""What sanitize_lstm.sh runs: small LSTMs of each dtype in each variant that fits this GPU, forward and backward."""

from __future__ import annotations

import os

import torch

import test_ops_lstm as cases

SMALL = ((1, 4, 8, 33, 2, True), (3, 3, 5, 7, 1, True))
LARGE = ((1, 2, 8, 4099, 1, False),)  # in two bytes 134 MB, more than any chip holds

for variant, shapes in (("S", SMALL), ("M", SMALL), ("L", LARGE), ("STREAM", SMALL)):
    if variant == "S" and torch.cuda.get_device_capability()[0] < 9:
        continue
    os.environ["FUSEDPROMPT_LSTM_VARIANT"] = variant
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in shapes:
            inputs = {name: value.cuda().requires_grad_() for name, value in cases.make(shape, dtype).items()}
            out = cases.fused(shape, "native")(inputs)
            torch.autograd.grad(out, list(inputs.values()), cases.d_output(shape, dtype).cuda())
            torch.cuda.synchronize()
            print(variant, dtype, shape, flush=True)
