"""The training loop of the demo, and what it records."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import progress

LINES = 5  # of a training without a terminal


@dataclass(frozen=True)
class Settings:
    """Sizes, chosen so that all of it takes about three minutes on two CPU cores."""

    words: int = 12_000
    validation_words: int = 250
    test_words: int = 500
    width: int = 128
    layers: int = 3
    heads: int = 4
    pretraining_steps: int = 700
    pretraining_batch: int = 192
    pretraining_rate: float = 4e-3
    pretraining_check_every: int = 50
    virtual_tokens: int = 8
    encoder_width: int = 128
    prompt_steps: int = 300
    prompt_batch: int = 64
    prompt_rate: float = 1e-2
    prompt_check_every: int = 10
    together_steps: int = 300
    together_batch: int = 128
    together_check_every: int = 100
    enough_percent: float = 99.0
    timing_rounds: int = 100
    examples: int = 5


QUICK = Settings(
    words=1_000,
    validation_words=20,
    test_words=40,
    width=32,
    layers=1,
    heads=2,
    pretraining_steps=40,
    pretraining_batch=32,
    pretraining_check_every=20,
    encoder_width=16,
    prompt_steps=12,
    prompt_batch=16,
    prompt_check_every=4,
    together_steps=4,
    together_batch=16,
    timing_rounds=5,
)


@dataclass
class Curve:
    """What happened in a training.

    loss: of each step's batch, in nats per token.
    seconds: at the end of each step, counting the steps alone and not the checks between them.
    checked_steps: after how many steps there was a check; the first is after none.
    checks: what each check found.
    """

    loss: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    checked_steps: list[int] = dataclasses.field(default_factory=list)
    checks: list[float] = dataclasses.field(default_factory=list)

    def checked_seconds(self) -> list[float]:
        """When each check was, on the clock of `seconds`."""
        return [0.0 if step == 0 else self.seconds[step - 1] for step in self.checked_steps]


def train(
    model: nn.Module,
    data: dict[str, Tensor],
    *,
    title: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    check: Callable[[], float],
    check_every: int,
    enough: float = math.inf,
    adapter_names: Sequence[str] | None = None,
) -> Curve:
    """Train those parameters of a model that require gradients, and leave it in eval mode.

    Args:
        data: the model's arguments by name, each (rows, T); a step takes `batch_size` random rows.
        title: shown beside the progress bar, or without a terminal in each of `LINES` lines.
        learning_rate: the highest; it rises over the first tenth of the steps and falls to zero along a cosine.
        check: called every `check_every` steps, before the first, and after the last.
        enough: stop when two checks in a row reach this.
        adapter_names: the adapter of each row of the data; None for a model that has one for all.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    data = {name: tensor.to(device) for name, tensor in data.items()}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    generator = torch.Generator("cpu").manual_seed(seed)
    count = len(data["input_ids"])
    curve = Curve(checked_steps=[0], checks=[check()])
    elapsed = 0.0
    with progress.bar(total=steps, desc=title, unit="step") as shown:
        for step in range(1, steps + 1):
            start = time.perf_counter()
            model.train()
            drawn = torch.randint(count, (batch_size,), generator=generator, device="cpu")
            rows = drawn.to(device)
            names = {} if adapter_names is None else {"adapter_names": [adapter_names[row] for row in drawn.tolist()]}
            loss = model(**{name: tensor[rows] for name, tensor in data.items()}, **names).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            curve.loss.append(loss.item())
            elapsed += time.perf_counter() - start
            curve.seconds.append(elapsed)
            shown.update()
            if not progress.is_shown() and step % max(1, steps // LINES) == 0:
                print(f"   {title}: step {step}/{steps}, loss {curve.loss[-1]:.3f}", flush=True)
            if step % check_every == 0 or step == steps:
                model.eval()
                curve.checked_steps.append(step)
                curve.checks.append(check())
                shown.set_postfix(loss=f"{curve.loss[-1]:.3f}", check=f"{curve.checks[-1]:.1f}")
                if min(curve.checks[-2:]) >= enough:
                    break
    model.eval()
    return curve
