"""Checks of a forward pass of a language model: padding, routes, embeddings, adapters, dtypes, windows.

A check gives None where all is equal, or in words what else is the case, and raises where a number is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kit import GRADIENTS, MASKS, PROMPT, ROWS, SHORT, Family, NoOracle, mask_of, oracle, same, text_of
from .tiny import PAD, window_fields

ROUTES = ("auto", "splice")


def compare_rows(family: Family, what: str, found: Tensor, given: dict[str, Tensor], rows: Tensor | None = None) -> None:
    """Logits (B, T, V) of a batch's texts are those of each row alone."""
    for row in range(len(found)):
        columns = text_of(given["attention_mask"], row)
        same(what, found[row, columns], family.text_logits(given["input_ids"][row, columns], rows))


def check_alone(family: Family) -> None:
    """Every row of a batch, padded at the right, left, both or not at all, is the row alone."""
    for kind in MASKS:
        given = family.batch(kind)
        for route in ROUTES:
            with torch.no_grad():
                found = family.model(**given, route=route, logits="text").logits
            compare_rows(family, f"{route}, {kind} padding: logits", found, given)


def check_routes(family: Family) -> str | None:
    """Loss, logits and the prompt's gradient are the same on both routes, whether logits are read or not."""
    weight = family.model.prompt_encoder["default"].embedding.weight
    for kind in MASKS:
        given = family.batch(kind)
        labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
        right: list[Tensor] = []
        for route, reads in (("splice", True), ("auto", False), ("auto", True)):
            output = family.model(**given, labels=labels, route=route)
            logits = output.logits.detach() if reads else None
            (gradient,) = torch.autograd.grad(output.loss, weight)
            if not right:
                assert logits is not None
                right = [output.loss.detach(), gradient, logits]
                continue
            read = "read" if reads else "unread"
            same(f"{kind} padding, logits {read}: loss", output.loss, right[0])
            same(f"{kind} padding, logits {read}: gradient", gradient, right[1], GRADIENTS)
            if logits is not None and kind == "no":
                same("logits", logits, right[2])
    return why_spliced(family)


def why_spliced(family: Family) -> str | None:
    """The reason why `auto` splices, or None: it shares."""
    line = family.model.explain(**family.batch("left")).splitlines()[0]
    return None if line.startswith("route shared") else line.replace("route splice", "spliced", 1)


