"""Write the committed results into the tables of README.md and docs: `python -m benches.tables`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; `TABLES` says what is in it. So no figure is typed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._interleave import OURS, PEFT
from ._models import LORA, NO_PROMPT
from .gpu import page
from .pictures import MACHINE, MACHINES, load
from .report import rows_of

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "docs/peft.md", "docs/routes.md", "docs/prefixes.md", "docs/gpu.md")
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def find(part: str, group: str, case: str, **fields: str) -> dict[str, Any]:
    """The one row of a part's results whose group is `group`, whose case begins with `case`, and that has these fields.

    Raises:
        LookupError: there is none, or there are several.
    """
    rows = [
        row
        for row in rows_of(load(MACHINES.get(part, MACHINE), part))
        if row["group"] == group and row["case"].startswith(case)
    ]
    rows = [row for row in rows if all(row[name] == value for name, value in fields.items())]
    if len(rows) != 1:
        raise LookupError(f"{group} {case!r} {fields}: expected one row of part {part!r}, got {len(rows)}")
    return rows[0]


def duration(milliseconds: float) -> str:
    if milliseconds >= 5000:
        return f"{milliseconds / 1e3:.1f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def compared(name: str, row: dict[str, Any], peer: str = PEFT, memory: bool = True) -> list[str]:
    """Cells: name, the peer's median, ours, the ratio, and peak memory."""
    ours, theirs = row["contenders"][OURS], row["contenders"][peer]
    ratio = theirs["median_ms"] / ours["median_ms"]
    cells = [name, duration(theirs["median_ms"]), duration(ours["median_ms"]), f"{ratio:.2f}"]
    return [*cells, f"{theirs['peak_mb']:.0f} → {ours['peak_mb']:.0f}"] if memory else cells


def steps() -> list[list[str]]:
    large = "6 layers D=512 V=32000"
    return [
        ["fp32, 6-layer Llama (D=512, V=32000)", "PEFT", "fusedprompt", "ratio", "peak MB"],
        *(
            compared(
                f"{title}, training step, {sizes.replace(' ', ', ')}", find("", "step", f"{name} {sizes}, {large}")
            )
            for title, name, sizes in (
                ("prompt tuning", "prompt tuning", "B=4 P=200 T=210"),
                ("P-tuning (MLP)", "P-tuning MLP", "B=8 P=20 T=64"),
                ("P-tuning (LSTM)", "P-tuning LSTM", "B=8 P=20 T=64"),
                ("CPT", "CPT", "B=4 P=16 T=64"),
            )
        ),
        *(
            compared(f"the same PEFT model, patched by `apply`: {title}", find("apply", "apply", case))
            for title, case in (
                ("prompt tuning, B=4, P=200, T=210", "prompt tuning B=4"),
                ("prompt tuning, labels on 30 % of the text", "prompt tuning, 30% labelled"),
                ("P-tuning (MLP), B=16, P=50, T=100", "P-tuning MLP"),
                ("P-tuning (LSTM), B=4, P=50, T=64", "P-tuning LSTM"),
                ("CPT, B=4, P=16, T=64", "CPT"),
            )
        ),
        compared("prefill with a kept prompt, B=8, P=100, T=64", find("", "inference", "prefill B=8 N=100")),
        compared("24 tokens generated, B=8, P=100, T=64", find("", "inference", "generate B=8 N=100")),
    ]


def lstm() -> list[list[str]]:
    title = "LSTM of P-tuning's encoder (two layers, both directions), forward and backward"
    sizes = ("P=20 D=768 H=256", "P=20 D=768 H=768", "P=100 D=1024 H=1024")
    rows = [(size, dtype) for size in sizes for dtype in ("fp32", "bf16")]
    return [
        [title, "nn.LSTM", "fusedprompt", "ratio"],
        *(
            compared(
                f"{size.replace(' ', ', ')}, {dtype}",
                find("", "lstm", f"LSTM {size}", dtype=dtype, mode="forward+backward"),
                "nn.LSTM",
                memory=False,
            )
            for size, dtype in rows
        ),
    ]


def metamath() -> list[list[str]]:
    title = "bf16, Llama-3.2-3B's shapes (2 of 28 layers), B=4, T=210, training step"
    lines = [[title, "PEFT", "fusedprompt", "ratio", "peak MB", "LoRA of rank 32", "ours / LoRA"]]
    for name in ("prompt tuning N=200", "P-tuning MLP N=20", "P-tuning LSTM N=50"):
        row = find("metamath", "metamath", name)
        ours, lora = (row["contenders"][who]["median_ms"] for who in (OURS, LORA))
        lines.append([*compared(name, row), duration(lora), f"{ours / lora:.2f}"])
    return lines


