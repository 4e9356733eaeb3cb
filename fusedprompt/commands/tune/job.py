"""One run from beginning to end: all is read and checked first, then written into the run's folder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..answers import answers
from ..language_model import check_positions, load_base, load_tokenizer
from . import curve, training
from . import settings as runs
from .data import Row, Source
from .prepare import Material, prepare
from .settings import RATES, Settings
from .template import TextTemplate


def run(args: argparse.Namespace) -> int:
    """Tune by the command's arguments; returns its exit code.

    Raises:
        ValueError: an argument or the data is not what it must be; the message names it, and nothing was written.
    """
    source = Source.read(args.data)
    watched = None if args.held_out_data is None else Source.read(args.held_out_data, "--held-out-data")
    settings, folder = settings_of(args, source, watched), args.out
    known = runs.read(folder)
    if known is None:
        runs.check_new(folder)
    else:
        runs.check_same(folder, known, settings)
        if "result" in known:
            print(f"{folder} is done: {_summary(known)}")
            return 0
    tokenizer = load_tokenizer(settings.model)
    material = prepare(settings, source, watched, tokenizer)
    base = load_base(settings.model, dtype=settings.dtype)
    rows = len(material.context.get("cpt_token_ids", ())) or settings.virtual_tokens
    check_positions(base.config, rows, material.longest, "--virtual-tokens + the longest row")
    model = training.prompt_model(settings, material, base, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    with runs.alone_in(folder):
        if known is None:
            known = {"settings": dataclasses.asdict(settings), "data": str(args.data)}
            runs.write(folder, known)
        _carry_out(settings, material, model, tokenizer, folder, known, args)
    if material.writer is not None and args.answers:
        show(model, tokenizer, material, TextTemplate(settings.template or ""), args.answers)
    print(f"Try it: fusedprompt generate --adapter {folder}; what is in it: fusedprompt inspect {folder}")
    return 0


def _carry_out(
    settings: Settings,
    material: Material,
    model: Any,
    tokenizer: Any,
    folder: Path,
    known: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """What is written: the loss without a prompt, checkpoints, and in the end the best of them as adapter and curve."""
    trainer = training.new_trainer(settings, material, model, tokenizer, folder, args.device.type == "cpu")
    if "held_out_loss_without_prompt" not in known:
        known["held_out_loss_without_prompt"] = training.loss_without_prompt(trainer)
        runs.write(folder, known)
    _begin(settings, material, model, known, training.last_checkpoint(folder))
    intervals = training.train(trainer, settings, folder)
    _finish(settings, model, folder, known, intervals)


def settings_of(args: argparse.Namespace, source: Source, watched: Source | None) -> Settings:
    """The settings of a run, from the command's arguments.

    Raises:
        ValueError: some of them do not go together.
    """
    files = {"--data": source, "--held-out-data": watched}
    for argument, file in files.items():
        if file is not None and file.is_plain_text and args.template is not None:
            raise ValueError(f"--template: expected none with a text, {argument} {str(file.path)!r}")
        if file is not None and not file.is_plain_text and args.template is None:
            raise ValueError(
                f"--template: expected a text with columns of {str(file.path)!r} in braces, such as "
                r"'Review: {text}\nSentiment: {label}', got none"
            )
    if args.method == "cpt" and args.template is None:
        raise ValueError("--method: expected another one than cpt with a text: its prompt is made of rows")
    if args.init_text is not None and args.method not in ("prompt-tuning", "prefix"):
        raise ValueError(f"--init-text: expected with --method prompt-tuning or prefix, got it with {args.method}")
    return Settings(
        model=args.model,
        data=source.sha256,
        method=args.method,
        template=None if args.template is None else TextTemplate(args.template).text,
        held_out_data=None if watched is None else watched.sha256,
        virtual_tokens=args.virtual_tokens,
        encoder=args.encoder,
        init_text=args.init_text,
        examples=args.examples,
        max_length=args.max_length,
        skip_long=args.skip_long,
        held_out=args.held_out,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate or RATES[args.method],
        interval=min(args.steps, args.interval or max(1, args.steps // 20)),
        patience=args.patience,
        dtype=args.dtype,
        seed=args.seed,
    )


def _begin(settings: Settings, material: Material, model: Any, known: dict[str, Any], checkpoint: Any) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    print(
        f"{settings.method} of {settings.model}: {model.prompts['default'].rows} virtual tokens, "
        f"{trainable:,} trained parameters beside {total - trainable:,} frozen ones.\n"
        f"{len(material.train)} rows to train on, {len(material.held_out)} held out"
        + (f", {material.skipped} left out because they are too long" if material.skipped else "")
        + f". Held-out loss without a prompt: {known['held_out_loss_without_prompt']:.4f}."
    )
    if checkpoint is not None:
        print(f"Going on from step {checkpoint.name.rpartition('-')[2]} of {settings.steps}.")


def _finish(settings: Settings, model: Any, folder: Any, known: dict[str, Any], intervals: list[curve.Point]) -> None:
    """Adapter, table and picture; and at last that the run is done."""
    kept = curve.best(intervals)
    assert kept is not None
    model.save_pretrained(folder)
    runs.write_text(folder / "curve.csv", curve.as_csv(intervals))
    curve.draw(
        folder / "curve.png", intervals, known["held_out_loss_without_prompt"], f"{settings.method}, {settings.model}"
    )
    known["result"] = {"steps": intervals[-1].step, "kept_step": kept.step, "held_out_loss": kept.held_out}
    runs.write(folder, known)
    print(f"{folder}: {_summary(known)}")


def _summary(known: dict[str, Any]) -> str:
    result, asked = known["result"], known["settings"]["steps"]
    early = "" if result["steps"] == asked else f" (of {asked}: it brought nothing more)"
    return (
        f"{result['steps']} steps{early}; the prompt of step {result['kept_step']}: held-out loss "
        f"{result['held_out_loss']:.4f}, without it {known['held_out_loss_without_prompt']:.4f}."
    )


def show(model: Any, tokenizer: Any, material: Material, template: TextTemplate, count: int) -> None:
    """Answer held-out rows without and with the prompt, print how many are right, and some of the answers."""
    assert material.writer is not None
    rows = material.held_out_rows[:count]
    questions = [material.writer.question(row.fields) for row in rows]
    if not all(questions):
        return
    longest = max(sum(label >= 0 for label in ids["labels"]) for ids in material.held_out)

    def written() -> list[str]:
        texts = answers(model, tokenizer, questions, longest + 1)
        return [text.removesuffix(template.behind).strip() for text in texts]

    with model.disable_adapter():
        before = right(written(), rows, template)
    after = written()
    print(f"Held-out answers that are right: {right(after, rows, template)} of {len(rows)}, without a prompt {before}.")
    for row, text in list(zip(rows, after))[:5]:
        print(f"  {text!r} ({row.fields[template.answer].strip()!r}) for {template.question(row.fields)[-60:]!r}")


def right(texts: Sequence[str], rows: Sequence[Row], template: TextTemplate) -> int:
    """How many texts are the answers of rows."""
    return sum(text == row.fields[template.answer].strip() for text, row in zip(texts, rows))
