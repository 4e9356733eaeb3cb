"""Run each kernel once on small odd shapes, for tools that slow everything down, such as compute-sanitizer."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from fusedprompt import Layout, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_()


def run_triton() -> None:
    """Forward and backward of the MLP, of the splice and of the head's loss, in each dtype and kind of layout."""
    for dtype in DTYPES:
        for rows, width, hidden in ((1, 1, 1), (7, 33, 17), (20, 64, 96), (32, 16, 48)):
            x, table = draw(rows, width, dtype=dtype), draw(11, width, dtype=dtype)
            weights = [draw(hidden, width, dtype=dtype), draw(width, hidden, dtype=dtype)]
            biases = [draw(hidden, dtype=dtype), draw(width, dtype=dtype)]
            prompt = ops.mlp(x, weights, biases, dropout=0.5, training=True, backend="triton")
            ids = torch.randint(-1, 12, (3, 9), device="cuda")
            for slots in (None, torch.randint(-rows, 9, (3, 13), device="cuda")):
                batch = ops.splice_batch(
                    prompt, Layout(rows, slots), input_ids=ids, table=table, labels=ids, backend="triton"
                )
                batch.inputs_embeds.nan_to_num().sum().backward(retain_graph=True)
            labels = torch.randint(-1, 12, (rows,), device="cuda")  # the last is out of range
            head = table.detach()
            ops.head_loss(prompt, head, labels, soft_cap=2.0, backend="triton").backward(retain_graph=True)
    with torch.autocast("cuda", torch.bfloat16):
        for rows, width in ((63, 48), (128, 33)):
            x, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((rows, width), (width, width), (width,)))
            ops.mlp(x, [weight, weight], [bias, bias], backend="triton").sum().backward()


def run_lstm() -> None:
    """Forward and backward of the LSTM in each variant that fits this GPU. B, P, D, H, layers, bidirectional."""
    small = ((1, 4, 8, 33, 2, True), (3, 3, 5, 7, 1, True))
    large = ((1, 2, 8, 4099, 1, False),)  # 134 MB in two bytes: more than any chip holds
    for variant, shapes in (("S", small), ("M", small), ("L", large), ("STREAM", small)):
        if variant == "S" and torch.cuda.get_device_capability()[0] < 9:
            continue  # no clusters
        os.environ["FUSEDPROMPT_LSTM_VARIANT"] = variant
        for dtype in DTYPES:
            for batch, steps, width, hidden, layers, bidirectional in shapes:
                weights, inputs = [], width
                for _ in range(layers):
                    for _ in range(1 + bidirectional):
                        weights += [draw(4 * hidden, inputs, dtype=dtype), draw(4 * hidden, hidden, dtype=dtype)]
                        weights += [draw(4 * hidden, dtype=dtype), draw(4 * hidden, dtype=dtype)]
                    inputs = hidden * (1 + bidirectional)
                x = draw(batch, steps, width, dtype=dtype)
                out = ops.lstm(x, weights, num_layers=layers, bidirectional=bidirectional, backend="native")
                out.sum().backward()
                torch.cuda.synchronize()
                print(f"LSTM {variant} {dtype} H={hidden}", flush=True)


def main() -> None:
    """Run the parts named on the command line, or all."""
    parts = {"triton": run_triton, "lstm": run_lstm}
    for name in sys.argv[1:] or parts:
        parts[name]()
        torch.cuda.synchronize()
        print(f"{name}: every kernel ran", flush=True)


if __name__ == "__main__":
    main()
