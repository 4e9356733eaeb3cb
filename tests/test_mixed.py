"""Rows of different adapters in one batch, against each row alone: unpadded, with its own adapter active."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import fusedprompt
from fusedprompt.mixed import Mixture, arrange
from models import VOCAB, build, config_fields, tokens
from tolerance import assert_identical, examples, largest, one_thread

__all__ = ["one_thread"]
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


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("route", ROUTES)
def test_each_row_is_as_if_alone(route: str, padding: str) -> None:
    check_language_model(mixed("Llama"), NAMES, *padded(*PADDED[padding]), route)


@pytest.mark.parametrize("family", ["GPT2", "Qwen3", "Mistral", "Gemma2", "OPT", "GPTNeoX", "Falcon", "Bloom"])
@pytest.mark.parametrize("route", ROUTES)
def test_each_row_is_as_if_alone_in_every_family(route: str, family: str) -> None:
    alibi = {"alibi": True} if family == "Falcon" else {}
    check_language_model(mixed(family, **alibi), NAMES, *padded(*PADDED["both"]), route, 1e-4)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([BASE, *ADAPTERS]), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=5
    ),
    extra=st.integers(0, 2),
    route=st.sampled_from(ROUTES),
)
@examples(12)
def test_each_row_of_a_drawn_mix_is_as_if_alone(rows: list[tuple[str, int, int]], extra: int, route: str) -> None:
    names, lengths, left = (list(values) for values in zip(*rows))
    if route == "shared" and all(name == BASE for name in names):
        route = "auto"
    if max(lengths) == 1 and all(name == BASE for name in names):
        lengths[0] = 2  # else nothing is predicted, and there is no loss
    width = max(map(sum, zip(lengths, left))) + extra
    check_language_model(drawn_model(), names, *padded(lengths, left, width), route)


@functools.cache
def drawn_model() -> Any:
    return mixed("Llama")


def test_full_logits_and_hidden_states_are_those_of_splice_on_the_shared_route() -> None:
    model, (ids, mask) = mixed("Llama"), padded(*PADDED["both"])
    model.base_model.requires_grad_(False)
    given = {"input_ids": ids, "attention_mask": mask, "adapter_names": NAMES}
    outputs = [model(**given, route=route, output_hidden_states=True) for route in ROUTES]
    assert outputs[0].logits.shape == (5, 5 + 8, VOCAB)
    # Row 0 has the longest prompt behind one column of padding, row 2 a prompt of 2 behind 3 columns and no token's.
    for row, begin in ((0, 1), (2, 3)):
        own = slice(begin, begin + {0: 5 + 6, 2: 2 + 5}[row])
        parts = zip(*([output.logits, *output.hidden_states] for output in outputs))
        for spliced, shared in parts:
            torch.testing.assert_close(shared[row, own], spliced[row, own], rtol=1e-4, atol=1e-4)
        # With labels and a frozen base model the prompts' logits wait until they are read.
        waiting = model(**given, labels=ids, route="shared")
        torch.testing.assert_close(waiting.logits[row, own], outputs[0].logits[row, own], rtol=1e-4, atol=1e-4)


def test_a_batch_of_one_adapter_is_that_of_set_adapter_and_one_of_base_rows_that_of_the_base_model() -> None:
    model, ids = mixed("Llama"), tokens(3, 6)
    model.set_adapter("short")
    expected = model(input_ids=ids, labels=ids)
    model.set_adapter("long")
    found = model(input_ids=ids, labels=ids, adapter_names=["short"] * 3)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    found = model(input_ids=ids, labels=ids, adapter_names=[BASE] * 3)
    expected = model.base_model(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_arranging_a_batch_never_looks_at_values(family: str) -> None:
    """On the meta device, which has none; a GPU would make the host wait."""
    model = mixed(family, "CAUSAL_LM" if family == "Llama" else "TOKEN_CLS")
    ids, mask = (values.to("meta") for values in padded(*PADDED["both"]))
    mixture = Mixture.of(model, NAMES, ids)
    for pool_last in (False, True):
        arranged = arrange(mixture, model.facts, ids, mask, pool_last)
        fields = (arranged.mask(mask, ids), arranged.labels(ids, True), arranged.position_ids(), arranged.layout.slots)
        assert [tuple(field.shape) for field in fields if field is not None] == [(5, 13)] * 4
    assert mixture.take(torch.zeros(3, 4, device="meta")).shape == (5, 4)


def test_each_distinct_adapter_is_encoded_once() -> None:
    model, ids = mixed("Llama"), tokens(6, 5)
    calls: list[str] = []
    for name, encoder in model.prompt_encoder.items():
        encoder.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for route in ROUTES:
        calls.clear()
        model(input_ids=ids, labels=ids, adapter_names=["long", "short", "long", BASE, "short", "long"], route=route)
        assert calls == ["long", "short"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_mixed_step_twice_has_the_same_bits(route: str) -> None:
    model, (ids, mask) = mixed("Llama"), padded(*PADDED["both"])
    results = []
    for _ in range(2):
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=ids, adapter_names=NAMES, route=route)
        output.loss.backward()
        results.append({"loss": output.loss.detach(), **gradients(model)})
    assert_identical(*results)


def test_prompts_that_are_kept_serve_mixed_batches_and_forget_one_that_changes() -> None:
    model, (ids, mask) = mixed("Llama"), padded(*PADDED["both"])
    passes: list[tuple[int, ...]] = []

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is None and kwargs["inputs_embeds"].shape[0] == 1:
            passes.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    given = {"input_ids": ids, "attention_mask": mask, "adapter_names": NAMES, "logits": "text", "route": "shared"}

    def prompt_passes() -> list[tuple[int, ...]]:
        passes.clear()
        with torch.no_grad():
            found = model(**given).logits
            torch.testing.assert_close(found[mask != 0], model(**{**given, "route": "splice"}).logits[mask != 0])
        return passes

    model.base_model.model.register_forward_pre_hook(hook, with_kwargs=True)
    assert prompt_passes() == [(1, 5), (1, 2), (1, 3)] and len(model.prompt_cache) == 3
    assert prompt_passes() == []
    with torch.no_grad():
        model.prompt_encoder["short"].embedding.weight.mul_(2)
    assert prompt_passes() == [(1, 2)]
    with torch.no_grad():
        model.base_model.model.norm.weight.mul_(2)
    assert prompt_passes() == [(1, 5), (1, 2), (1, 3)]


# Other tasks


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

TEMPLATES = {"around": "[prompt 3] [text] [prompt 2]", "anchored": "[text] [prompt 2] [anchor 7 8] [prompt 1]"}


def templated(family: str, task: str = "CAUSAL_LM") -> Any:
    model = mixed(family, task, adapters=("short", "again"))
    for name, template in TEMPLATES.items():
        kind, fields = config_fields("MLP", task, 5 if name == "around" else 3)
        model.add_adapter(name, getattr(fusedprompt, kind)(**fields), template=template)
    model.set_adapter(["short", "again", *TEMPLATES])
    return model.eval()


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


def test_several_adapters_are_trained_together() -> None:
    model = mixed("Llama")
    model.base_model.requires_grad_(False)
    model.set_adapter(["long", "short"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".long." in n or ".short." in n}
    assert model.active_adapter == "long"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = tokens(4, 6)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, adapter_names=["long", "lstm", "short", BASE]).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    with pytest.raises(ValueError, match="adapter_name: expected a name, or several, got none"):
        model.set_adapter([])


def test_context_aware_rows_answer_and_are_not_trained() -> None:
    model = mixed("Llama", adapters=("short",))
    kind, fields = config_fields("CPT")
    model.add_adapter("cpt", getattr(fusedprompt, kind)(**fields))
    ids, names = tokens(3, 6), ["cpt", BASE, "short"]
    found = model(input_ids=ids, adapter_names=names).logits[:, -6:]
    for row, name in enumerate(names):
        expected = alone(model, name, input_ids=ids[row : row + 1]).logits[0, -6:]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="labels: expected None with adapter_names of CPT"):
        model(input_ids=ids, labels=ids, adapter_names=names)


def test_prompts_behind_the_first_token_mix_with_others() -> None:
    model = mixed("Bert", "TOKEN_CLS", adapters=("short",))
    kind, fields = config_fields("PROMPT", "TOKEN_CLS", 3)
    model.add_adapter("inside", getattr(fusedprompt, kind)(**fields), prompt_start=1)
    ids, mask = padded([6, 3, 5], [0, 2, 1], 7)
    names = ["inside", "short", "inside"]
    found = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    for row, name in enumerate(names):
        own = alone(model, name, input_ids=ids[row : row + 1, mask[row] != 0]).logits[0]
        torch.testing.assert_close(found[row][mask[row] != 0], own, rtol=1e-4, atol=1e-4)


def test_wrong_names_are_refused() -> None:
    model, ids = mixed("Llama", adapters=("short", "long")), tokens(3, 4)
    with pytest.raises(ValueError, match=r"adapter_names: expected B = 3 names, one per row, got 2"):
        model(input_ids=ids, adapter_names=["short", "long"])
    with pytest.raises(ValueError, match=r"expected names among \['short', 'long', '__base__'\], got \['other'\]"):
        model(input_ids=ids, adapter_names=["short", "other", BASE])
    with pytest.raises(TypeError, match="adapter_names: expected a list of one name per row, got 'short'"):
        model(input_ids=ids, adapter_names="short")
    kind, fields = config_fields("PROMPT", "SEQ_CLS")
    other = mixed("Bert", "SEQ_CLS", adapters=("short",))
    other.add_adapter("tokens", getattr(fusedprompt, kind)(**{**fields, "task_type": "TOKEN_CLS"}))
    with pytest.raises(ValueError, match=r"one task type, got \{'short': 'SEQ_CLS', 'tokens': 'TOKEN_CLS'\}"):
        other(input_ids=ids, adapter_names=["short", "tokens", BASE])
    with pytest.raises(fusedprompt.BackendUnavailable, match="'shared' cannot run: no row has a prompt"):
        model(input_ids=ids, adapter_names=[BASE] * 3, route="shared")
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="adapter_names: expected None where adapters are dis"),
    ):
        model(input_ids=ids, adapter_names=["short"] * 3)
    with pytest.raises(ValueError, match="adapter_names: expected None with assisted decoding"):
        model.generate(input_ids=ids, adapter_names=["short"] * 3, prompt_lookup_num_tokens=2)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="adapter_names: expected None for tokens that follow a cache"):
        model(input_ids=ids, past_key_values=cache, adapter_names=["short"] * 3)


def test_explain_shows_a_row_of_each_adapter_with_letters_of_its_own() -> None:
    model, (ids, mask) = mixed("Llama"), padded(*PADDED["both"])
    said = model.explain(input_ids=ids, attention_mask=mask, adapter_names=NAMES, route="shared").splitlines()
    assert said == [
        "route shared",
        "long, 2 rows, row 0: · P P P P P t t t t t t ·",
        "__base__, 1 row, row 1: · · · · · · · t t t · · ·",
        "short, 1 row, row 2: · · · Q Q t t t t t · · ·",
        "lstm, 1 row, row 4: · · · · · · R R R t t t t",
    ]
    said = model.explain(input_ids=ids, adapter_names=["short"] * 5).splitlines()
    assert said[0].startswith("route splice: sharing would save")
    model, names = templated("Llama"), ["around", "anchored", "around"]
    said = model.explain(input_ids=tokens(3, 4), adapter_names=names).splitlines()
    assert said == [
        "route splice: the adapter's template does not put the whole prompt in front",
        "around, 2 rows, row 0: P P P t t t t P P",
        "anchored, 1 row, row 1: t t t t Q Q A A Q",
    ]
    packed = fusedprompt.pack(
        mixed("Llama"), [{"input_ids": [3, 4]}, {"input_ids": [5]}], adapter_names=["short", "lstm"]
    )
    assert mixed("Llama").explain(**packed).splitlines()[1] == "row 0: P P t t Q Q Q t"
