"""`python -m fusedprompt generate`: write with a soft prompt: answers to rows or texts, or on from a text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..layouts.tokenizer import encode, learn
from ..methods.checkpoint import read_json
from ..methods.config import CONFIG_NAME
from ..model.prompt_model import PromptModel
from . import options
from .answers import answers
from .language_model import load_base, load_tokenizer
from .progress import quiet_transformers
from .tune import settings as runs
from .tune.data import Source
from .tune.template import TextTemplate, Writer, writer_of

_EXAMPLES = """examples:
    fusedprompt generate --adapter my-prompt "a fine film"        one text, or several
    fusedprompt generate --adapter my-prompt --data test.jsonl    rows with the columns of the question
    sort -u texts | fusedprompt generate --adapter my-prompt -    a text a line
    fusedprompt generate --adapter some/peft-adapter --raw "Once upon a time"
A prompt that was tuned with a template gets its texts in it, and what is written is the answer.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments without the program's name, and return the exit code.

    Wrong arguments leave by argparse's SystemExit, with a message that names them.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if missing := options.missing("generate", ("transformers", "tqdm"), "demo"):
        print(f"error: {missing}", file=sys.stderr)
        return 1
    if bool(args.text) == (args.data is not None):
        parser.error("TEXT, --data: expected one of them; - reads a text a line from the standard input")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads_before)
    try:
        with quiet_transformers():
            return _run(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        torch.set_num_threads(threads_before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedprompt generate",
        description="Write with a base model and an adapter of this package or of PEFT.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="*", metavar="TEXT", help="texts to answer or to go on from; - for a text a line from the input")
    add("--adapter", required=True, type=Path, metavar="DIR", help="the folder of an adapter")
    add("--model", metavar="NAME_OR_PATH", help="the base model (that of the adapter's file)")
    add("--data", type=Path, metavar="FILE", help="rows (.jsonl, .csv with names), or a text a line (.txt)")
    add("--raw", action="store_true", help="go on from texts as they are, without the template of the tuning")
    add("--max-new-tokens", type=options.count, default=64, metavar="N", help="tokens to write at most (%(default)s)")
    meaning = "of sampling; 0 takes the most likely token (%(default)s)"
    kind = options.number("a number >= 0", lambda value: value >= 0)
    add("--temperature", type=kind, default=0.0, metavar="X", help=meaning)
    add("--seed", type=int, default=0, metavar="N", help="of sampling (%(default)s)")
    add(
        "--batch-size",
        type=options.count,
        default=8,
        metavar="N",
        help="texts answered together (%(default)s)",
    )
    add("--json", action="store_true", help="print a JSON object a line: the columns, and what was written as 'answer'")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of the model's weights (that of the tuning, or auto)")
    add("--device", type=options.device, default="auto", metavar="NAME", help="cpu, cuda, or auto (%(default)s)")
    add("--threads", type=options.count, metavar="N", help="CPU threads (PyTorch's choice)")
    return parser


def _run(args: argparse.Namespace) -> int:
    known = runs.read(args.adapter)
    settings: dict[str, Any] = {} if known is None else known["settings"]
    config = read_json(args.adapter / CONFIG_NAME)
    name = args.model or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"--model: expected the base model, because {args.adapter / CONFIG_NAME} names none")
    template = None if args.raw or settings.get("template") is None else TextTemplate(settings["template"])
    rows = _rows(args, template)
    tokenizer = load_tokenizer(name)
    writer = None if template is None else writer_of(settings["method"], template, tokenizer)
    questions = [_question(row, writer, tokenizer) for row in rows]
    base = load_base(name, dtype=args.dtype or settings.get("dtype", "auto"))
    model = PromptModel.from_pretrained(base.to(args.device), args.adapter)
    torch.manual_seed(args.seed)
    written = answers(
        model, tokenizer, questions, args.max_new_tokens, batch_size=args.batch_size, temperature=args.temperature
    )
    for row, text in zip(rows, written):
        shown = text if template is None else text.removesuffix(template.behind).strip()
        print(json.dumps({**row, "answer": shown}, ensure_ascii=False) if args.json else shown)
    return 0


def _rows(args: argparse.Namespace, template: TextTemplate | None) -> list[dict[str, str]]:
    """The columns of each question, or with no template its `text`.

    Raises:
        ValueError: they cannot be read, or texts are given for several columns.
    """
    source = None if args.data is None else Source.read(args.data)
    if source is not None and not source.is_plain_text:
        return [row.fields for row in source.rows(["text"] if template is None else template.asked)]
    if template is not None and len(template.asked) != 1:
        raise ValueError(
            f"TEXT: expected rows by --data (.jsonl, .csv), because the template asks for the columns {template.asked}"
        )
    column = "text" if template is None else template.asked[0]
    texts = list(args.text) if source is None else source.text.splitlines()
    if texts == ["-"]:
        texts = sys.stdin.read().splitlines()
    rows = [{column: text} for text in texts if text.strip()]
    if not rows:
        raise ValueError("TEXT: expected a text, got none")
    return rows


def _question(row: Mapping[str, str], writer: Writer | None, tokenizer: Any) -> list[int]:
    if writer is not None:
        return writer.question(row)
    return [*learn(tokenizer, pair=False).before, *encode(tokenizer, [row["text"]])[0]]
