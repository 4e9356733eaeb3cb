"""`python -m fusedprompt inspect`: what is in an adapter, and which words its rows are nearest to."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..methods import checkpoint, method_of
from ..methods.checkpoint import ADAPTER_NAME, ENCODER_NAME, PROMPT_KEY, TEMPLATE_NAME, read_json, stored
from ..methods.config import CONFIG_NAME, PromptLearningConfig
from ..methods.method import CACHE
from . import options
from .language_model import load_base, load_tokenizer
from .progress import quiet_transformers
from .tune import settings as runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments without the program's name, and return the exit code: 1 if there is no such adapter.

    Wrong arguments leave by argparse's SystemExit.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fusedprompt inspect",
        description="What is in an adapter, of this package or of PEFT: method, sizes, base model, norms of its "
        "rows, and the words of the base model that each row is nearest to by cosine, the nearest first.",
        epilog="A row is no word: cosines of 0.1 mean little, and those of 0.9 that it has hardly moved from one.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the folder of an adapter, or one that holds several")
    add("--model", metavar="NAME_OR_PATH", help="the base model (that of the adapter's file)")
    add("--words", type=options.count, default=5, metavar="N", help="words for each row (%(default)s)")
    add("--no-words", action="store_true", help="read the adapter's files alone, without the base model")
    add("--json", action="store_true", help="print JSON, for scripts")
    args = parser.parse_args(argv)
    places = [args.folder, *(sorted(args.folder.glob("[!.]*/")) if args.folder.is_dir() else ())]
    folders = [place for place in places if stored(place, CONFIG_NAME).is_file()]
    try:
        if not folders:
            raise FileNotFoundError(f"{args.folder}: expected the folder of an adapter, with {CONFIG_NAME} in it")
        with quiet_transformers():
            reports = [examine(folder, args.model, 0 if args.no_words else args.words) for folder in folders]
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(reports, indent=2, ensure_ascii=False) if args.json else "\n\n".join(map(as_text, reports)))
    return 0


def examine(folder: Path, model: str | None, words: int) -> dict[str, Any]:
    """What is in an adapter, ready for JSON.

    Args:
        model: the base model; None for the one that the adapter's file names.
        words: for each row; 0 leaves the base model alone. If it cannot be loaded, `words` of the result says why.

    Raises:
        FileNotFoundError, TypeError, ValueError: the files are not those of an adapter.
    """
    fields = read_json(folder / CONFIG_NAME)
    peft_type = fields.pop("fusedprompt_peft_type", None) or fields.get("peft_type")
    config = PromptLearningConfig.from_dict({**fields, "peft_type": peft_type}, origin=str(folder / CONFIG_NAME))
    tensors, _ = checkpoint.read_tensors(stored(folder, ADAPTER_NAME))
    if PROMPT_KEY not in tensors:
        raise ValueError(f"{folder / ADAPTER_NAME}: expected the tensor {PROMPT_KEY!r}, got {sorted(tensors)}")
    prompt = tensors[PROMPT_KEY].float()
    known, method = runs.read(folder), method_of(config)
    has_encoder = method.keeps_encoder(config) and stored(folder, ENCODER_NAME).is_file()
    report: dict[str, Any] = {
        "folder": str(folder),
        "method": str(getattr(peft_type, "value", peft_type)),
        "task": None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type)),
        "base": model or config.base_model_name_or_path,
        "tensors": {name: [*value.shape] for name, value in sorted(tensors.items())},
        "dtype": str(tensors[PROMPT_KEY].dtype).removeprefix("torch."),
        "can be trained on": has_encoder or method.from_prompt is not None,
        "template": stored(folder, TEMPLATE_NAME).is_file(),
    }
    if known is not None:
        report["tuned"] = {"template": known["settings"]["template"], "data": known["data"], **known.get("result", {})}
    if method.product == CACHE:
        return {**report, "layers": _layers(prompt, config)}
    report["rows"] = [{"norm": norm} for norm in prompt.norm(dim=1).tolist()]
    if words:
        try:
            _add_words(report, prompt, words)
        except (ValueError, OSError) as error:
            report["words"] = f"none: {error}"
    return report


def _layers(prompt: Tensor, config: Any) -> list[dict[str, float]]:
    """Mean norms of a prefix's keys and values, (N, 2 L D), in each layer."""
    norms = prompt.view(prompt.shape[0], 2 * config.num_layers, -1).norm(dim=2).mean(0)
    return [{"keys": keys, "values": values} for keys, values in norms.view(-1, 2).tolist()]


def _add_words(report: dict[str, Any], prompt: Tensor, count: int) -> None:
    """The nearest words of each row, (R, D), and the median norm of all words."""
    if not report["base"]:
        raise ValueError("the adapter's file names no base model; say it by --model")
    tokenizer, base = load_tokenizer(report["base"]), load_base(report["base"])
    table = base.get_input_embeddings().weight.detach().float()
    if table.shape[1] != prompt.shape[1]:
        raise ValueError(f"--model: expected embeddings of width {prompt.shape[1]}, got {table.shape[1]}")
    report["median norm of words"] = statistics.median(table.norm(dim=1).tolist())
    cosines = F.normalize(prompt, dim=1) @ F.normalize(table, dim=1).T
    best = cosines.topk(min(count, table.shape[0]), dim=1)
    for row, values, ids in zip(report["rows"], best.values.tolist(), best.indices.tolist()):
        row["words"] = [[tokenizer.decode([token]), value] for token, value in zip(ids, values)]


def as_text(report: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"{report['folder']}: {report['method']} for {report['task']}, on {report['base']}"]
    for name, shape in report["tensors"].items():
        lines.append(f"  {name}  {' x '.join(map(str, shape))}" + f"  {report['dtype']}" * (name == PROMPT_KEY))
    trained = "yes" if report["can be trained on"] else f"no: {ENCODER_NAME} is not there"
    lines.append(f"  can be trained on: {trained}")
    if report["template"]:
        lines.append(f"  stands where {TEMPLATE_NAME} says")
    for name, value in report.get("tuned", {}).items():
        lines.append(f"  tuned, {name.replace('_', ' ')}: {value if name != 'template' else repr(value)}")
    for index, layer in enumerate(report.get("layers", ())):
        lines.append(f"  layer {index}: norm of keys {layer['keys']:.3f}, of values {layer['values']:.3f}")
    if "median norm of words" in report:
        lines.append(f"  norm of a word, median: {report['median norm of words']:.3f}")
    for index, row in enumerate(report.get("rows", ())):
        near = "  ".join(f"{word!r} {cosine:.2f}" for word, cosine in row.get("words", ()))
        lines.append(f"  row {index:>3}  norm {row['norm']:.3f}  {near}".rstrip())
    if "words" in report:
        lines.append(f"  words: {report['words']}")
    return "\n".join(lines)
