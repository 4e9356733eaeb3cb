"""Checks of `generate`: each token is the one that a loop over the base model's `forward` picks for the row alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .kit import Difference, Family, NoOracle, is_ours, oracle, same, text_of, values_of
from .tiny import PAD

NEW = 4
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
# Their `prepare_inputs_for_generation` adds a token that is filled in, so a loop over `forward` is another thing.
FILLS_IN = ("XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel")
# Their own `generate` counts padding in front of a text, or mixes it in, and leaves no way to tell it otherwise.
COUNTS = ("ProphetNetForCausalLM", "ReformerModelWithLMHead", "RwkvForCausalLM", "GitForCausalLM")
TIE = 1e-4  # of the range of the logits


@contextlib.contextmanager
def judging(kind: type[Exception], *questions: Callable[[], Any]) -> Iterator[None]:
    """An error of a kind is the package's, unless a question to the base model finds nothing to compare with."""
    try:
        yield
    except kind:
        for ask in questions:
            ask()
        raise


def base_generates(family: Family, **options: Any) -> Tensor:
    """What the base model says without a prompt. Nothing to compare with where it does not generate from ids."""
    with oracle(), torch.no_grad():
        ids = torch.cat((family.ids, family.ids), 1)
        found: Tensor = family.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
    return found


def expect_greedy(family: Family, what: str, text: Tensor, new: Tensor) -> None:
    """Each of the new tokens (n,) has the largest logit behind the row's text (t,) and those before it."""
    if family.name in FILLS_IN:
        right = filled_in(family, text, len(new))
        if not torch.equal(right, new):
            raise Difference(f"{what}: tokens {new.tolist()} where {right.tolist()} are right")
        return
    for step, token in enumerate(new.tolist()):
        logits = family.right(torch.cat((text, new[:step])))[-1].float()
        best = int(logits.argmax())
        if not float(logits[best] - logits[token]) <= TIE * float(logits.max() - logits.min()):
            raise Difference(f"{what}: token {step} is {token} where {best} is right")


def filled_in(family: Family, text: Tensor, count: int) -> Tensor:
    """(count,): what the base model generates from ids whose first are embedded as the prompt."""
    with oracle(), torch.no_grad(), family.answering(family.rows()) as dummy:
        wide = torch.cat((dummy, text)).unsqueeze(0)
        found: Tensor = family.base.generate(input_ids=wide, attention_mask=torch.ones_like(wide), **GREEDY)
    return found[0, wide.shape[1] : wide.shape[1] + count]


def expect_rows(family: Family, what: str, given: dict[str, Tensor], found: Tensor) -> None:
    """A batch's sequences begin with the texts, and go on as each row alone."""
    length = given["input_ids"].shape[1]
    if family.task_type == "SEQ_2_SEQ_LM":
        expect_said(family, what, given, found)
        return
    if not torch.equal(found[:, :length], given["input_ids"]):
        raise Difference(f"{what}: the text itself comes back changed")
    if found.shape[1] != length + NEW:
        raise Difference(f"{what}: {found.shape[1] - length} new tokens where {NEW} are right")
    for row in range(len(found)):
        text = given["input_ids"][row, text_of(given["attention_mask"], row)]
        expect_greedy(family, f"{what}, row {row}", text, found[row, length:])


def expect_said(family: Family, what: str, given: dict[str, Tensor], found: Tensor) -> None:
    """An encoder-decoder's sequences are those that its decoder picks, token by token, for the row alone."""
    for row in range(len(found)):
        text = given["input_ids"][row, text_of(given["attention_mask"], row)]
        for step in range(1, found.shape[1]):
            output = family.alone(text, decoder_input_ids=found[row : row + 1, :step])
            logits, token = values_of(output)[0, -1].float(), int(found[row, step])
            if not float(logits.max() - logits[token]) <= TIE * float(logits.max() - logits.min()):
                best = int(logits.argmax())
                raise Difference(f"{what}, row {row}: token {step} is {token} where {best} is right")


