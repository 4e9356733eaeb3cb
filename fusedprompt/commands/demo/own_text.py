"""P-tune a language model of your own toward a text of your own."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import PromptEncoderConfig, PromptModel, get_prompt_model
from ..language_model import blocks_of, check_positions, load_base, load_tokenizer
from ..progress import quiet_transformers
from . import report, timing
from .training import train
from .words import IGNORED


@dataclass(frozen=True)
class TextSettings:
    """Options of `--model` with `--text`.

    virtual_tokens: length of the prompt. encoder: "MLP" or "LSTM". block_size: tokens in a row of text.
    steps, batch_size (blocks), learning_rate (the highest): of the training.
    """

    virtual_tokens: int = 16
    encoder: str = "MLP"
    block_size: int = 128
    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 2e-3


QUICK = {"steps": 5, "block_size": 16, "virtual_tokens": 4}


@dataclass(frozen=True)
class TextData:
    """A language model and the blocks of a text, (blocks, block_size) int64 each."""

    base: Any
    train: Tensor
    held_out: Tensor


def load(model: str, text: Path, settings: TextSettings) -> TextData:
    """Load a causal language model with its tokenizer, and cut a text into blocks, of which the last tenth is held out.

    Raises:
        ValueError: one of them cannot be loaded, or the text is too short; the message names the argument.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: expected a file of UTF-8 text, got {str(text)!r}: {error}") from error
    with quiet_transformers():
        tokenizer, base = load_tokenizer(model), load_base(model)
    check_positions(base.config, settings.virtual_tokens, settings.block_size, "--virtual-tokens + --block-size")
    blocks = blocks_of(content, tokenizer, settings.block_size, ("--text", "--block-size"))
    held_out = max(1, len(blocks) // 10)
    return TextData(base, blocks[:-held_out], blocks[-held_out:])


def run(data: TextData, settings: TextSettings, output: Path, seed: int, device: torch.device) -> dict[str, Any]:
    """P-tune, print the held-out loss without and with the prompt, and write adapter and curve below `output`.

    Returns:
        All numbers, ready for JSON. Losses are means in nats per token over every token of a block but its first,
        which a model without a prompt cannot predict.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    base = data.base.to(device)
    train_rows, held_out = data.train, data.held_out.to(device)
    without = held_out_loss(base, held_out, settings.batch_size)
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.virtual_tokens,
        encoder_reparameterization_type=settings.encoder,
    )
    model = get_prompt_model(base, config)
    trainable, total = model.get_nb_trainable_parameters()
    print(
        f"P-tuning {settings.virtual_tokens} virtual tokens ({trainable:,} of {total:,} parameters) on "
        f"{train_rows.numel():,} tokens; {held_out.numel():,} tokens are held out."
    )
    curve = train(
        model,
        {"input_ids": train_rows, "labels": labels(train_rows)},
        title="P-tuning",
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=seed,
        check=lambda: held_out_loss(model, held_out, settings.batch_size),
        check_every=max(1, settings.steps // 10),
    )
    model.save_pretrained(output / "adapter")
    reloaded = PromptModel.from_pretrained(model.get_base_model(), output / "adapter")
    with_prompt = held_out_loss(reloaded, held_out, settings.batch_size)
    report.print_table(
        [
            ["held-out text", "loss (nats per token)", "perplexity"],
            ["without prompt", f"{without:.4f}", f"{math.exp(without):.2f}"],
            ["with the prompt, saved and reloaded", f"{with_prompt:.4f}", f"{math.exp(with_prompt):.2f}"],
        ]
    )
    report.draw_text(output / "curves.png", curve, settings.encoder, without)
    encoder: Any = model.prompt_encoder["default"]
    return {
        "mode": "text",
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        **report.environment(device),
        "held_out_loss_without_prompt": without,
        "held_out_loss_with_prompt": with_prompt,
        "train_tokens": train_rows.numel(),
        "held_out_tokens": held_out.numel(),
        "trainable_parameters": trainable,
        "backends": timing.backends(encoder),
        "curve": dataclasses.asdict(curve),
        "total_seconds": time.perf_counter() - start,
    }


def labels(blocks: Tensor) -> Tensor:
    """Every token but the first of each block."""
    result = blocks.clone()
    result[:, 0] = IGNORED
    return result


def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Mean loss in nats per token, in eval mode."""
    model.eval()
    batches = torch.split(blocks, batch_size)
    with torch.no_grad():
        return sum(float(model(input_ids=rows, labels=labels(rows)).loss) * len(rows) for rows in batches) / len(blocks)
