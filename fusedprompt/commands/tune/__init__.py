"""`python -m fusedprompt tune`: a soft prompt from a file of examples, in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import options
from ..progress import quiet_transformers
from . import settings as runs
from .job import run
from .settings import METHODS, RATES

PACKAGES = ("transformers", "accelerate", "tqdm", "matplotlib")
_EXAMPLES = r"""examples:
  a column of a table from another one, such as sentiments of reviews:
    fusedprompt tune --model Qwen/Qwen3-0.6B --data reviews.csv --out my-prompt \
        --template "Review: {text}\nSentiment: {label}"
  the same by another method, with other rows to watch it by:
    fusedprompt tune --model Qwen/Qwen3-0.6B --data train.jsonl --held-out-data test.jsonl --out my-prefix \
        --method prefix --template "Review: {text}\nSentiment: {label}"
  a text, to write in its way:
    fusedprompt tune --model Qwen/Qwen3-0.6B --data novel.txt --method prompt-tuning --out my-novel
  the same command goes on where it was stopped or killed, and ends with the same prompt.
then:
    fusedprompt generate --adapter my-prompt "a fine film"
    fusedprompt inspect my-prompt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments without the program's name, and return the exit code: 130 after Ctrl-C.

    Wrong arguments and data leave by argparse's SystemExit, with a message that names them, before anything is written.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if missing := options.missing("tune", PACKAGES, "tune"):
        print(f"error: {missing}", file=sys.stderr)
        return 1
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads_before)
    try:
        with quiet_transformers():
            return run(args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        begun = (args.out / runs.FILE).is_file()
        print(
            "\nstopped; " + ("the same command goes on from the last interval" if begun else "nothing was written"),
            file=sys.stderr,
        )
        return 130
    finally:
        torch.set_num_threads(threads_before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedprompt tune",
        usage="python -m fusedprompt tune --model NAME_OR_PATH --data FILE --out DIR [--template TEXT] [OPTIONS]",
        description="Learn a soft prompt for a causal language model, which itself is not changed, from a file of "
        "examples. The prompt with the lowest loss on rows that it was not trained on is kept, in PEFT's format.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME_OR_PATH", help="a causal language model for transformers")
    add("--data", required=True, type=Path, metavar="FILE", help="rows (.jsonl, .csv with names), or a text (.txt)")
    add(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="a new folder for the prompt, or that of a run that was stopped",
    )
    add("--method", choices=METHODS, default="p-tuning", help="what is learned (%(default)s); see docs/methods.md")
    meaning = r'how a row is written, such as "Review: {text}\nSentiment: {label}": the last column is what is learned'
    add("--template", metavar="TEXT", help=meaning)

    group = parser.add_argument_group("the rows")
    group.add_argument("--held-out-data", type=Path, metavar="FILE", help="rows to watch it by (a part of --data)")
    part = options.number("a number between 0 and 1", lambda value: 0 < value < 1)
    group.add_argument(
        "--held-out", type=part, default=0.1, metavar="PART", help="or this part of --data (%(default)s)"
    )
    meaning = "tokens of a row, without the prompt (%(default)s); of a text, in each of the rows that it is cut into"
    group.add_argument("--max-length", type=options.count, default=256, metavar="N", help=meaning)
    group.add_argument("--skip-long", action="store_true", help="leave out rows that are longer")

    group = parser.add_argument_group("the prompt")
    group.add_argument("--virtual-tokens", type=options.count, default=20, metavar="N", help="its length (%(default)s)")
    meaning = "of p-tuning, what makes the prompt (%(default)s)"
    group.add_argument("--encoder", type=str.upper, choices=("MLP", "LSTM"), default="MLP", help=meaning)
    meaning = "of prompt-tuning and prefix, a text to begin with: an instruction, say"
    group.add_argument("--init-text", metavar="TEXT", help=meaning)
    meaning = "of cpt, rows that the prompt is made of (%(default)s)"
    group.add_argument("--examples", type=options.count, default=8, metavar="N", help=meaning)

    group = parser.add_argument_group("the training")
    group.add_argument("--steps", type=options.count, default=300, metavar="N", help="at most (%(default)s)")
    group.add_argument("--batch-size", type=options.count, default=8, metavar="N", help="rows in a step (%(default)s)")
    usual = ", ".join(f"{rate:g} for {method}" for method, rate in RATES.items())
    meaning = f"the highest of the schedule ({usual})"
    group.add_argument("--learning-rate", type=options.positive, metavar="X", help=meaning)
    meaning = "steps between two looks at the held-out rows, each of which is saved (a twentieth of --steps)"
    group.add_argument("--interval", type=options.count, metavar="N", help=meaning)
    meaning = "stop when so many intervals have brought nothing (%(default)s); 0: never"
    group.add_argument("--patience", type=_whole, default=5, metavar="N", help=meaning)
    group.add_argument("--seed", type=_whole, default=0, metavar="N", help="of every random number (%(default)s)")
    meaning = "of the model's weights; auto is that of its files (%(default)s)"
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=meaning)
    group.add_argument("--device", type=options.device, default="auto", metavar="NAME", help="cpu, cuda, or auto")
    group.add_argument("--threads", type=options.count, metavar="N", help="CPU threads (PyTorch's choice)")
    meaning = "held-out rows to answer at the end, and to count the right ones of (%(default)s)"
    group.add_argument("--answers", type=_whole, default=20, metavar="N", help=meaning)
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)
