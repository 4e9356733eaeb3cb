"""Rows of different adapters in one batch, against each row alone: unpadded, with its own adapter active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedprompt
from fusedprompt.layouts.mixture import Mixture, arrange
from mixtures import (
    ADAPTERS,
    BASE,
    NAMES,
    PADDED,
    ROUTES,
    alone,
    assert_close,
    check_language_model,
    drawn_model,
    gradients,
    mixed,
    padded,
    templated,
)
from models import VOCAB, config_fields, tokens
from tolerance import (
    assert_identical,
    examples,
    one_thread,  # noqa: F401
)


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
    mixture = Mixture.of(model.prompts, model.prompts[model.active_adapter], NAMES, ids)
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
    assert said.pop().startswith("first use: rows are as they are alone")
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


@torch.no_grad()
def test_kept_prompts_of_other_lengths_fit_layers_with_a_window_which_count_by_themselves() -> None:
    model = mixed("Gemma2", adapters=("short", "long"))
    given = {"input_ids": tokens(3), "attention_mask": torch.ones(3, 7, dtype=torch.int64), "logits": "text"}
    for names in (["short", "long", "long"], ["long", "short", BASE]):
        found, expected = (model(**given, adapter_names=names, route=route).logits for route in ("shared", "splice"))
        assert_close({"logits": found}, {"logits": expected})
