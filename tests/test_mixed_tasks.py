"""Mixed batches in other tasks than language modelling, in `generate`, and in templates, against each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixtures import (
    BASE,
    NAMES,
    PADDED,
    ROUTES,
    alone,
    assert_close,
    gradients,
    mixed,
    padded,
    templated,
)
from models import tokens
from tolerance import (
    one_thread,  # noqa: F401
)


def classifier_rows(model: Any, names: list[str], ids: Tensor, mask: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The rows' logits, each alone and unpadded."""
    logits = []
    for row, name in enumerate(names):
        logits.append(alone(model, name, input_ids=ids[row : row + 1, mask[row] != 0], **options).logits)
    return torch.cat(logits)


@pytest.mark.parametrize("padding", ["whole", "both"])
@pytest.mark.parametrize(
    ("family", "route"),
    [("Llama", "splice"), ("Llama", "shared"), ("GPT2", "shared"), ("Bert", "splice"), ("Roberta", "splice")],
)
def test_sequences_are_classified_by_their_own_adapters_heads(family: str, route: str, padding: str) -> None:
    model = mixed(family, "SEQ_CLS")
    ids, mask = padded(*PADDED[padding])
    labels = torch.arange(5) % 3
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=NAMES, route=route)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients(model)}
    model.zero_grad()
    logits = classifier_rows(model, NAMES, ids, mask, labels)
    loss = cross_entropy(logits, labels)
    loss.backward()
    assert_close(found, {"loss": loss.detach(), "logits": logits.detach(), **gradients(model)}, 1e-4)


@pytest.mark.parametrize("padding", ["whole", "both"])
@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_tokens_are_classified_by_their_own_adapters_heads(family: str, padding: str) -> None:
    model = mixed(family, "TOKEN_CLS")
    ids, mask = padded(*PADDED[padding])
    labels = (ids % 3).masked_fill(mask == 0, -100)
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=NAMES)
    output.loss.backward()
    assert output.logits.shape == (*ids.shape, 3)
    found = {"loss": output.loss.detach(), "logits": output.logits[mask != 0].detach(), **gradients(model)}
    model.zero_grad()
    logits = []
    for row, name in enumerate(NAMES):
        text = ids[row : row + 1, mask[row] != 0]
        logits.append(alone(model, name, input_ids=text).logits[0, -text.shape[1] :])
    loss = cross_entropy(torch.cat(logits), labels[mask != 0])
    loss.backward()
    assert_close(found, {"loss": loss.detach(), "logits": torch.cat(logits).detach(), **gradients(model)}, 1e-4)


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_encoder_decoders_read_each_rows_own_prompt(family: str) -> None:
    model = mixed(family, "SEQ_2_SEQ_LM")
    ids, mask = padded(*PADDED["both"])
    labels = tokens(5, 4, seed=9)
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=NAMES)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients(model)}
    model.zero_grad()
    logits = []
    for row, name in enumerate(NAMES):
        text = ids[row : row + 1, mask[row] != 0]
        logits.append(alone(model, name, input_ids=text, labels=labels[row : row + 1]).logits)
    loss = cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten())
    loss.backward()
    assert_close(found, {"loss": loss.detach(), "logits": torch.cat(logits).detach(), **gradients(model)}, 1e-4)
    options = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        own = alone_generate(model, name, ids[row : row + 1, mask[row] != 0], **options)
        assert together[row, : own.shape[1]].tolist() == own[0].tolist()


def test_answers_to_questions_move_with_their_row() -> None:
    model = mixed("Bert", "QUESTION_ANS")
    ids, mask = padded(*PADDED["right"])
    start, end = torch.tensor([1, 0, 2, 0, 1]), torch.tensor([3, 2, 4, 0, 3])
    output = model(input_ids=ids, attention_mask=mask, start_positions=start, end_positions=end, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        own = alone(model, name, input_ids=ids[row : row + 1, mask[row] != 0])
        length = int(mask[row].sum())
        torch.testing.assert_close(
            output.start_logits[row, :length], own.start_logits[0, -length:], rtol=1e-4, atol=1e-4
        )
    assert output.loss.isfinite()


def test_features_of_each_row_follow_its_own_prompt() -> None:
    model = mixed("Bert", "FEATURE_EXTRACTION")
    ids, mask = padded(*PADDED["right"])
    states = model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).last_hidden_state
    assert states.shape[:2] == (5, 5 + 6)
    for row, name in enumerate(NAMES):
        own = alone(model, name, input_ids=ids[row : row + 1, mask[row] != 0]).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(own)], own, rtol=1e-4, atol=1e-4)


