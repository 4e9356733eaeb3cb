"""`python -m fusedprompt demo`: teach a frozen language model, by a soft prompt, which of its tasks you want.

With `--model` and `--text` it P-tunes a causal language model of your own toward a text of your own instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import options
from . import own_text, report, story
from .own_text import TextSettings
from .training import QUICK, Settings
from .words import TASKS

PACKAGES = ("transformers", "tqdm", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo on arguments without the program's name (None: the command line's), and return the exit code.

    Wrong arguments leave by argparse's SystemExit, with a message that names the argument.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    text_options = {f.name: getattr(args, f.name) for f in dataclasses.fields(TextSettings) if f.name in args}
    if (args.model is None) != (args.text is None):
        parser.error("--model, --text: expected both or neither")
    if args.model is None and text_options:
        names = ", ".join("--" + name.replace("_", "-") for name in text_options)
        parser.error(f"{names}: expected only with --model and --text")
    if missing := options.missing("the demo", PACKAGES, "demo"):
        print(f"error: {missing}", file=sys.stderr)
        return 1
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: expected a folder to write to, got {str(args.output)!r}: {error.strerror}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads_before)
    try:
        if args.model is None:
            settings = QUICK if args.quick else Settings()
            summary = story.tell(settings, args.output, TASKS[args.task], args.seed, args.device)
        else:
            text_settings = TextSettings(**{**(own_text.QUICK if args.quick else {}), **text_options})
            try:
                data = own_text.load(args.model, args.text, text_settings)
            except ValueError as error:
                parser.error(str(error))
            summary = own_text.run(data, text_settings, args.output, args.seed, args.device)
    finally:
        torch.set_num_threads(threads_before)
    report.write_json(args.output / "summary.json", summary)
    print(
        f"\nDone in {summary['total_seconds']:.0f} s. Curves: {args.output / 'curves.png'}. All numbers: "
        f"{args.output / 'summary.json'}. Adapters are beside them."
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedprompt demo",
        description="A small language model learns four tasks and is frozen; a soft prompt, learned by gradient, makes "
        "it do the one you want. Takes about three minutes on two CPU cores and downloads nothing.",
    )
    add = parser.add_argument
    add("--output", type=Path, default="fusedprompt-demo", metavar="DIR", help="where results go (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of every random number (%(default)s)")
    add("--threads", type=options.count, metavar="N", help="CPU threads (PyTorch's choice)")
    add(
        "--device",
        type=options.device,
        default="auto",
        help="cpu, cuda, or auto: cuda where it is (%(default)s)",
    )
    add("--quick", action="store_true", help="go through every stage in seconds, too fast to learn much")
    add("--task", choices=list(TASKS), default="reverse", help="what the prompt shall ask for (%(default)s)")

    group = parser.add_argument_group("your own model and text, instead of the four tasks")
    group.add_argument("--model", metavar="NAME_OR_PATH", help="a causal language model for transformers")
    group.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; its last tenth is held out")
    defaults = TextSettings()
    for name, kind, meaning in (
        ("virtual_tokens", options.count, "length of the prompt"),
        ("block_size", options.count, "tokens in a row of text"),
        ("steps", options.count, "optimizer steps"),
        ("batch_size", options.count, "rows of text in a step"),
        ("learning_rate", options.positive, "the highest of the schedule"),
    ):
        option, meaning = "--" + name.replace("_", "-"), f"{meaning} ({getattr(defaults, name)})"
        group.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar="N", help=meaning)
    meaning = f"what makes the prompt ({defaults.encoder})"
    group.add_argument("--encoder", choices=["MLP", "LSTM"], default=argparse.SUPPRESS, help=meaning)
    return parser