def check_trained(family: Family) -> None:
    """Where the base model is trained too, every gradient is the same on both routes."""
    given = family.batch("mixed")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    own = list(family.base.parameters())
    wanted = [parameter.requires_grad for parameter in own]
    trained = {name: one for name, one in family.model.named_parameters() if one.is_floating_point()}
    trained = {name: one for name, one in trained.items() if "short" not in name}
    try:
        family.base.requires_grad_(True)
        found = []
        for route in ROUTES:
            loss = family.model(**given, labels=labels, route=route).loss
            found.append(torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
    finally:
        for parameter, want in zip(own, wanted):
            parameter.requires_grad_(want)
    largest = max(float(one.abs().max()) for one in found[1] if one is not None)
    for name, shared, spliced in zip(trained, *found):
        if shared is None and spliced is None:
            continue
        zero = torch.zeros_like(trained[name])
        shared, spliced = (zero if one is None else one for one in (shared, spliced))
        if float((shared - spliced).abs().max()) > 1e-5 * largest:  # entries of next to nothing are rounding
            same(f"gradient of {name}", shared, spliced, GRADIENTS)


def check_embeds(family: Family) -> None:
    """Embeddings in place of ids give what the base model makes of prompt and embeddings, gradient included."""
    given = family.batch("left")
    embeds = family.base.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    mask, right = given["attention_mask"], []
    found = {}
    for route in ROUTES:
        logits = family.model(inputs_embeds=embeds, attention_mask=mask, route=route, logits="text").logits
        (gradient,) = torch.autograd.grad(logits[mask > 0].square().sum(), embeds)
        found[route] = logits, gradient
    same("gradient of inputs_embeds", found["auto"][1][mask > 0], found["splice"][1][mask > 0], GRADIENTS)
    for row in range(ROWS):
        joined = torch.cat((family.rows(), embeds[row, text_of(mask, row)])).unsqueeze(0).detach()
        with oracle(), torch.no_grad():
            right.append(family.base(inputs_embeds=joined).logits[0, PROMPT:])
    for route in ROUTES:
        for row in range(ROWS):
            same(f"{route}: logits", found[route][0][row, text_of(mask, row)], right[row])


def check_pad_inside(family: Family) -> None:
    """A pad id inside a text that the mask shows is a token like any other."""
    for kind in ("no", "left"):
        given = family.batch(kind)
        given["input_ids"][:, 7] = PAD
        if family.wants_ids:
            raise NoOracle("a base model that takes ids alone looks for padding in them")
        for route in ROUTES:
            with torch.no_grad():
                found = family.model(**given, route=route, logits="text").logits
            compare_rows(family, f"{route}, {kind} padding: logits", found, given)


def check_adapters(family: Family) -> None:
    """Rows with a long prompt, a short one and none, in one batch, are those rows alone."""
    names = ["default", "short", "__base__", "short"]
    for kind in ("no", "mixed"):
        given = family.batch(kind)
        for route in ROUTES:
            with torch.no_grad():
                found = family.model(**given, adapter_names=names, route=route, logits="text").logits
            for row, name in enumerate(names):
                columns = text_of(given["attention_mask"], row)
                ids = given["input_ids"][row, columns]
                if name == "__base__":
                    with oracle(), torch.no_grad():
                        right = family.base(input_ids=ids.unsqueeze(0)).logits[0]
                else:
                    right = family.text_logits(ids, None if name == "default" else family.rows(name))
                same(f"{route}, {kind} padding, row of {name}: logits", found[row, columns], right)
    assert len(family.rows("short")) == SHORT


def check_unmoved(family: Family) -> None:
    """Evaluating leaves the prompt as it was."""
    before = family.rows().clone()
    with torch.no_grad():
        for kind in ("no", "left", "no"):
            family.model(**family.batch(kind))
            family.model(**family.batch(kind), route="splice")
    same("the prompt, evaluated six times,", family.rows(), before, 0.0)


def check_bf16(family: Family) -> None:
    """In bfloat16 both routes are finite, and about as far from float32 as each other."""
    rough = Family(family.name, family.task, family.seed, scale=1)
    given = rough.batch("left")
    with torch.no_grad():
        right = rough.model(**given, route="splice", logits="text").logits
        rough.model.to(torch.bfloat16)
        rough.model.prompt_cache.clear()
        try:
            rough.base(input_ids=given["input_ids"])
        except Exception as error:
            raise NoOracle(f"the base model cannot do bfloat16 here: {type(error).__name__}") from error
        found = {route: rough.model(**given, route=route, logits="text").logits.float() for route in ROUTES}
    shown = given["attention_mask"] > 0
    size = float(right[shown].abs().max())
    errors = {route: float((found[route] - right)[shown].abs().max()) / size for route in ROUTES}
    if not errors["auto"] <= 3 * errors["splice"] + 0.03:
        raise_off(f"auto {errors['auto']:.1e} from float32, splice {errors['splice']:.1e}")


def raise_off(text: str) -> None:
    from .kit import Difference

    raise Difference(text)


def windowed(family: Family) -> Iterator[Family]:
    """The family with windows shorter than the text, if it has any."""
    fields = window_fields(type(family.base).config_class)
    if fields:
        yield Family(family.name, family.task, family.seed, window=8)


def check_window(family: Family) -> str | None:
    """With windows shorter than prompt and text all of this holds still."""
    for narrow in windowed(family):
        check_alone(narrow)
        check_adapters(narrow)
        return None
    return "it has no window"


CHECKS: dict[str, Any] = {
    "alone": check_alone,
    "routes": check_routes,
    "every gradient": check_trained,
    "embeddings": check_embeds,
    "pad id inside": check_pad_inside,
    "mixed adapters": check_adapters,
    "unmoved": check_unmoved,
    "bfloat16": check_bf16,
    "window": check_window,
}