def patched() -> list[list[str]]:
    return [
        ["", "PEFT", "patched", "ratio", "peak MB"],
        *(
            compared(title, find("apply", "apply", case))
            for title, case in (
                ("prompt tuning, training step, B=4, N=200, T=210", "prompt tuning B=4"),
                ("the same, labels on 30 % of the text", "prompt tuning, 30% labelled"),
                ("P-tuning MLP (H=512), training step, B=16, N=50, T=100", "P-tuning MLP"),
                ("P-tuning LSTM (H=512), training step, B=4, N=50, T=64", "P-tuning LSTM"),
                ("CPT, training step, B=4, N=16, T=64", "CPT"),
                ("`generate` of one token, B=8, N=100, T=64, prompt kept", "generate one token"),
            )
        ),
    ]


def routes() -> list[list[str]]:
    lines = [["training step, B, N, T", "route", "ours", "PEFT", "ratio", "PEFT compiled", "ratio", "peak MB, PEFT"]]
    for sizes, route in (
        ("B=4 N=200 T=210", "shared"),
        ("B=8 N=100 T=64", "shared"),
        ("B=16 N=50 T=100", "shared"),
        ("B=1 N=20 T=512", "splice"),
        ("B=4 N=1 T=210", "splice"),
    ):
        figures = find("routes", "shared", f"training step {sizes}")["contenders"]
        own, cells = figures[OURS]["median_ms"], [re.sub(r"[A-Z]=", "", sizes).replace(" ", ", "), route]
        cells.append(duration(own))
        for peer in (PEFT, "PEFT compiled"):
            time = figures.get(peer, {}).get("median_ms")
            cells += [duration(time), f"{time / own:.2f}"] if time else ["", ""]
        lines.append([*cells, f"{figures[OURS]['peak_mb']:.0f}, {figures[PEFT]['peak_mb']:.0f}"])
    return lines


def cost() -> list[list[str]]:
    others = (NO_PROMPT, "PEFT N=1", LORA, PEFT)
    lines = [["B, N, T", "ours", "no prompt", "one token", "LoRA", "PEFT", "ours / one token", "ours / LoRA", "floor"]]
    for sizes in ("B=4 N=200 T=210", "B=8 N=100 T=64", "B=16 N=50 T=100"):
        row = find("routes", "cost of a prompt", f"training step {sizes}")
        times = {name: figures["median_ms"] for name, figures in row["contenders"].items()}
        own = times[OURS]
        ratios = [f"{own / times[name]:.2f}" for name in ("PEFT N=1", LORA)]
        shown = [duration(times[name]) for name in (OURS, *others)]
        lines.append([re.sub(r"[A-Z]=", "", sizes).replace(" ", ", "), *shown, *ratios, row["case"].split("floor ")[1]])
    return lines


def prefix() -> list[list[str]]:
    return [
        ["fp32, 6-layer Llama (D=512, V=32000)", "PEFT", "fusedprompt", "ratio", "peak MB"],
        *(
            compared(title, find("prefix", "prefix", case))
            for title, case in (
                ("training step, B=4, N=200, T=210", "training step B=4"),
                ("training step, B=16, N=200, T=64, projection (H=512)", "training step B=16"),
                ("24 tokens generated, B=8, N=2000, T=32, prefix kept", "generate"),
            )
        ),
    ]


def attention_alone() -> list[list[str]]:
    return [
        ["B, N, T", "joined keys, SDPA", "one prefix", "ratio", "peak MB"],
        *(
            compared(sizes, find("attention", "prefix attention", case, mode="forward+backward"), "joined keys")
            for sizes, case in (
                (", ".join(map(str, (b, n, t))), f"B={b} N={n} T={t}")
                for b, n, t in ((4, 20, 100), (4, 200, 210), (16, 200, 100), (64, 200, 100), (16, 2000, 100))
            )
        ),
    ]


def attended() -> list[list[str]]:
    lines = [["training step: of a, B, N, T", "joined", "one prefix", "ratio", "peak MB", "spliced", "PEFT", "floor"]]
    for row in rows_of(load(MACHINES["attention"], "attention")):
        if row["group"] == "attended":
            times = {name: duration(figures["median_ms"]) for name, figures in row["contenders"].items()}
            others = [times.get(name, "") for name in ("spliced", PEFT)]
            name = row["case"].replace("B=", "").replace("N=", "").replace("T=", "").replace(" ", ", ")
            lines.append([*compared(name, row, "joined"), *others, duration(row["floor_ms"])])
    return lines


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "steps": steps,
    "lstm": lstm,
    "metamath": metamath,
    "patched": patched,
    "routes": routes,
    "cost": cost,
    "prefix": prefix,
    "attention": attention_alone,
    "attended": attended,
    **{f"gpu_kernels_{key}": functools.partial(page.kernels, key) for key in page.ASSUMED},
    **{f"gpu_steps_{key}": functools.partial(page.steps, key) for key in page.ASSUMED},
}


def markdown(cells: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in cells]
    lines.insert(1, "|---" * len(cells[0]) + "|")
    return "\n".join(lines)


def filled(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: a table of a name that is not in `TABLES`.
    """
    return _TABLE.sub(lambda match: f"{match[1]}{markdown(TABLES[match[2]]())}{match[3]}", text)


def main() -> None:
    for name in FILES:
        path = ROOT / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