def check_greedy(family: Family) -> None:
    """Greedy tokens, of rows padded at the left or not, twice over and on both routes."""
    for kind in ("no", "left"):
        given = family.batch(kind)
        for route in ("auto", "auto", "splice"):
            with judging(Exception, lambda: base_generates(family)):
                found = family.model.generate(**given, **GREEDY, route=route)
            with judging(Difference, lambda: base_loops(family), lambda: base_counts(family)):
                expect_rows(family, f"{route}, {kind} padding", given, found)


def base_loops(family: Family) -> None:
    """Nothing to compare with where the base model's `generate` is no loop over its `forward`, without any prompt."""
    if family.task_type == "SEQ_2_SEQ_LM" or family.name in FILLS_IN:
        return
    found = base_generates(family)
    ids = found[:, : 2 * family.ids.shape[1]]
    with oracle(), torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat((ids, values_of(family.base(input_ids=ids, use_cache=False))[:, -1:].argmax(-1)), 1)
    if not torch.equal(ids, found):
        raise NoOracle("the base model's own generate is no loop over its forward")


def check_beams(family: Family) -> None:
    """Two beams end no worse than a beam search by hand."""
    given = {name: value[:2] for name, value in family.batch("left").items()}
    with judging(Exception, lambda: base_generates(family, num_beams=2)):
        found = family.model.generate(**given, **GREEDY, num_beams=2)
    if family.name in FILLS_IN:
        raise NoOracle("no beam search by hand of a model that fills in a token")
    for row in range(len(found)):
        text = given["input_ids"][row, text_of(given["attention_mask"], row)]
        with judging(Difference, lambda: base_beams(family), lambda: base_counts(family)):
            expect_beams(family, f"row {row}", text, found[row, given["input_ids"].shape[1] :])


def expect_beams(family: Family, what: str, text: Tensor, new: Tensor, rows: Tensor | None = None) -> None:
    """New tokens (n,) are as likely as those of a beam search by hand."""
    right, score = beams_by_hand(family, text, len(new), rows)
    steps = [log_odds(family, torch.cat((text, new[:step])), rows)[token] for step, token in enumerate(new)]
    own = float(torch.stack(steps).sum())
    if not abs(own - score) <= 1e-3 * max(1.0, abs(score)):
        raise Difference(f"{what}: beams {new.tolist()} ({own:.4f}) where {right.tolist()} ({score:.4f}) are right")


def base_counts(family: Family) -> None:
    """Nothing to compare with where the base model itself goes on otherwise behind padding, without any prompt."""
    if family.name not in COUNTS:
        return
    given = family.batch("left")
    ids, mask = given["input_ids"], given["attention_mask"]
    with oracle(), torch.no_grad():
        found = family.base.generate(**given, **GREEDY)[1, -NEW:]
        text = ids[1:2, text_of(mask, 1)]
        alone = family.base.generate(input_ids=text, attention_mask=torch.ones_like(text), **GREEDY)[0, -NEW:]
    if not torch.equal(found, alone):
        raise NoOracle("the base model's own generate counts padding")
    if family.name != "GitForCausalLM":
        return
    numbers = (mask.cumsum(1) - 1).clamp(min=0)
    with oracle(), torch.no_grad():
        whole = family.base(**given, position_ids=numbers).logits[1, -3:]
        begun = {"input_ids": ids[:, :-3], "attention_mask": mask[:, :-3], "position_ids": numbers[:, :-3]}
        cache = family.base(**begun, use_cache=True).past_key_values
        rest = {"input_ids": ids[:, -3:], "attention_mask": mask, "position_ids": numbers[:, -3:]}
        part = family.base(**rest, past_key_values=cache).logits[1]
    if float((whole - part).abs().max()) > TIE * float(whole.abs().max()):
        raise NoOracle("the base model itself sees padding behind a cache")


def base_beams(family: Family) -> None:
    """Nothing to compare with where the base model's beams are wrong without any prompt."""
    ids = torch.cat((family.ids, family.ids), 1)
    found = base_generates(family, num_beams=2)
    for text, new in zip(ids, found[:, ids.shape[1] :]):
        try:
            expect_beams(family, "", text, new, family.no_rows())
        except Difference as error:
            raise NoOracle("the base model's own beams are not those of a search by hand") from error


