"""Tiles of prefix_attention's kernels, chosen by the sizes alone.

Compiled ahead of time for sm_80, sm_90 and sm_100, none of them spills or takes more than 99 KB of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .._triton import next_power_of_2
from ._gradients import attention_d_keys, attention_d_query
from ._kernels import attention_forward

FEW_QUERIES = 16  # the fewest rows of a product


class Kind(NamedTuple):
    """What all kernels are compiled for: of the arguments, of the base model, and of the machine.

    width, value_width: d and dv. scale, softcap, window: see the op, 0 for none. precision: "ieee" or "tf32" products
    in fp32, "" in 16 bits.
    """

    group: int
    width: int
    value_width: int
    scale: float
    softcap: float
    window: int
    precision: str
    pdl: bool
    interpreted: bool = False

    @property
    def blocks(self) -> dict[str, int]:
        """Columns of a tile of queries and keys, and of one of values."""
        return {name: max(16, next_power_of_2(w)) for name, w in (("D", self.width), ("V", self.value_width))}


# Queries and keys of a tile, warps and stages, by precision and the widest block. Exact products run without tensor
# cores, whose operands need four times the registers.
_TILES: dict[Any, dict[tuple[str, int], tuple[int, int, int, int]]] = {
    attention_forward: {
        ("", 64): (128, 64, 8, 2),
        ("", 128): (64, 32, 8, 2),
        ("", 256): (32, 32, 8, 1),
        ("tf32", 64): (64, 32, 4, 1),
        ("tf32", 128): (32, 32, 4, 2),
        ("tf32", 256): (32, 16, 8, 1),
        ("ieee", 64): (16, 32, 4, 2),
        ("ieee", 128): (32, 16, 8, 2),
    },
    attention_d_query: {
        ("", 64): (32, 32, 4, 1),
        ("", 128): (32, 16, 8, 1),
        ("", 256): (32, 32, 4, 1),
        ("tf32", 64): (32, 32, 4, 1),
        ("tf32", 128): (16, 16, 8, 1),
        ("tf32", 256): (32, 16, 8, 1),
        ("ieee", 64): (32, 32, 8, 1),
        ("ieee", 128): (16, 16, 8, 1),
    },
    attention_d_keys: {
        ("", 64): (32, 64, 4, 2),
        ("", 128): (32, 64, 8, 2),
        ("", 256): (32, 32, 8, 2),
        ("tf32", 64): (32, 32, 8, 1),
        ("tf32", 128): (32, 32, 8, 1),
        ("tf32", 256): (16, 16, 4, 1),
        ("ieee", 64): (32, 16, 8, 2),
        ("ieee", 128): (16, 16, 4, 1),
    },
}


def tile(kernel: Any, kind: Kind, few: bool) -> dict[str, int]:
    """few: no row has more than FEW_QUERIES. Tiles of TF32 are small as they are, and smaller ones spill."""
    queries, keys, warps, stages = _TILES[kernel][kind.precision, max(64, *kind.blocks.values())]
    queries = FEW_QUERIES if few and kind.precision != "tf32" else queries
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def constants(kernel: Any, kind: Kind, few: bool, flags: dict[str, Any]) -> dict[str, Any]:
    """The constexprs of a kernel, in their order there. flags: those that not all kernels have."""
    sizes = tile(kernel, kind, few)
    values = {
        **flags,
        "GROUP": kind.group,
        "WINDOW": kind.window,
        "SCALE": kind.scale,
        "SOFTCAP": kind.softcap,
        "WIDTH": kind.width,
        "VALUE_WIDTH": kind.value_width,
        "PRECISION": kind.precision or "tf32",
        **{f"BLOCK_{name}": value for name, value in kind.blocks.items()},
        "BLOCK_M": sizes["BLOCK_M"],
        "BLOCK_N": sizes["BLOCK_N"],
        "PDL": kind.pdl,
        "INTERPRETED": kind.interpreted,
    }
    return {name: values[name] for name in kernel.arg_names if name in values}


_KINDS = [("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp16", 128)]
_KINDS += [("fp32", 64), ("fp32", 128), ("tf32", 64), ("tf32", 128), ("tf32", 256)]
_WAYS = [(attention_forward, "both"), (attention_d_query, ""), (attention_d_keys, "prefix"), (attention_d_keys, "own")]


def configurations(pdl: bool) -> Iterator[dict[str, Any]]:
    """Ways to compile the kernels: with no option and with all; few queries with all; see the splice's."""
    for name, width in _KINDS:
        for options in (False, True):
            for kernel, part in _WAYS:
                yield _configuration(kernel, part, name, width, options, False, pdl)
        if name == "tf32":  # whose tiles are the same for few queries
            continue
        yield _configuration(attention_forward, "prefix", name, width, False, True, pdl)
        for kernel, part in ((attention_forward, "own"), (attention_d_query, ""), (attention_d_keys, "own")):
            yield _configuration(kernel, part, name, width, True, True, pdl)


def _configuration(
    kernel: Any, part: str, name: str, width: int, options: bool, few: bool, pdl: bool
) -> dict[str, Any]:
    precision = {"fp32": "ieee", "tf32": "tf32"}.get(name, "")
    more = (50.0, 4096) if options else (0.0, 0)
    kind = Kind(3 if options else 1, width, width, width**-0.5, *more, precision, pdl)
    has_index, has_mask = options and part not in ("own",), options and part != "prefix"
    masks = {"HAS_INDEX": has_index, "HAS_PREFIX_MASK": has_index, "HAS_MASK": has_mask}
    if kernel is attention_d_keys:
        masks = {"HAS_INDEX": has_index, "HAS_MASK": options}
    flags = {**masks, **({"PART": part} if kernel is attention_forward else {}), "PREFIX": part == "prefix"}
    values, sizes = constants(kernel, kind, few, flags), tile(kernel, kind, few)
    element = "*fp32" if name == "tf32" else f"*{name}"
    pointers = {one: element for one in kernel.arg_names if one.endswith("_ptr")}
    pointers |= dict.fromkeys(("before_lse_ptr", "lse_ptr", "delta_ptr"), "*fp32")
    if kernel is attention_forward and part != "both":  # what one launch leaves to the other
        pointers |= {"before_ptr": "*fp32", **({"out_ptr": "*fp32"} if part == "prefix" else {})}
    if part == "prefix":  # sums of splits
        pointers |= dict.fromkeys(("d_key_ptr", "d_value_ptr"), "*fp32")
    for flag, pointer, type_ in (
        ("HAS_INDEX", "index_ptr", "*i64"),
        ("HAS_PREFIX_MASK", "prefix_mask_ptr", "*u8"),
        ("HAS_MASK", "mask_ptr", "*u8"),
    ):
        if flags.get(flag):
            pointers[pointer] = type_
    types = {one: kind for one, kind in pointers.items() if one in kernel.arg_names}
    what = [name, f"d={width}", part, "few queries" if few else "", "all options" if options else ""]
    return {
        "kernel": kernel,
        "types": {**types, **dict.fromkeys(values, "constexpr")},
        "constants": values,
        "aligned": (),
        "num_warps": sizes["num_warps"],
        "num_stages": sizes["num_stages"],
        "label": ", ".join(filter(None, what)),
    }
