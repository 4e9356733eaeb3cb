"""What sanitize_lstm.sh runs: small LSTMs of each dtype whose sizes get different variants, forward and backward."""

from __future__ import annotations

import torch

import test_ops_lstm as cases

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((1, 4, 8, 33, 2, True), (3, 3, 5, 7, 1, True), (1, 3, 8, 521, 1, True), (1, 2, 8, 2309, 1, False)):
        inputs = {name: value.cuda().requires_grad_() for name, value in cases.make(shape, dtype).items()}
        out = cases.fused(shape, "native")(inputs)
        torch.autograd.grad(out, list(inputs.values()), cases.d_output(shape, dtype).cuda())
        torch.cuda.synchronize()
