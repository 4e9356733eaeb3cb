"""Draw committed results as SVG: `python -m benches.pictures [MACHINE]`, or `make pictures`.

One set of pictures for light and dark pages: no background, and text and lines in a grey and in colours that can be
read on both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from ._interleave import AGAIN, COMPILED, OURS, PEFT
from .report import RESULTS, rows_of

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
GREY = "#7d8590"
COLOURS = {
    OURS: "#2f81f7",
    PEFT: "#8b949e",
    "nn.LSTM": "#8b949e",
    "transformers": "#8b949e",
    COMPILED: "#d29922",
    "PEFT LoRA 32": "#a371f7",
    "no prompt": "#3fb950",
}
STYLE = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "fusedprompt",  # the same file for the same figures
    "svg.fonttype": "path",
}


MACHINE = "amd-epyc-2-threads"  # whose results README and docs show
MACHINES = dict.fromkeys(("prefix", "attention"), "intel-xeon-processor-2-threads")  # of parts measured elsewhere


def load(machine: str, part: str = "") -> dict[str, Any]:
    """A committed result; empty if there is none of that part."""
    path = RESULTS / f"{machine}{f'-{part}' if part else ''}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"benchmarks": []}
    return result


def caption(result: dict[str, Any], what: str) -> str:
    """What was measured, against what, where."""
    machine = result["machine_info"]
    versions = machine["versions"]
    where = machine.get("gpu") or f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads"
    return f"{what}\n{where}; torch {versions['torch']}, PEFT {versions['peft']}; {result['datetime'][:10]}"


def save(figure: Figure, name: str, text: str) -> Path:
    figure.text(0.01, 0.005, text, fontsize=7.5, va="bottom")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _peer(row: dict[str, Any]) -> str:
    return next(name for name in row["contenders"] if name not in (OURS, AGAIN))


def speedups(results: Sequence[dict[str, Any]]) -> Path:
    """Bars: how many times as fast as PEFT, or nn.LSTM, each kind of work is."""
    order = ("step", "inference", "lstm", "head loss", "encode")
    rows = [row for result in results for row in rows_of(result) if row["mode"] != "forward" and row["group"] in order]
    rows = [row for row in rows if "2 layers" not in row["case"] and (row["group"], row["dtype"]) != ("encode", "bf16")]
    rows.sort(key=lambda row: order.index(row["group"]))
    names = []
    for row in rows:
        kind = {"encode": "encoder with ", "head loss": "head and loss, "}.get(row["group"], "")
        parts = [kind + row["case"].split(", 6 layers")[0], row["mode"], row["dtype"]]
        names.append(", ".join(part for part in parts if part == parts[0] or not parts[0].startswith(part)))
    ratios = [row["contenders"][_peer(row)]["ratio"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(8.4, 0.27 * len(rows) + 1.1))
    bars = axes.barh(range(len(rows)), ratios, color=[COLOURS[OURS]] * len(rows), height=0.66)
    axes.bar_label(bars, [f"{ratio:.2f}x {_peer(row)}" for ratio, row in zip(ratios, rows)], padding=3, color=GREY)
    axes.axvline(1.0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast (1 = the same)")
    axes.set_xlim(0, max(ratios) * 1.6)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    steps = "Steps, prefill, generate: 6-layer Llama, D=512, V=32000, random weights, fp32."
    return save(
        figure, "speedups", caption(results[0], f"Baseline 1.0: PEFT eager, nn.LSTM, or transformers' loss. {steps}")
    )


def roofline(results: Sequence[dict[str, Any]]) -> Path:
    """Operations a second against operations per byte for ops with matrix products; bandwidth for the others."""
    machine = results[0]["machine_info"]["limits"]
    rows = [
        row for result in results for row in rows_of(result) if row.get("bytes") and row["mode"] == "forward+backward"
    ]
    with_products = [row for row in rows if row["flops"] and row["dtype"] == "fp32"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.9), width_ratios=(1.35, 1))
    bandwidth, rate = machine["copy_gb_per_s"], machine["matrix_gflop_per_s"]["fp32"]
    knee = rate / bandwidth
    span = (0.5, 2000.0)
    left.plot([span[0], knee, span[1]], [span[0] * bandwidth, rate, rate], color=GREY, linewidth=1.2)
    left.annotate(f"{rate:.0f} GFLOP/s, measured", (span[1], rate), ha="right", va="bottom", fontsize=7.5)
    left.annotate(f"{bandwidth:.0f} GB/s, measured", (span[0] * 1.2, span[0] * bandwidth * 0.8), fontsize=7.5)
    markers = {"MLP": "o", "LSTM": "s", "head loss": "D"}
    for row in with_products:
        kind = row["group"] if row["group"] in markers else row["case"].split()[0]
        for name in (OURS, _peer(row)):
            seconds = row["contenders"][name]["median_ms"] / 1e3
            left.scatter(
                row["flops"] / row["bytes"],
                row["flops"] / seconds / 1e9,
                color=COLOURS[name],
                marker=markers[kind],
                s=26,
            )
    for name, kind in ((OURS, "o"), (PEFT, "o")):
        left.scatter(
            [], [], color=COLOURS[name], marker=kind, label="PEFT, nn.LSTM or transformers" if name == PEFT else name
        )
    for kind, marker in markers.items():
        left.scatter([], [], color=GREY, marker=marker, label=kind)
    left.set(xscale="log", yscale="log", xlabel="operations per byte (least work)", ylabel="GFLOP/s", xlim=span)
    left.set_title("with matrix products, fp32, forward+backward")
    left.legend(fontsize=7.5, loc="lower right")
    left.set_ylim(span[0] * bandwidth * 0.5, rate * 2)
    left.grid(True)
    moving = [row for row in rows if not row["flops"]]
    _bandwidth_bars(right, moving, bandwidth)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    text = "Least bytes and operations over measured time. What a cache holds moves faster than a copy of 256 MB."
    return save(figure, "roofline", caption(results[0], text))


def _bandwidth_bars(axes: Axes, rows: Sequence[dict[str, Any]], bandwidth: float) -> None:
    for offset, pick in ((-0.2, lambda row: OURS), (0.2, _peer)):
        values = [row["bytes"] / row["contenders"][pick(row)]["median_ms"] / 1e6 for row in rows]
        colour = COLOURS[OURS] if offset < 0 else COLOURS[PEFT]
        axes.barh([index + offset for index in range(len(rows))], values, height=0.38, color=colour)
    axes.axvline(bandwidth, color=GREY, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [f"{row['group']}\n{row['case']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the least traffic")
    axes.set_title("that move data, fp32")


def scaling(result: dict[str, Any]) -> Path:
    """Time against size on logarithmic axes, with the floor."""
    rows = rows_of(result)
    curves = list(dict.fromkeys(row["group"] for row in rows))
    columns = 4
    lines = -(-len(curves) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(11, 2.7 * lines + 0.4), squeeze=False)
    for axes, curve in zip(grid.flat, curves):
        points = [row for row in rows if row["group"] == curve]
        x = [row["value"] for row in points]
        for name in (_peer(points[0]), OURS):
            figures = [row["contenders"][name] for row in points]
            axes.plot(
                x, [figure["median_ms"] for figure in figures], "o-", color=COLOURS[name], markersize=3.5, label=name
            )
            axes.fill_between(
                x,
                [f["p20_ms"] for f in figures],
                [f["p80_ms"] for f in figures],
                color=COLOURS[name],
                alpha=0.2,
                linewidth=0,
            )
        axes.plot(x, [row["floor_ms"] for row in points], "--", color=GREY, linewidth=1, label="floor")
        axes.set(xscale="log", yscale="log", xlabel=points[0]["x"], title=curve.removeprefix("scaling: "))
        axes.set_xticks(x, [f"{value}" for value in x], rotation=45 if max(x) > 999 else 0, fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True)
        axes.legend(fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("milliseconds")
    for axes in list(grid.flat)[len(curves) :]:
        axes.axis("off")
    figure.tight_layout(rect=(0, 0.45 / figure.get_figheight(), 1, 1))
    text = (
        "Forward and backward, fp32; steps with AdamW on a 6-layer Llama (D=512, V=32000). Shaded: p20 to p80. "
        "Floor: least work at the machine's limits."
    )
    return save(figure, "scaling", caption(result, text))


def memory(results: Sequence[dict[str, Any]]) -> Path:
    """Peak memory of whole steps, ours and others'."""
    rows = [row for result in results for row in rows_of(result) if row["group"] in ("step", "inference")]
    rows = [row for row in rows if "2 layers" not in row["case"]]
    return _grouped(rows, "peak_mb", "peak MB of tensors beyond the model", "memory", results[0], 1.0)


