"""Checks of a forward pass of a language model: padding, routes, embeddings, adapters, dtypes, windows.

A check gives None where all is equal, or in words what else is the case, and raises where a number is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kit import GRADIENTS, MASKS, PROMPT, ROWS, Difference, Family, NoOracle, oracle, same, text_of, values_of
from .tiny import PAD, window_fields

ROUTES = ("auto", "splice")


def compare_rows(family: Family, what: str, found: Tensor, given: dict[str, Tensor]) -> None:
    """Values of a batch's texts are those of each row alone."""
    mask = given["attention_mask"]
    for row in range(ROWS):
        right = family.right(given["input_ids"][row, text_of(mask, row)], row=row)
        same(f"{what}: logits", family.pick(found, mask, row), right)


def check_alone(family: Family) -> str | None:
    """Every row of a batch, padded at the right, left, both or not at all, is the row alone."""
    for kind in family.kinds():
        given = family.batch(kind)
        for route in ROUTES:
            with torch.no_grad():
                found = family.forward(given, route=route)
            compare_rows(family, f"{route}, {kind} padding", found, given)
    return family.remark()


def check_routes(family: Family) -> str | None:
    """Loss, logits and the prompt's gradient are the same on both routes, whether logits are read or not."""
    weight = family.model.prompt_encoder["default"].embedding.weight
    for kind in MASKS:
        given = family.step_batch(kind)
        right: list[Tensor] = []
        for route, reads in (("splice", True), ("auto", False), ("auto", True)):
            output = family.model(**given, route=route)
            logits = values_of(output).detach() if reads else None
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
    given = family.step_batch("mixed")
    own = list(family.base.parameters())
    wanted = [parameter.requires_grad for parameter in own]
    trained = {name: one for name, one in family.model.named_parameters() if one.is_floating_point()}
    trained = {name: one for name, one in trained.items() if "short" not in name}
    try:
        family.base.requires_grad_(True)
        found = []
        for route in ROUTES:
            loss = family.model(**given, route=route).loss
            found.append(torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
    finally:
        for parameter, want in zip(own, wanted):
            parameter.requires_grad_(want)
    largest = max(float(one.abs().max()) for one in found[1] if one is not None and one.numel())
    for name, shared, spliced in zip(trained, *found):
        if (shared is None and spliced is None) or not trained[name].numel():
            continue
        zero = torch.zeros_like(trained[name])
        shared, spliced = (zero if one is None else one for one in (shared, spliced))
        if float((shared - spliced).abs().max()) > 1e-5 * largest:  # entries of next to nothing are rounding
            same(f"gradient of {name}", shared, spliced, GRADIENTS)


def check_embeds(family: Family) -> None:
    """Embeddings in place of ids give what the base model makes of prompt and embeddings, gradient included."""
    given = family.batch("left" if "left" in family.kinds() else "no")
    with oracle():
        embeds = family.base.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    mask, found = given["attention_mask"], {}
    for route in ROUTES:
        values = family.forward({"inputs_embeds": embeds, "attention_mask": mask}, route=route)
        shown = torch.cat([family.pick(values, mask, row).flatten() for row in range(ROWS)])
        (gradient,) = torch.autograd.grad(shown.square().sum(), embeds)
        found[route] = values.detach(), gradient
    same("gradient of inputs_embeds", found["auto"][1][mask > 0], found["splice"][1][mask > 0], GRADIENTS)
    for row in range(ROWS):
        text = embeds[row, text_of(mask, row)].detach()
        joined = torch.cat((family.rows().to(text.dtype), text)).unsqueeze(0)
        with oracle(), torch.no_grad():
            right = values_of(family.base(inputs_embeds=joined, **family.decoder(row)))[0]
        right = right if family.task_type in ("SEQ_CLS", "SEQ_2_SEQ_LM") else right[PROMPT:]
        for route in ROUTES:
            same(f"{route}: logits", family.pick(found[route][0], mask, row), right)


def check_pad_inside(family: Family) -> None:
    """A pad id inside a text that the mask shows is a token like any other."""
    for kind in [kind for kind in ("no", "left") if kind in family.kinds()]:
        given = family.batch(kind)
        given["input_ids"][:, 7] = PAD
        if family.wants_ids:
            raise NoOracle("a base model that takes ids alone may look for padding in them")
        for route in ROUTES:
            with torch.no_grad():
                found = family.forward(given, route=route)
            compare_rows(family, f"{route}, {kind} padding", found, given)


def check_adapters(family: Family) -> None:
    """Rows with a long prompt, a short one and none, in one batch, are those rows alone."""
    names = ["default", "short", "__base__", "short"]
    if family.feels_padding:  # behind shorter prompts
        raise NoOracle("padding changes what the base model itself computes")
    for kind in [kind for kind in ("no", "mixed") if kind in family.kinds()]:
        given = family.batch(kind)
        mask = given["attention_mask"]
        for route in ROUTES:
            with torch.no_grad():
                found = family.forward(given, adapter_names=names, route=route)
            for row, name in enumerate(names):
                ids = given["input_ids"][row, text_of(mask, row)]
                rows = {"default": None, "__base__": family.no_rows()}.get(name, family.rows("short"))
                right = family.right(ids, rows, row)
                same(f"{route}, {kind} padding, row of {name}: logits", family.pick(found, mask, row), right)


def check_unmoved(family: Family) -> None:
    """Evaluating leaves the prompt as it was."""
    before = family.rows().clone()
    with torch.no_grad():
        for kind in ("no", "left", "no"):
            for route in ROUTES:
                family.forward(family.batch(kind), route=route)
    same("the prompt, evaluated six times,", family.rows(), before, 0.0)


def check_bf16(family: Family) -> None:
    """In bfloat16 both routes are finite, and about as far from float32 as each other."""
    rough = Family(family.name, family.task, family.seed, scale=1)
    given = rough.batch("left")
    with torch.no_grad():
        right = rough.forward(given, route="splice")
        rough.model.to(torch.bfloat16)
        rough.model.prompt_cache.clear()
        with oracle("in bfloat16 the base model"):
            rough.base(input_ids=given["input_ids"], **rough.decoder(0))
        found = {route: rough.forward(given, route=route).float() for route in ROUTES}
    errors = dict.fromkeys(ROUTES, 0.0)
    for row in range(ROWS):
        fine = rough.pick(right, given["attention_mask"], row)
        for route, values in found.items():
            off = (rough.pick(values, given["attention_mask"], row) - fine).abs().max() / fine.abs().max()
            errors[route] = max(errors[route], float(off)) if off == off else float("inf")
    if not errors["auto"] <= 3 * errors["splice"] + 0.03 < float("inf"):
        raise Difference(f"auto {errors['auto']:.1e} from float32, splice {errors['splice']:.1e}")


def windowed(family: Family) -> Iterator[Family]:
    """The family with windows shorter than the text, if it has any."""
    fields = window_fields(type(family.base).config_class)
    if fields:
        yield Family(family.name, family.task, family.seed, window=8)


def check_window(family: Family) -> None:
    """With windows shorter than the text the first and the mixed batches hold still."""
    for narrow in windowed(family):
        check_alone(narrow)
        check_adapters(narrow)
        return
    raise NoOracle("it has no window")


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