def log_odds(family: Family, text: Tensor, rows: Tensor | None = None) -> Tensor:
    """(V,): the log probabilities of what follows."""
    return family.right(text, rows)[-1].float().log_softmax(-1)


def beams_by_hand(family: Family, text: Tensor, count: int, rows: Tensor | None) -> tuple[Tensor, float]:
    """The better of two beams, and its log probability."""
    beams = [(0.0, text)]
    for _ in range(count):
        wider = []
        for score, one in beams:
            top = log_odds(family, one, rows).topk(2)
            for value, token in zip(top.values.tolist(), top.indices):
                wider.append((score + value, torch.cat((one, token.unsqueeze(0)))))
        beams = sorted(wider, key=lambda pair: -pair[0])[:2]
    return beams[0][1][len(text) :], beams[0][0]


def check_static(family: Family) -> None:
    """Behind a static cache the tokens are the same."""
    options = {"cache_implementation": "static", "disable_compile": True}
    plain, static = base_generates(family), base_generates(family, **options)
    if not torch.equal(plain, static):
        raise NoOracle("the base model says other things behind a static cache")
    for kind in ("no", "left"):
        given = family.batch(kind)
        found = family.model.generate(**given, **GREEDY, **options)
        with judging(Difference, lambda: base_loops(family), lambda: base_counts(family)):
            expect_rows(family, f"{kind} padding", given, found)


def check_continued(family: Family) -> None:
    """A conversation goes on from the cache that was returned, with all ids, as without it."""
    given = family.batch("left")
    options: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True}
    with judging(Exception, lambda: base_generates(family)):
        first = family.model.generate(**given, **options)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        raise NoOracle("no cache comes back")
    turn = family.ids[:, :2]
    ids = torch.cat((first.sequences, turn), 1)
    mask = torch.cat((given["attention_mask"], torch.ones(len(ids), NEW + 2, dtype=torch.int64)), 1)
    longer = {"input_ids": ids, "attention_mask": mask}
    try:
        found = family.model.generate(**longer, past_key_values=cache, **GREEDY)
        expect_rows(family, "continued", longer, found)
        continued_forward(family)
    except Exception as error:
        if not is_ours(error):
            base_continues(family)
            base_counts(family)
        raise


def continued_forward(family: Family) -> None:
    """The cache of a forward pass serves the next, whose ids are the new ones alone."""
    given = family.batch("left")
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        first = family.model(input_ids=ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True)
        cache = getattr(first, "past_key_values", None)
        if cache is None:
            return
        found = family.model(input_ids=ids[:, -3:], attention_mask=mask, past_key_values=cache).logits
    for row in range(len(ids)):
        right = family.right(ids[row, text_of(mask, row)])[-3:]
        same("continued by forward: logits", found[row, -3:], right)


def base_continues(family: Family) -> None:
    """Nothing to compare with where the base model cannot go on from its own cache, without any prompt."""
    ids = torch.cat((family.ids, family.ids), 1)
    with oracle(), torch.no_grad():
        first = family.base.generate(input_ids=ids, return_dict_in_generate=True, **GREEDY)
        longer = torch.cat((first.sequences, ids[:, :2]), 1)
        given = {"input_ids": longer, "attention_mask": torch.ones_like(longer), **GREEDY}
        right = family.base.generate(**given)
        found = family.base.generate(**given, past_key_values=first.past_key_values)
        whole = values_of(family.base(input_ids=ids))[:, -3:]
        cache = family.base(input_ids=ids[:, :-3], use_cache=True).past_key_values
        part = values_of(family.base(input_ids=ids[:, -3:], past_key_values=cache))
    if not torch.equal(found, right) or float((whole - part).abs().max()) > TIE * float(whole.abs().max()):
        raise NoOracle("the base model itself goes on wrongly from its cache")


CHECKS: dict[str, Any] = {
    "greedy": check_greedy,
    "beams": check_beams,
    "static": check_static,
    "continued": check_continued,
}
SAID: dict[str, Any] = {"greedy": check_greedy}
