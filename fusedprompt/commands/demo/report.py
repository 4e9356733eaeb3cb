"""What the demo prints, draws and writes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from .. import figures
from .training import Curve

COLORS = {"MLP": "tab:blue", "LSTM": "tab:orange"}


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured with."""
    import transformers

    return {
        "versions": {
            "fusedprompt": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def write_json(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary; numbers that are not finite become null, for JSON has none."""
    finite = json.loads(json.dumps(summary), parse_constant=lambda name: None)
    path.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length, the first of them as a heading, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for index, row in enumerate(rows):
        print("   " + "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]))
        if index == 0:
            print("   " + "-" * (sum(widths) + 2 * len(widths) - 2))


def print_prompts(prompts: Mapping[str, Mapping[str, Any]], before: float, with_tag: float) -> None:
    """Print what each encoder's prompt achieved, as a table with one column an encoder."""
    columns = [_describe(prompt, before, with_tag) for prompt in prompts.values()]
    rows = [["", *(f"{kind} encoder" for kind in prompts)]]
    rows += [[label, *(column[label] for column in columns)] for label in columns[0]]
    print_table(rows)
    print("4. Both adapters were saved in PEFT's format and loaded into a fresh copy of the model. It now writes:")
    for kind, prompt in prompts.items():
        print(f"     {kind}: " + ", ".join(f"{word}= {answer}" for word, answer in prompt["examples"].items()))


def _describe(prompt: Mapping[str, Any], before: float, with_tag: float) -> dict[str, str]:
    encoding, explained = prompt["encoding"], prompt["backends"]
    description = {
        "exact match without prompt or tag": f"{before:.1f} %",
        "exact match with the untrained prompt": f"{prompt['exact_match_untrained']:.1f} %",
        "exact match with the learned prompt": f"{prompt['exact_match']:.1f} %",
        "exact match with the tag, for comparison": f"{with_tag:.1f} %",
        "training": f"{prompt['steps']} steps, {prompt['seconds']:.1f} s",
        "trainable parameters (the encoder, for training alone)": f"{prompt['trainable_parameters']:,}",
        "saved adapter (the prompt that it made)": f"{prompt['adapter_bytes'] / 1024:.1f} KiB",
        "reloaded: largest difference of a logit": f"{prompt['reloaded_largest_difference']:.1g}",
        "encoding the prompt, forward + backward: fusedprompt": f"{encoding['fusedprompt_ms']:.3f} ms",
        "encoding the prompt, forward + backward: plain PyTorch": f"{encoding['pytorch_ms']:.3f} ms",
    }
    for op in ("lstm", "mlp", "splice"):
        running = [name for name, reason in explained.get(op, {}).items() if reason == "runs"]
        description[f"backend of op '{op}'"] = running[0] if running else "not used"
    return description


def print_together(together: Mapping[str, Any]) -> None:
    """Print what the prompts that were learned together achieved."""
    print(
        "5. Four prompts of different lengths, one per task, learned together in mixed batches: "
        f"{together['steps']} steps, {together['seconds']:.0f} s.\n"
        f"   One batch of {together['rows']:,} rows, each answered as its own prompt says, in "
        f"{together['seconds_to_answer']:.1f} s:"
    )
    for name, word, answer in together["examples"]:
        print(f"     {name:<12} {word}= {answer}")
    print(f"   Exact match: {percents(together['exact_match'])}.")


def percents(by_task: Mapping[str, float]) -> str:
    """Exact match of each task, for people."""
    return ", ".join(f"{name} {percent:.1f} %" for name, percent in by_task.items())


def draw_story(
    path: Path, pretraining: Curve, curves: Mapping[str, Curve], task: str, before: float, with_tag: float
) -> None:
    """Draw loss and exact match of the pre-training (top) and of the prompts (bottom) over time."""
    figure, axes = figures.new(2, 2)
    top, bottom = "Pre-training with the tag", f"P-tuning to '{task}', model frozen, no tag"
    _story_row(axes[0], top, {"all four tasks": (pretraining, "tab:green")})
    _story_row(axes[1], bottom, {f"{kind} encoder": (curve, COLORS[kind]) for kind, curve in curves.items()})
    axes[1][1].axhline(with_tag, color="gray", linestyle="--", label=f"with the tag, no prompt ({with_tag:.1f} %)")
    axes[1][1].axhline(before, color="gray", linestyle=":", label=f"without tag or prompt ({before:.1f} %)")
    figures.finish(figure, path, "training time (seconds)")


def _story_row(axes: Any, title: str, curves: Mapping[str, tuple[Curve, str]]) -> None:
    losses, matches = axes
    for label, (curve, color) in curves.items():
        losses.plot(curve.seconds, curve.loss, color=color, linewidth=1, label=label)
        matches.plot(curve.checked_seconds(), curve.checks, color=color, marker="o", markersize=3, label=label)
    losses.set(title=f"{title}: loss", yscale="log", ylabel="training loss (nats per byte)")
    matches.set(title=f"{title}: unseen words", ylim=(-5, 105), ylabel="exact match (% of words)")


def draw_text(path: Path, curve: Curve, encoder: str, without: float) -> None:
    """Draw the loss on training batches and on the held-out blocks over time."""
    figure, axes = figures.new(1, 1)
    axis, color = axes[0][0], COLORS[encoder]
    axis.plot(curve.seconds, curve.loss, color=color, alpha=0.35, label="training batch")
    axis.plot(curve.checked_seconds(), curve.checks, color=color, marker="o", label="held-out text")
    axis.axhline(without, color="gray", linestyle="--", label=f"held-out text without prompt ({without:.3f})")
    axis.set(title=f"P-tuning with the {encoder} encoder, model frozen", ylabel="loss (nats per token)")
    figures.finish(figure, path, "training time (seconds)")
