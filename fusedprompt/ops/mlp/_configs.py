"""Tiles of the MLP encoder's kernels, chosen by the sizes alone, so that a choice is the same in every run.

Compiled ahead of time for sm_80, sm_90 and sm_100, none of them spills or takes more than 99 KB of shared memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from .._triton import cdiv, next_power_of_2
from ._kernels import linear_backward, linear_forward, sum_of_parts

# Backward, a program owns columns of the weight. From so many outputs on, such as keys and values of all layers, the
# rows are shared out too: a hidden layer of 1024 units would leave half of the multiprocessors without a program, and
# the others with 57344 rows each.
_WIDE = 16384


def _tile(block_p: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def block_rows(rows: int, precision: str) -> int:
    """Prompt rows of a tile. Tensor cores do 32 rows in the time of fewer; exact products cost what they are."""
    return max(16 if precision == "ieee" else 32, next_power_of_2(rows))


def _is_aligned(inputs: int, outputs: int) -> bool:
    """Whether all rows of the weight and of the activations start on 16-byte boundaries, so that loads can be wide."""
    return inputs % 16 == 0 and outputs % 16 == 0


def forward_config(rows: int, inputs: int, outputs: int, itemsizes: tuple[int, int], precision: str) -> dict[str, int]:
    """Tile of `linear_forward`: from D=3072 up, enough programs for ~132 SMs and 2.7 MB of weights in flight in all,
    which is what arrives in the time that a load takes. More, narrower programs would all read x again, from L2.

    itemsizes: bytes of a number of x and of the weight in memory.
    """
    block_p, widest = block_rows(rows, precision), max(itemsizes)
    if not _is_aligned(inputs, outputs):
        return _tile(block_p, 16, 64 // widest, 8 if block_p >= 128 else 4, 2)
    if block_p <= 32:
        block_n = 16 if outputs <= 132 * 16 else 32 if outputs <= 132 * 32 else 64
        # Fused multiply-adds hold operands in registers.
        row_bytes = 512 if block_n == 16 else 128 if block_n == 64 and precision == "ieee" else 256
        num_stages = 5 if block_n == 32 else 4
    else:
        block_n, row_bytes = 32 if outputs <= 132 * 32 else 64, 128
        stage_bytes = row_bytes // widest * (block_p * itemsizes[0] + block_n * itemsizes[1])
        num_stages = min(8, 99 * 1024 // stage_bytes)
    num_warps = 8 if block_p >= 128 or (precision == "ieee" and block_p * block_n >= 4096) else 4
    return _tile(block_p, block_n, row_bytes // widest, num_warps, num_stages)


# BLOCK_N, num_warps and num_stages by BLOCK_P and BLOCK_K, for products of 16-bit numbers, in TF32 and in IEEE fp32:
# the largest tiles that do not spill.
_BACKWARD_HALF = {
    (32, 16): (128, 4, 4),
    (32, 32): (128, 4, 4),
    (64, 16): (64, 8, 5),
    (64, 32): (64, 8, 5),
    (128, 32): (64, 8, 3),
}
_BACKWARD_TF32 = {
    (32, 16): (64, 4, 4),
    (32, 32): (64, 4, 4),
    (64, 16): (64, 8, 3),
    (64, 32): (64, 8, 3),
}
_BACKWARD_IEEE = {
    (16, 16): (64, 8, 4),
    (16, 32): (64, 8, 4),
    (32, 16): (64, 8, 3),
    (32, 32): (32, 8, 4),
    (64, 16): (32, 8, 4),
    (64, 32): (32, 8, 4),
}


def backward_config(
    rows: int, inputs: int, outputs: int, itemsize: int, compute: torch.dtype, precision: str
) -> dict[str, int]:
    """Tile of `linear_backward`: a program owns 32 columns of the weight, or 16 where that makes too few programs. Of
    a wide layer it owns 32, and `split` makes the programs: 16 would read d_out twice as often.

    itemsize: bytes of a weight in memory.
    """
    block_p = block_rows(rows, precision)
    if not _is_aligned(inputs, outputs):
        return _tile(block_p, 16, 16, 4 if block_p < (32 if precision == "ieee" else 128) else 8, 2)
    is_half = compute != torch.float32
    table = _BACKWARD_HALF if is_half else _BACKWARD_IEEE if precision == "ieee" else _BACKWARD_TF32
    is_wide = outputs > _WIDE
    block_k = 16 if inputs <= 132 * 16 and not is_wide and (block_p, 16) in table else 32
    block_n, num_warps, num_stages = table[block_p, block_k]
    if is_half and itemsize == 4:
        # With 4 stages code for parts spills 8 bytes on sm_100, for the sake of 80 registers.
        block_n, num_warps, num_stages = min(block_n, 64), 8, 3 if block_p > 32 else 5 if is_wide else 4
    return _tile(block_p, block_n, block_k, num_warps, num_stages)


def split(inputs: int, outputs: int, tile: dict[str, int]) -> int:
    """Parts of a layer's outputs in `linear_backward`, each for programs of their own: two programs a multiprocessor,
    as far as each has 16 steps to go."""
    if outputs <= _WIDE:
        return 1
    return max(1, min(2 * 132 // cdiv(inputs, tile["BLOCK_K"]), outputs // (16 * tile["BLOCK_N"])))


ACTIVATIONS = ("relu", "tanh")  # of hidden layers

# Of `sum_of_parts`: numbers of a program of 128 threads.
SUM_TILE = {"BLOCK": 512, "num_warps": 4, "num_stages": 3}


# What a layer may multiply: the dtypes of its input, of its parameters and of the operands, and whether fp32 products
# are exact. Under autocast the first layer's input is fp32 and the others' inputs are 16-bit.
_PRODUCTS = (
    ("bf16", "bf16", "bf16", False),
    ("fp16", "fp16", "fp16", False),
    ("fp32", "fp32", "bf16", False),
    ("bf16", "fp32", "bf16", False),
    ("fp32", "fp32", "fp16", False),
    ("fp16", "fp32", "fp16", False),
    ("fp32", "fp32", "fp32", False),
    ("fp32", "fp32", "fp32", True),
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def constants(
    tile: dict[str, int],
    compute: torch.dtype,
    precision: str,
    activation: str,
    flags: tuple[bool, ...],
    interpreted: bool,
) -> dict[str, Any]:
    """The constexprs of `linear_forward`, in their order there. flags: HAS_MASK and PDL."""
    has_mask, pdl = flags
    return {
        "ACTIVATION": activation,
        "HAS_MASK": has_mask,
        "COMPUTE": _TRITON_DTYPES[compute],
        "PRECISION": precision,
        **{name: size for name, size in tile.items() if name.startswith("BLOCK")},
        "PDL": pdl,
        "INTERPRETED": interpreted,
    }


def backward_constants(
    tile: dict[str, int],
    compute: torch.dtype,
    precision: str,
    activation: str,
    flags: tuple[bool, ...],
    interpreted: bool,
    is_split: bool,
) -> dict[str, Any]:
    """Those of `linear_backward`. Of parts `sum_of_parts` sees to activation and mask."""
    if is_split:
        activation, flags = "", (False, flags[1])
    return {**constants(tile, compute, precision, activation, flags, interpreted), "SPLIT": is_split}


def configurations(pdl: bool) -> Iterator[dict[str, Any]]:
    """Every tile that the functions above can choose, for compiling ahead of time.

    Products in fp16 are there with ReLU and without parts alone: they take what those in bf16 take.

    pdl: with programmatic dependent launch, as on sm_90 and later.

    Yields the kernel, the types of its arguments, its constants, the sizes that are multiples of 16, num_warps,
    num_stages, and a label.
    """
    found: dict[str, dict[str, Any]] = {}
    for (inputs, parameters, compute, exact), aligned, rows, (width, outputs), activation in itertools.product(
        _PRODUCTS,
        (True, False),
        (16, 32, 64, 128),
        ((768, 768), (4096, 4096), (8192, 8192), (1024, 57344)),
        ACTIVATIONS,
    ):
        dtypes = (inputs, parameters, compute)
        if rows == 128 and parameters == compute:
            continue  # left to cuBLAS
        sizes = (rows, width, outputs) if aligned else (rows, width + 1, outputs + 1)
        itemsize, precision = _DTYPES[parameters].itemsize, "ieee" if exact else "tf32"
        tile = forward_config(*sizes, (_DTYPES[inputs].itemsize, itemsize), precision)
        forward = _configuration(linear_forward, dtypes, precision, aligned, tile, pdl, activation)
        tile = backward_config(*sizes, itemsize, _DTYPES[compute], precision)
        is_split = split(*sizes[1:], tile) > 1
        if compute == "fp16" and (is_split or activation != ACTIVATIONS[0]):
            continue
        backward = _configuration(linear_backward, dtypes, precision, aligned, tile, pdl, activation, is_split)
        found |= {f"{one['kernel'].__name__} {one['label']}": one for one in (forward, backward)}
    yield from found.values()
    for kind, activation in itertools.product(_DTYPES, ACTIVATIONS):
        yield _sum_configuration(kind, activation, pdl)


def _configuration(
    kernel: Any,
    dtypes: tuple[str, str, str],
    precision: str,
    aligned: bool,
    tile: dict[str, int],
    pdl: bool,
    activation: str,
    is_split: bool = False,
) -> dict[str, Any]:
    inputs, parameters, compute = dtypes
    given = (tile, _DTYPES[compute], precision, activation, (True, pdl), False)
    values = backward_constants(*given, is_split) if kernel is linear_backward else constants(*given)
    blocks = " x ".join(str(tile[name]) for name in ("BLOCK_P", "BLOCK_N", "BLOCK_K"))
    pointers = dict.fromkeys(("weight_ptr", "bias_ptr", "mask_ptr", "d_weight_ptr", "d_bias_ptr"), f"*{parameters}")
    pointers |= {"x_ptr": f"*{inputs}", "out_ptr": f"*{compute}", "d_out_ptr": f"*{compute}"}
    pointers["d_x_ptr"] = "*fp32" if is_split else f"*{inputs}"
    products = compute if compute != "fp32" else "fp32" if precision == "ieee" else "tf32"
    what = ", in parts" if is_split else "" if activation == "relu" else f", {activation}"
    return {
        "kernel": kernel,
        "types": {**pointers, **dict.fromkeys(values, "constexpr")},
        "constants": values,
        "aligned": ("K", "N") if aligned else (),
        "num_warps": tile["num_warps"],
        "num_stages": tile["num_stages"],
        "label": f"{inputs} by {parameters} in {products}, {blocks}{'' if aligned else ', odd widths'}{what}",
    }


def _sum_configuration(kind: str, activation: str, pdl: bool) -> dict[str, Any]:
    values = {"ACTIVATION": activation, "HAS_MASK": True, "PARTS": 8, "BLOCK": SUM_TILE["BLOCK"], "PDL": pdl}
    pointers = {"parts_ptr": "*fp32", **dict.fromkeys(("x_ptr", "mask_ptr", "d_x_ptr"), f"*{kind}")}
    return {
        "kernel": sum_of_parts,
        "types": {**pointers, **dict.fromkeys(values, "constexpr")},
        "constants": values,
        "aligned": ("SIZE",),
        "num_warps": SUM_TILE["num_warps"],
        "num_stages": SUM_TILE["num_stages"],
        "label": f"{kind}, 8 parts{'' if activation == 'relu' else f', {activation}'}",
    }