def attended(result: dict[str, Any]) -> Path:
    """How many times as fast steps are whose rows read one prefix, and what they hold with more and more rows."""
    rows = [row for row in rows_of(result) if row["group"] == "attended"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), width_ratios=(1.3, 1))
    ratios = [row["contenders"]["joined"]["ratio"] for row in rows]
    bars = left.barh(range(len(rows)), ratios, color=COLOURS[OURS], height=0.66)
    left.bar_label(bars, fmt="%.2f", padding=3, color=GREY, fontsize=8)
    left.axvline(1.0, color=GREY, linewidth=1)
    left.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    left.set_xlim(0, max(ratios) * 1.2)
    left.invert_yaxis()
    left.set_title("times as fast as with keys joined in each row")
    rows = [row for row in rows_of(result) if row["group"] == "attended memory"]
    sizes = [int(row["case"].split("B=")[1].split()[0]) for row in rows]
    for name, label in ((OURS, "one prefix"), ("joined", "joined in each row")):
        held = [row["contenders"][name]["peak_mb"] for row in rows]
        right.plot(sizes, held, "o-", color=COLOURS[OURS if name == OURS else PEFT], markersize=3.5, label=label)
    right.set(xlabel="rows (B), each of N=2000 and T=50", ylabel="peak MB beyond the model")
    right.grid(True)
    right.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    return save(
        figure, "attended", caption(result, "Training steps, 6-layer Llama, D=512, V=32000, random weights, fp32.")
    )


