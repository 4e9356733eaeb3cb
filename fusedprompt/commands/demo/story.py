"""The demo's story: pre-train a small language model on four tasks, freeze it, and let a prompt ask for one of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import PromptEncoderConfig, PromptModel, get_prompt_model
from .. import progress
from . import report, timing
from .training import Curve, Settings, train
from .words import TASKS, TOKENS, Task, Words, all_lines, exact_match, exact_matches, lines, load_words, rewrite_words


@progress.quiet_transformers()
def tell(settings: Settings, output: Path, task: Task, seed: int, device: torch.device) -> dict[str, Any]:
    """Run the story of prompts that ask for `task`, print it, and write models, adapters and curves below `output`.

    Returns:
        All its numbers, ready for JSON. Exact match is in percent, times in seconds unless a name ends in `_ms`.

    Raises:
        RuntimeError: a reloaded adapter computes something else than the one that was saved.
    """
    start = time.perf_counter()
    words = load_words(settings.words, settings.validation_words, settings.test_words, seed)
    print(
        f"1. {settings.words:,} words from the sources of Python's standard library; "
        f"{settings.test_words + settings.validation_words} of them are held out.\n"
        "2. Pre-training a small Llama to rewrite a word in the way that a tag byte tells:"
    )
    for each in TASKS.values():
        print(f"     {each.tag}{words.test[0]}=  ->  {each.rewrite(words.test[0])}   ({each.name})")
    base, pretraining = pretrain(settings, words, seed, device)
    base.save_pretrained(output / "base")
    with_tag = {
        each.name: exact_match(base, words.test, each, tagged=True)
        for each in progress.bar(TASKS.values(), desc="counting", unit="task")
    }
    before = exact_match(base, words.test, task, tagged=False)
    print(
        f"   {base.num_parameters():,} parameters, {pretraining.seconds[-1]:.0f} s. Exact match on "
        f"{settings.test_words} unseen words with the tag: {report.percents(with_tag)}.\n"
        f"   Without the tag it cannot know what is wanted: {before:.1f} %. From here on it is frozen.\n"
        f"3. P-tuning {settings.virtual_tokens} virtual tokens to ask for '{task.name}' in the tag's place:"
    )
    prompts = {kind: learn_prompt(settings, kind, words, task, output, seed, device) for kind in ("MLP", "LSTM")}
    report.print_prompts(prompts, before, with_tag[task.name])
    together = learn_together(settings, words, output, seed, device)
    report.print_together(together)
    curves = {kind: Curve(**prompt["curve"]) for kind, prompt in prompts.items()}
    report.draw_story(output / "curves.png", pretraining, curves, task.name, before, with_tag[task.name])
    return {
        "mode": "story",
        "task": task.name,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        **report.environment(device),
        "base_parameters": base.num_parameters(),
        "pretraining": dataclasses.asdict(pretraining),
        "exact_match_with_tag": with_tag,
        "exact_match_without_tag": before,
        "prompts": prompts,
        "together": together,
        "total_seconds": time.perf_counter() - start,
    }


def pretrain(settings: Settings, words: Words, seed: int, device: torch.device) -> tuple[Any, Curve]:
    """A small Llama that rewrites words as their tag tells, and how it learned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    # Rotary positions are relative: a word is read the same way wherever a prompt moves it.
    config = LlamaConfig(
        **TOKENS,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(device)
    curve = train(
        model,
        all_lines(words.train, tagged=True),
        title="pre-training",
        steps=settings.pretraining_steps,
        batch_size=settings.pretraining_batch,
        learning_rate=settings.pretraining_rate,
        seed=seed,
        check=lambda: statistics.fmean(exact_match(model, words.validation, task, True) for task in TASKS.values()),
        check_every=settings.pretraining_check_every,
    )
    return model, curve


def fresh_base(output: Path, device: torch.device) -> nn.Module:
    """A copy of the pre-trained model from disk."""
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(output / "base").to(device)
    return model


def learn_prompt(
    settings: Settings, kind: str, words: Words, task: Task, output: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """P-tune a prompt through one kind of encoder ("MLP" or "LSTM"), save it, load it again, and use it."""
    torch.manual_seed(seed)
    model = get_prompt_model(fresh_base(output, device), _config(settings, kind, settings.virtual_tokens))
    curve = train(
        model,
        lines(words.train, task, tagged=False),
        title=f"P-tuning, {kind}",
        steps=settings.prompt_steps,
        batch_size=settings.prompt_batch,
        learning_rate=settings.prompt_rate,
        seed=seed,
        check=lambda: exact_match(model, words.validation, task, tagged=False),
        check_every=settings.prompt_check_every,
        enough=settings.enough_percent,
    )
    folder = output / kind.lower()
    model.save_pretrained(folder)
    reloaded = PromptModel.from_pretrained(fresh_base(output, device), folder)
    difference = compare_models(model, reloaded, words, task)
    shown = words.test[: settings.examples]
    encoder: Any = model.prompt_encoder["default"]
    return {
        "exact_match_untrained": curve.checks[0],
        "exact_match": exact_match(reloaded, words.test, task, tagged=False),
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "seconds": curve.seconds[-1],
        "steps": len(curve.loss),
        "reloaded_largest_difference": difference,
        "examples": dict(zip(shown, rewrite_words(reloaded, shown, task, tagged=False))),
        "encoding": timing.compare_encoders(encoder, settings.timing_rounds),
        "backends": timing.backends(encoder),
        "curve": dataclasses.asdict(curve),
    }


def _config(settings: Settings, kind: str, length: int) -> PromptEncoderConfig:
    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=settings.encoder_width,
    )


def compare_models(saved: nn.Module, reloaded: nn.Module, words: Words, task: Task) -> float:
    """The largest difference of their logits on the test words' lines.

    Raises:
        RuntimeError: it is more than rounding could make it.
    """
    device = next(saved.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in lines(words.test, task, tagged=False).items()}
    with torch.no_grad():
        before, after = saved(**batch).logits, reloaded(**batch).logits
    difference = float((before - after).abs().max())
    if not difference <= 1e-5 * float(before.abs().max()):
        raise RuntimeError(f"the reloaded adapter's logits differ from the saved one's by {difference}")
    return difference


def learn_together(settings: Settings, words: Words, output: Path, seed: int, device: torch.device) -> dict[str, Any]:
    """P-tune one adapter per task in mixed batches, save and reload them, and answer one mixed batch."""
    model, reloaded = PromptModel(fresh_base(output, device)), PromptModel(fresh_base(output, device))
    torch.manual_seed(seed)
    for extra, name in enumerate(TASKS):
        # Prompts of different lengths, since they may be.
        model.add_adapter(name, _config(settings, "MLP", settings.virtual_tokens + extra))
    model.set_adapter(list(TASKS))
    curve = train(
        model,
        all_lines(words.train, tagged=False),
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
    }