# Generating


def alone_generate(model: Any, name: str, ids: Tensor, **options: Any) -> Tensor:
    if name == BASE:
        with model.disable_adapter():
            return torch.as_tensor(model.generate(input_ids=ids, **options))
    model.set_adapter(name)
    return torch.as_tensor(model.generate(input_ids=ids, route="splice", **options))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_rows_are_continued_as_if_alone(family: str, route: str, beams: int) -> None:
    model = mixed(family)
    lengths, left, width = PADDED["left"]
    ids, mask = padded(lengths, left, width)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, route=route, **options)
    assert together.shape == (5, width + 5)
    for row, name in enumerate(NAMES):
        own = alone_generate(model, name, ids[row : row + 1, mask[row] != 0], **options)
        assert together[row, -5:].tolist() == own[0, -5:].tolist(), name


def test_samples_are_the_same_on_both_routes_and_static_caches_serve() -> None:
    model, (ids, mask) = mixed("Llama"), padded(*PADDED["left"])
    given = {"input_ids": ids, "attention_mask": mask, "adapter_names": NAMES, "max_new_tokens": 5}
    found = []
    for route in ROUTES:
        torch.manual_seed(11)
        found.append(model.generate(**given, route=route, do_sample=True, num_return_sequences=2, temperature=0.5))
    assert found[0].shape == (10, 6 + 5) and torch.equal(*found)
    greedy = [
        model.generate(**given, route="shared", do_sample=False, cache_implementation=kind) for kind in (None, "static")
    ]
    assert torch.equal(*greedy)


# Templates


@pytest.mark.parametrize("padding", ["whole", "right", "left", "both"])
def test_rows_of_templates_are_as_if_alone(padding: str) -> None:
    model, names = templated("Llama"), ["around", BASE, "anchored", "short", "anchored"]
    ids, mask = padded(*PADDED[padding])
    labels = ids.masked_fill(mask == 0, -100)
    given = {} if padding == "whole" else {"attention_mask": mask}
    model.zero_grad()
    output = model(input_ids=ids, labels=labels, adapter_names=names, logits="text", **given)
    output.loss.backward()
    found = {"loss": output.loss.detach(), **gradients(model)}
    model.zero_grad()
    losses, count = [], 0
    for row, name in enumerate(names):
        text = ids[row : row + 1, mask[row] != 0]
        own = alone(model, name, input_ids=text, labels=text, **({} if name == BASE else {"logits": "text"}))
        torch.testing.assert_close(output.logits[row][mask[row] != 0], own.logits[0], rtol=1e-4, atol=1e-4)
        predicted = text.shape[1] - (name in (BASE, "anchored"))  # nothing stands before a text in front
        if predicted:
            losses.append(own.loss * predicted)
        count += predicted
    loss = torch.stack(losses).sum() / count
    loss.backward()
    assert_close(found, {"loss": loss.detach(), **gradients(model)}, 1e-4)


def test_sequences_in_templates_are_classified_as_if_alone() -> None:
    for family in ("Bert", "Llama"):
        model, names = templated(family, "SEQ_CLS"), ["around", BASE, "anchored", "short", "anchored"]
        ids, mask = padded(*PADDED["both"])
        found = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for row, name in enumerate(names):
            own = alone(model, name, input_ids=ids[row : row + 1, mask[row] != 0]).logits[0]
            torch.testing.assert_close(found[row], own, rtol=1e-4, atol=1e-4)


def test_rows_of_templates_are_continued_as_if_alone() -> None:
    model, names = templated("Llama"), ["around", BASE, "anchored", "short", "anchored"]
    ids, mask = padded(*PADDED["left"])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names):
        own = alone_generate(model, name, ids[row : row + 1, mask[row] != 0], **options)
        assert together[row, -4:].tolist() == own[0, -4:].tolist(), name


# Training, settings, errors
