"""The demo's last act: an adapter for each task, trained together, and one batch in which each row has its own."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from ... import PromptModel, get_prompt_model
from .training import Curve, Settings, train
from .words import TASKS, Words, lines, rewrite_words


def learn_all(
    settings: Settings, base: Any, fresh: Any, words: Words, output: Path, seed: int, device: torch.device
) -> tuple[dict[str, Any], Curve]:
    """P-tune one adapter per task in mixed batches, save and reload them, and answer one mixed batch.

    Args:
        base, fresh: two copies of the pre-trained model, to train on and to load the adapters into.

    Returns:
        Exact match by task, examples, times; and how they learned.
    """
    torch.manual_seed(seed)
    # Prompts of different lengths, since they may be.
    configs = {name: settings.prompt("MLP", extra) for extra, name in enumerate(TASKS)}
    first, *others = configs
    model = get_prompt_model(base, configs[first], first)
    for name in others:
        model.add_adapter(name, configs[name])
    model.set_adapter(list(TASKS))
    curve = train(
        model,
        lines(words.train, [*TASKS.values()], False, device),
        title="P-tuning four prompts",
        steps=settings.together_steps,
        batch_size=settings.together_batch,
        learning_rate=settings.prompt_rate,
        seed=seed,
        check=lambda: min(exact_matches(model, words.validation).values()),
        check_every=settings.together_check_every,
        enough=settings.enough_percent,
        adapter_names=[name for name in TASKS for _ in words.train],
    )
    folder = output / "together"
    model.save_pretrained(folder)
    reloaded = PromptModel(fresh)
    for name in TASKS:
        reloaded.load_adapter(folder / name, name)
    reloaded.eval()
    start = time.perf_counter()
    right = exact_matches(reloaded, words.test)
    seconds = time.perf_counter() - start
    shown = words.test[: len(TASKS)]
    answers = rewrite_words(reloaded, shown, TASKS["upper"], tagged=False, adapter_names=list(TASKS))
    return {
        "exact_match": right,
        "rows": len(TASKS) * len(words.test),
        "seconds_to_answer": seconds,
        "seconds": curve.seconds[-1],
        "steps": len(curve.loss),
        "examples": [list(row) for row in zip(TASKS, shown, answers)],
        "curve": dataclasses.asdict(curve),
    }, curve


def exact_matches(model: PromptModel, words: list[str]) -> dict[str, float]:
    """Percentage of right answers by task: every word for every task, all in one batch."""
    rows = [(name, word) for word in words for name in TASKS]
    names, asked = [name for name, _ in rows], [word for _, word in rows]
    answers = rewrite_words(model, asked, TASKS["upper"], tagged=False, adapter_names=names)
    right = dict.fromkeys(TASKS, 0)
    for (name, word), answer in zip(rows, answers):
        right[name] += answer == TASKS[name].rewrite(word)
    return {name: 100.0 * count / len(words) for name, count in right.items()}


def describe(together: dict[str, Any]) -> str:
    """What it did, for people."""
    percents = ", ".join(f"{name} {percent:.1f} %" for name, percent in together["exact_match"].items())
    examples = "\n".join(f"     {name:<12} {word}= {answer}" for name, word, answer in together["examples"])
    return (
        "5. Four prompts of different lengths, one per task, learned together in mixed batches: "
        f"{together['steps']} steps, {together['seconds']:.0f} s.\n"
        f"   One batch of {together['rows']:,} rows, each answered as its own prompt says, in "
        f"{together['seconds_to_answer']:.1f} s:\n{examples}\n   Exact match: {percents}."
    )
