"""Tiles of the MLP encoder's kernels, chosen by the sizes alone, so that a choice is the same in every run.

Compiled ahead of time for sm_80, sm_90 and sm_100, none of them spills or takes more than 99 KB of shared memory. One
exception: the backward of more than 128 rows, at widths that are not multiples of 16, spills up to 170 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from .._triton import next_power_of_2
from ._kernels import linear_backward, linear_forward


def _tile(block_p: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def block_rows(rows: int, precision: str) -> int:
    """Prompt rows of a tile. Tensor cores do 32 rows in the time of fewer; exact products cost what they are."""
    return max(16 if precision == "ieee" else 32, next_power_of_2(rows))


def _is_aligned(inputs: int, outputs: int) -> bool:
    """Whether all rows of the weight and of the activations start on 16-byte boundaries, so that loads can be wide."""
    return inputs % 16 == 0 and outputs % 16 == 0


@functools.cache  # 5 us otherwise, at each launch
def forward_config(rows: int, inputs: int, outputs: int, itemsize: int, precision: str) -> dict[str, int]:
    """Tile of `linear_forward`: enough programs to fill ~132 SMs, and 16 to 48 KB of weights in flight in each.

    itemsize: bytes of the wider of the kernel's two operands in memory.
    """
    block_p = block_rows(rows, precision)
    if not _is_aligned(inputs, outputs):
        return _tile(block_p, 16, 64 // itemsize, 8 if block_p >= 128 else 4, 2)
    block_n = 16 if outputs <= 132 * 16 else 32 if outputs <= 132 * 32 else 64
    num_stages = 4
    if block_p <= 32:
        # Fused multiply-adds hold operands in registers.
        row_bytes = 512 if block_n == 16 else 128 if block_n == 64 and precision == "ieee" else 256
    else:
        row_bytes = 128 if block_p <= 128 else 64
        block_n = max(block_n, 32) if block_p == 64 else 64
        num_stages = 6 if block_n == 32 else 4
    num_warps = 8 if block_p >= 128 or (precision == "ieee" and block_p * block_n >= 4096) else 4
    return _tile(block_p, block_n, row_bytes // itemsize, num_warps, num_stages)


# BLOCK_N, num_warps and num_stages by BLOCK_P and BLOCK_K, for products of 16-bit numbers, in TF32 and in IEEE fp32:
# the largest tiles that do not spill.
_BACKWARD_HALF = {
    (32, 16): (128, 4, 4),
    (32, 32): (128, 4, 4),
    (64, 16): (64, 8, 4),
    (64, 32): (64, 8, 4),
    (128, 32): (64, 8, 3),
    (256, 32): (32, 8, 3),
}
_BACKWARD_TF32 = {
    (32, 16): (64, 4, 4),
    (32, 32): (64, 4, 4),
    (64, 16): (64, 8, 4),
    (64, 32): (64, 8, 4),
    (128, 32): (32, 8, 3),
    (256, 16): (16, 8, 3),
}
_BACKWARD_IEEE = {
    (16, 16): (64, 8, 4),
    (16, 32): (64, 8, 4),
    (32, 16): (64, 4, 3),
    (32, 32): (64, 8, 4),
    (64, 16): (32, 8, 4),
    (64, 32): (64, 8, 4),
    (128, 32): (16, 8, 3),
    (256, 32): (16, 8, 3),
}


@functools.cache
def backward_config(
    rows: int, inputs: int, outputs: int, itemsize: int, compute: torch.dtype, precision: str
) -> dict[str, int]:
    """Tile of `linear_backward`: a program owns 32 columns of the weight, or 16 where that makes too few programs.

    itemsize: bytes of a weight in memory.
    """
    block_p = block_rows(rows, precision)
    if not _is_aligned(inputs, outputs):
        return _tile(block_p, 16, 16, 8 if block_p >= (32 if precision == "ieee" else 128) else 4, 2)
    is_half = compute != torch.float32
    table = _BACKWARD_HALF if is_half else _BACKWARD_IEEE if precision == "ieee" else _BACKWARD_TF32
    block_k = 16 if (inputs <= 132 * 16 and (block_p, 16) in table) or (block_p, 32) not in table else 32
    block_n, num_warps, num_stages = table[block_p, block_k]
    if is_half and itemsize == 4:
        block_n = min(block_n, 64)
    return _tile(block_p, block_n, block_k, num_warps, num_stages)


def configurations(pdl: bool = False, aligned: bool = True) -> Iterator[dict[str, Any]]:
    """Every tile that the two functions above can choose, for compiling ahead of time.

    pdl: with programmatic dependent launch, for sm_90 and later.
    aligned: for widths that are multiples of 16, as models have them; or else for all others.

    Yields the kernel, the types of its arguments, its constants, the sizes that are multiples of 16, num_warps,
    num_stages, and a label. fp16 is not listed: it gets the tiles of bf16.
    """
    for parameters, compute in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "tf32"), ("fp32", "ieee")):
        dtype = torch.bfloat16 if compute == "bf16" else torch.float32
        precision = "ieee" if compute == "ieee" else "tf32"
        common = {
            "RELU": True,
            "HAS_MASK": True,
            "COMPUTE": tl.bfloat16 if compute == "bf16" else tl.float32,
            "PRECISION": precision,
        }
        itemsize = 2 if parameters == "bf16" else 4
        owned = ("x_ptr", "weight_ptr", "bias_ptr", "mask_ptr", "d_x_ptr", "d_weight_ptr", "d_bias_ptr")
        pointers = dict.fromkeys(owned, f"*{parameters}")
        pointers |= dict.fromkeys(("out_ptr", "d_out_ptr"), "*bf16" if compute == "bf16" else "*fp32")
        forward, backward = [], []
        for rows in (16, 32, 64, 128, 255):
            for width in (768, 4096, 8192):
                size = width if aligned else width + 1
                forward.append(forward_config(rows, size, size, itemsize, precision))
                backward.append(backward_config(rows, size, size, itemsize, dtype, precision))
        for kernel, tiles in ((linear_forward, forward), (linear_backward, backward)):
            for tile in {tuple(tile.items()): tile for tile in tiles}.values():
                blocks = {name: size for name, size in tile.items() if name.startswith("BLOCK")}
                constants: dict[str, Any] = {**common, **blocks, "PDL": pdl, "INTERPRETED": False}
                types = {**pointers, "P": "i32", "K": "i32", "N": "i32", **dict.fromkeys(constants, "constexpr")}
                yield {
                    "kernel": kernel,
                    "signature": {name: types[name] for name in kernel.arg_names},
                    "constants": {name: constants[name] for name in kernel.arg_names if name in constants},
                    "aligned": ("K", "N") if aligned else (),
                    "num_warps": tile["num_warps"],
                    "num_stages": tile["num_stages"],
                    "label": f"{parameters}, {compute} products, " + " x ".join(map(str, blocks.values())),
                }