def metamath(result: dict[str, Any]) -> Path:
    """Step times in the shapes of PEFT's comparison."""
    rows = rows_of(result)
    return _grouped(rows, "median_ms", "seconds per training step", "metamath", result, 1e-3)


def _grouped(
    rows: Sequence[dict[str, Any]], key: str, label: str, name: str, result: dict[str, Any], unit: float
) -> Path:
    """Bars side by side: one group a row, one bar a contender."""
    names = [found for found in COLOURS if any(found in row["contenders"] for row in rows)]
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(8.4, 0.17 * len(rows) * len(names) + 1.5))
    for place, contender in enumerate(names):
        found = [
            (index, row["contenders"][contender][key] * unit)
            for index, row in enumerate(rows)
            if contender in row["contenders"]
        ]
        positions = [index + (place - (len(names) - 1) / 2) * height for index, _ in found]
        bars = axes.barh(
            positions, [value for _, value in found], height=height * 0.92, color=COLOURS[contender], label=contender
        )
        axes.bar_label(bars, fmt="%.0f" if unit == 1.0 else "%.2f", padding=3, color=GREY, fontsize=7)
    axes.set_yticks(range(len(rows)), [row["case"].replace(", 6 layers D=512 V=32000", "") for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7.5, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), borderaxespad=0.2)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    model = rows[0]["case"] if name == "metamath" else "6-layer Llama, D=512, V=32000, fp32"
    text = {
        "memory": f"{model}: most memory that tensors held at once, counted by torch's allocator.",
        "metamath": "Llama-3.2-3B's shapes with fewer layers, random weights in bf16, adapters in fp32, AdamW.",
    }[name]
    return save(figure, name, caption(result, text))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benches.pictures", description=__doc__)
    parser.add_argument("machine", nargs="?", default=MACHINE, help="whose results of benches/results")
    options = parser.parse_args(arguments)
    main_result = load(options.machine)
    with matplotlib.rc_context(STYLE):
        made = [speedups([main_result]), roofline([main_result]), memory([main_result])]
        for part, draw in (("scaling", scaling), ("metamath", metamath), ("attention", attended)):
            result = load(MACHINES.get(part, options.machine), part)
            made += [draw(result)] if rows_of(result) else []
    print("\n".join(map(str, made)))


if __name__ == "__main__":
    main()
