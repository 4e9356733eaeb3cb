"""Checks of models that label tokens or fill them in: the loss of their labels, and a prompt around the text."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import fusedprompt

from .kit import PROMPT, ROWS, Family, NoOracle, oracle, same, text_of, values_of


def check_loss(family: Family) -> None:
    """The loss is the mean over the labelled tokens of all rows, each from its row alone."""
    if family.task_type == "SEQ_2_SEQ_LM":
        raise NoOracle("an encoder-decoder labels what its decoder says")
    for kind in [kind for kind in ("no", "left", "mixed") if kind in family.kinds()]:
        given = family.step_batch(kind)
        with torch.no_grad():
            found = family.model(**given).loss
        rights, labels = [], []
        for row in range(ROWS):
            columns = text_of(given["attention_mask"], row)
            rights.append(family.right(given["input_ids"][row, columns], row=row))
            labels.append(given["labels"][row, columns])
        right = F.cross_entropy(torch.cat(rights).float(), torch.cat(labels))
        same(f"{kind} padding: loss", found, right)


def check_template(family: Family) -> None:
    """A prompt half in front of the text and half behind it."""
    if family.task_type == "SEQ_2_SEQ_LM":
        raise NoOracle("not tried with encoder-decoders")
    half = PROMPT // 2
    around = Family(family.name, family.task, family.seed, family.dtype)
    config: Any = fusedprompt.PromptTuningConfig(**around.settings())
    template = f"[prompt {half}] [text] [prompt {half}]"
    model: Any = fusedprompt.get_prompt_model(around.base, config, template=template).eval()
    rows = model.prompt_encoder["default"].embedding.weight.detach()
    given = around.batch("no" if around.feels_padding else "right")
    with torch.no_grad():
        found = model(**given, logits="text").logits
    if around.wants_ids:
        raise NoOracle("embeddings alone are not taken")
    for row in range(ROWS):
        columns = text_of(given["attention_mask"], row)
        with oracle(), torch.no_grad():
            text = around.base.get_input_embeddings()(given["input_ids"][row, columns])
            joined = torch.cat((rows[:half], text, rows[half:])).unsqueeze(0)
            right = values_of(around.base(inputs_embeds=joined))[0, half:-half]
        same("logits", found[row, columns], right)


LOSS: dict[str, Any] = {"loss": check_loss}
CHECKS: dict[str, Any] = {"template": check_template}
