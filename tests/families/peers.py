"""Checks against PEFT: the same prompt on the same weights, and PEFT's model patched by `apply`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusedprompt

from .generation import GREEDY, base_counts, expect_rows, judging
from .kit import (
    GRADIENTS,
    MASKS,
    PROMPT,
    Difference,
    Family,
    NoOracle,
    is_ours,
    one_line,
    oracle,
    same,
    text_of,
    values_of,
)


def peft_model(family: Family) -> Any:
    """PEFT's model with the family's weights and prompt."""
    import peft

    settings = {**family.settings(), "token_dim": family.rows().shape[1]}
    with oracle("PEFT"):
        model = peft.get_peft_model(family.fresh(), peft.PromptTuningConfig(**settings)).eval()
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(
                family.model.prompt_encoder["default"].embedding.weight
            )
    return model


def step(model: Any, given: dict[str, Tensor], cut: bool = False, **options: Any) -> dict[str, Tensor]:
    """Loss, logits and the prompt's gradient of a step. cut: logits of the prompt are left out."""
    output = model(**{name: value.clone() for name, value in given.items()}, **options)
    values = values_of(output)
    length = given["input_ids"].shape[1]
    if cut and values.dim() == 3 and values.shape[1] == length + PROMPT:
        values = values[:, PROMPT:]
    loss = output.loss if output.get("loss") is not None else values.square().mean()
    (gradient,) = torch.autograd.grad(loss, model.prompt_encoder["default"].embedding.weight)
    return {"loss": loss.detach(), "logits": values.detach(), "gradient": gradient}


def shown_of(given: dict[str, Tensor], cut: bool = False) -> Tensor:
    """(B, P + T): the positions that are no padding. cut: (B, T), without the prompt's."""
    if cut:
        return given["attention_mask"] > 0
    return torch.nn.functional.pad(given["attention_mask"], (PROMPT, 0), value=1) > 0


def compare_steps(what: str, found: dict[str, Tensor], right: dict[str, Tensor], shown: Tensor) -> None:
    """Two steps are equal. shown: (B, S), the positions that are no padding."""
    for name, value in right.items():
        one = found[name]
        if "logits" in name and value.shape[:2] == shown.shape == one.shape[:2]:
            one, value = one[shown], value[shown]
        same(f"{what}: {name}", one, value, GRADIENTS if name == "gradient" else 2e-4)


def peft_batch(family: Family, kind: str) -> dict[str, Tensor]:
    """A batch as PEFT takes it: without labels for tokens, which it cannot move behind the prompt."""
    given = family.step_batch(kind)
    if family.task_type not in ("TOKEN_CLS", "QUESTION_ANS"):
        return given
    return {name: value for name, value in given.items() if name in ("input_ids", "attention_mask")}


def check_peft(family: Family) -> None:
    """Spliced, a step is PEFT's where PEFT is right: rows of one length, or padded at the right."""
    if family.name.startswith("Gemma3n"):
        raise NoOracle("PEFT leaves out what the layers make of ids")
    theirs = peft_model(family)
    cut = family.task_type in ("TOKEN_CLS", "QUESTION_ANS")
    for kind in ("no",) if family.task == "SEQ_CLS" else ("no", "right"):
        given = peft_batch(family, kind)
        found = step(family.model, given, route="splice")
        with oracle("PEFT"):
            right = step(theirs, given, cut)
        if cut and kind == "right":
            del found["loss"], found["gradient"], right["loss"], right["gradient"]  # of padding, too
        compare_steps(f"{kind} padding", found, right, shown_of(given, cut))


def check_apply(family: Family) -> None:
    """A patched model gives what it gave before, whatever the padding; its text, too."""
    model = peft_model(family)
    right: dict[str, Any] = {}
    for kind in MASKS:
        given = peft_batch(family, kind)
        try:
            right[kind] = step(model, given)
        except Exception as error:
            right[kind] = error
    text = generated(family, model, "no")
    if all(isinstance(one, Exception) for one in right.values()) and not isinstance(text, Tensor):
        raise NoOracle(f"PEFT fails: {one_line(right['no'])}")
    with fusedprompt.apply(model):
        for kind, expected in right.items():
            if isinstance(expected, Exception):
                continue
            given = peft_batch(family, kind)
            compare_steps(f"{kind} padding", step(model, given), expected, shown_of(given))
        if isinstance(text, Tensor):
            after = generated(family, model, "no", must=True)
            if after is None or not torch.equal(after, text):
                raise Difference(
                    f"generates {after if after is None else after[0, -4:].tolist()} where PEFT {text[0, -4:].tolist()}"
                )


def generated(family: Family, model: Any, kind: str, must: bool = False) -> Tensor | None:
    """What PEFT's model generates, or None: it does not."""
    if family.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return None
    try:
        found: Tensor = model.generate(**family.batch(kind), **GREEDY)
        return found
    except Exception:
        if must:
            raise
        return None


def check_fix(family: Family) -> None:
    """With fix=True the text of a padded row is that of the row alone, and goes on like it."""
    model = peft_model(family)
    others = {"labels": family.labels} if family.task_type == "SEQ_2_SEQ_LM" else {}
    with fusedprompt.apply(model, fix=True):
        for kind in [one for one in family.kinds() if one in ("left", "right")] or ["no"]:
            given = family.batch(kind)
            try:
                with torch.no_grad():
                    found = values_of(model(**given, **others))
            except Exception as error:
                if is_ours(error):
                    raise
                with oracle("PEFT"), torch.no_grad():
                    peft_model(family)(**given, **others)
                raise
            for row in range(len(found)):
                expect_text(family, f"{kind} padding: logits", given, row, found)
        given = family.batch("left")
        text_found = generated(family, model, "left")
        if text_found is not None:
            with judging(Difference, lambda: base_counts(family)):
                expect_rows(family, "left padding", given, text_found)


def expect_text(family: Family, what: str, given: dict[str, Tensor], row: int, found: Tensor) -> None:
    """A row's values are right, where the text was or, of a model that looks both ways, behind the prompt."""
    columns = text_of(given["attention_mask"], row)
    right = family.right(given["input_ids"][row, columns], row=row)
    if found[row].shape == right.shape and family.task_type in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        same(what, found[row], right)
        return
    prompt = found.shape[1] - given["input_ids"].shape[1]
    try:
        same(what, found[row, prompt + columns], right)
    except Difference:
        if not any(getattr(part, "is_causal", True) is False for part in family.base.modules()):
            raise
        same(what, found[row, prompt : prompt + len(columns)], right)


CHECKS: dict[str, Any] = {"PEFT": check_peft, "apply": check_apply, "apply, fix": check_fix}
