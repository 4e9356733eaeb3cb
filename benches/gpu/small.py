"""Run each kernel once on small odd shapes, for tools that slow everything down: `compute-sanitizer ... this`."""

from __future__ import annotations

import torch

from fusedprompt import Layout, ops


def main() -> None:
    """Forward and backward of the MLP and of the splice, in each dtype and kind of layout."""
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, width, hidden in ((1, 1, 1), (7, 33, 17), (20, 64, 96), (130, 16, 48)):
            x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
            weights = [
                torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
                for shape in ((hidden, width), (width, hidden))
            ]
            biases = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in (hidden, width)]
            prompt = ops.mlp(x, weights, biases, dropout=0.5, training=True, backend="triton")
            table = torch.randn(11, width, device=device, dtype=dtype, requires_grad=True)
            ids = torch.randint(-1, 12, (3, 9), device=device)
            for slots in (None, torch.randint(-rows, 9, (3, 13), device=device)):
                batch = ops.splice_batch(
                    prompt, Layout(rows, slots), input_ids=ids, table=table, labels=ids, backend="triton"
                )
                batch.inputs_embeds.nan_to_num().sum().backward(retain_graph=True)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
