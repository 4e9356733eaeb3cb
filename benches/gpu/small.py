"""Run each kernel once on small odd shapes, for tools that slow everything down, such as compute-sanitizer."""

from __future__ import annotations

import functools
import os
import sys

import torch
from torch import Tensor

from fusedprompt import Layout, ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # where Triton's interpreter and the LSTM for CPU show that this file works
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if ON_GPU else (torch.float32,)
# P, D and H. The interpreter, which other tests look after, gets the odd one.
SIZES = ((1, 1, 1), (7, 33, 17), (20, 64, 96), (32, 16, 48)) if ON_GPU else ((7, 33, 17),)
ATTENTIONS = ((1, 7, 5, None), (19, 33, 24, None), (9, 17, 80, [1, -1, 0]))[0 if ON_GPU else 2 :]  # T, N, d, index
VARIANTS = ("S", "M", "STREAM", "L")


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_()


def run_triton() -> None:
    """Forward and backward of MLP, splice, the head's loss, CPT and attention, in each dtype and kind of layout."""
    for dtype in DTYPES:
        for rows, width, hidden in SIZES:
            x, table = draw(rows, width, dtype=dtype), draw(11, width, dtype=dtype)
            weights = [draw(hidden, width, dtype=dtype), draw(width, hidden, dtype=dtype)]
            biases = [draw(hidden, dtype=dtype), draw(width, dtype=dtype)]
            prompt = ops.mlp(x, weights, biases, dropout=0.5, training=True, backend="triton")
            ids = torch.randint(-1, 12, (3, 9), device=DEVICE)
            for slots in (None, torch.randint(-rows, 9, (3, 13), device=DEVICE)):
                batch = ops.splice_batch(
                    prompt, Layout(rows, slots), input_ids=ids, table=table, labels=ids, backend="triton"
                )
                batch.inputs_embeds.nan_to_num().sum().backward(retain_graph=True)
            labels = torch.randint(-1, 12, (rows,), device=DEVICE)  # the last is out of range
            head = table.detach()
            ops.head_loss(prompt, head, labels, soft_cap=2.0, backend="triton").backward(retain_graph=True)
            limits = torch.ones(rows, device=DEVICE), torch.arange(rows, device=DEVICE) % 2 == 0
            ops.cpt(x.detach(), x, *limits, backend="triton")[0].sum().backward()
        for length, prefix, width, index in ATTENTIONS:
            count = 1 if index is None else 2
            query, *own = (draw(3, heads, length, width, dtype=dtype) for heads in (4, 2, 2))
            keys, values = (draw(count, 2, prefix, width, dtype=dtype) for _ in range(2))
            ops.prefix_attention(
                query, keys, values, *own,
                index=None if index is None else torch.tensor(index, device=DEVICE),
                mask=torch.rand(3, length, device=DEVICE) > 0.5,
                window=prefix + 3, softcap=None if index is None else 3.0, backend="triton",
            ).sum().backward()  # fmt: skip
    for rows, width, hidden, outputs in ((3, 5, 33, 16417), (20, 16, 64, 18432)):  # keys and values of all layers
        shapes = (rows, width), (hidden, width), (hidden,), (outputs, hidden), (outputs,)
        x, *layers = (draw(*shape, dtype=torch.float32) for shape in (shapes if ON_GPU else shapes[:3]))
        ops.mlp(x, layers[::2], layers[1::2], activation="tanh", backend="triton").sum().backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        for rows, width in ((63, 48), (128, 33))[: 2 if ON_GPU else 1]:
            x, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((rows, width), (width, width), (width,)))
            ops.mlp(x, [weight, weight], [bias, bias], backend="triton").sum().backward()


def run_lstm(variant: str) -> None:
    """Forward and backward of the LSTM in one variant. B, P, D, H, layers, bidirectional."""
    shapes = ((1, 4, 8, 33, 2, True), (3, 3, 5, 7, 1, True))
    if variant == "L" and ON_GPU:
        shapes = ((1, 2, 8, 3073, 1, False),)  # 75 MB in two bytes: more than any chip holds
    if variant == "S" and ON_GPU and torch.cuda.get_device_capability()[0] < 9:
        print("LSTM S: no clusters on this GPU")
        return
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
            synchronize()
            print(f"LSTM {variant} {dtype} H={hidden}", flush=True)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    """Run the parts named on the command line, or all."""
    parts = {"triton": run_triton, **{f"lstm-{name}": functools.partial(run_lstm, name) for name in VARIANTS}}
    for name in sys.argv[1:] or parts:
        parts[name]()
        synchronize()
        print(f"{name}: every kernel ran", flush=True)


if __name__ == "__main__":
    main()
