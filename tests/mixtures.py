"""Models with several adapters, rows of a batch alone, and what mixed batches are compared with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fusedprompt
from models import build, config_fields, tokens
from tolerance import largest

BASE = "__base__"
ADAPTERS = {"short": ("PROMPT", 2), "long": ("MLP", 5), "again": ("PROMPT", 5), "lstm": ("LSTM", 3)}
ROUTES = ("splice", "shared")


def mixed(family: str, task: str = "CAUSAL_LM", adapters: tuple[str, ...] = tuple(ADAPTERS), **overrides: Any) -> Any:
    """A model with adapters of different lengths and kinds, all of them to be trained."""
    torch.manual_seed(3)
    model: Any = None
    base = build(family, task, **overrides)
    for name in adapters:
        method, rows = ADAPTERS[name]
        kind, fields = config_fields(method, task, rows)
        config = getattr(fusedprompt, kind)(**fields)
        if model is None:
            model = fusedprompt.get_prompt_model(base, config, name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():  # prompts and heads that differ visibly
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.set_adapter(list(adapters))
    return model.eval()


def alone(model: Any, name: str, **inputs: Any) -> Any:
    """One row with its own adapter, or with none."""
    if name == BASE:
        with model.disable_adapter():
            return model(**inputs)
    trains = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trains[key])
    return model(**inputs, route="splice")


def padded(lengths: list[int], left: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Rows of ids with padding on both sides, and their mask."""
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, (length, start) in enumerate(zip(lengths, left)):
        ids[row, start : start + length] = tokens(1, length, seed=row)[0]
        mask[row, start : start + length] = 1
    return ids, mask


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = largest(found[name] - value)
        assert error <= tolerance * max(largest(value), 1e-2), f"{name}: error {error:.3g} of {largest(value):.3g}"


def check_language_model(
    model: Any, names: list[str], ids: Tensor, mask: Tensor, route: str, tolerance: float = 2e-5
) -> None:
    """Text logits, the loss over all rows' tokens, and every gradient."""
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    given = {} if bool(mask.all()) else {"attention_mask": mask}
    output = model(input_ids=ids, labels=labels, adapter_names=names, route=route, logits="text", **given)
    output.loss.backward()
    found = {"loss": output.loss.detach(), **gradients(model)}
    logits = [output.logits[row][mask[row] != 0].detach() for row in range(len(names))]

    model.zero_grad()
    losses, count = [], 0
    for row, name in enumerate(names):
        text = ids[row : row + 1, mask[row] != 0]
        own = alone(model, name, input_ids=text).logits[0]
        assert_close({f"logits of row {row}": logits[row]}, {f"logits of row {row}": own[-text.shape[1] :]}, tolerance)
        # Prompt or not, each position predicts the token behind it.
        targets = text[0, 1:] if name == BASE else text[0]
        losses.append(cross_entropy(own[-text.shape[1] - (name != BASE) : -1], targets, reduction="sum"))
        count += len(targets)
    loss = torch.stack(losses).sum() / count
    loss.backward()
    assert_close(found, {"loss": loss.detach(), **gradients(model)}, tolerance)


NAMES = ["long", BASE, "short", "long", "lstm"]
PADDED = {
    "whole": ([6] * 5, [0] * 5, 6),
    "right": ([6, 3, 5, 1, 4], [0] * 5, 6),
    "left": ([6, 3, 5, 1, 4], [0, 3, 1, 5, 2], 6),
    "both": ([6, 3, 5, 1, 4], [1, 2, 0, 3, 4], 8),
}


@functools.cache
def drawn_model() -> Any:
    return mixed("Llama")


TEMPLATES = {"around": "[prompt 3] [text] [prompt 2]", "anchored": "[text] [prompt 2] [anchor 7 8] [prompt 1]"}


def templated(family: str, task: str = "CAUSAL_LM") -> Any:
    model = mixed(family, task, adapters=("short", "again"))
    for name, template in TEMPLATES.items():
        kind, fields = config_fields("MLP", task, 5 if name == "around" else 3)
        model.add_adapter(name, getattr(fusedprompt, kind)(**fields), template=template)
    model.set_adapter(["short", "again", *TEMPLATES])
    return model.eval()
