"""Text that every row begins with, given once: the same numbers as rows that begin with it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedprompt
from fusedprompt import find_shared_prefix, split_shared_prefix
from fusedprompt.layouts.mixture import BASE
from models import build, ours, pad, task_inputs, tokens
from tolerance import one_thread  # noqa: F401

TEXT = tokens(1, 6, seed=9)
CAUSAL = ("Llama", "GPT2", "Gemma2", "Bloom", "GPTNeoX", "Mistral")


def batch(task: str = "CAUSAL_LM", padded: bool = True) -> dict[str, Tensor]:
    """Rows of 7, 4 and 5 tokens, padded at the right."""
    ids, mask = pad(tokens(3, 7), 0, 0)
    if padded:
        for row, length in ((1, 4), (2, 5)):
            ids[row, length:], mask[row, length:] = 0, 0
    return task_inputs(task, ids, mask)


def joined(inputs: dict[str, Tensor], text: Tensor = TEXT) -> dict[str, Tensor]:
    """The rows with the text in front of each, not to be predicted."""
    size, count, found = inputs["input_ids"].shape[0], text.shape[1], dict(inputs)
    found["input_ids"] = torch.cat((text.expand(size, -1), inputs["input_ids"]), 1)
    found["attention_mask"] = torch.cat((torch.ones(size, count).long(), inputs["attention_mask"]), 1)
    labels = inputs.get("labels")
    if labels is not None and labels.shape == inputs["input_ids"].shape:
        found["labels"] = torch.cat((torch.full((size, count), -100), labels), 1)
    return found


def results(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": output.loss, "logits": output.logits, **grads}


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name].shape == value.shape, name
        scale = float(value.detach().abs().max()) + 1e-12
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("route", ["auto", "shared", "splice"])
@pytest.mark.parametrize("family", CAUSAL)
def test_decoders(family: str, route: str) -> None:
    model, inputs = ours(family), batch()
    real = torch.cat((torch.ones(3, 10), inputs["attention_mask"]), 1).bool()
    found = results(model, **inputs, shared_prefix=TEXT, route=route)
    right = results(model, **joined(inputs), route="splice")
    found["logits"], right["logits"] = found["logits"][real], right["logits"][real]
    assert_equal(found, right)


@pytest.mark.parametrize("method", ["MLP", "LSTM", "PROMPT", "MULTITASK"])
def test_methods(method: str) -> None:
    tasks = {"task_ids": torch.tensor([2, 0, 1])} if method == "MULTITASK" else {}
    model, inputs = ours("Llama", method=method), batch(padded=False)
    found = results(model, **inputs, **tasks, shared_prefix=TEXT[0], route="shared")
    assert_equal(found, results(model, **joined(inputs), **tasks, route="splice"))


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("Llama", "SEQ_CLS"),
        ("Bert", "SEQ_CLS"),
        ("T5", "SEQ_2_SEQ_LM"),
        ("Bart", "SEQ_2_SEQ_LM"),
        ("Roberta", "SEQ_CLS"),
    ],
)
def test_other_tasks(family: str, task: str) -> None:
    model, inputs = ours(family, task), batch(task)
    found = results(model, **inputs, shared_prefix=TEXT)
    assert_equal(found, results(model, **joined(inputs), route="splice"))


def test_tasks_with_an_output_for_each_token_give_those_of_the_text() -> None:
    model, inputs = ours("Bert", "TOKEN_CLS"), batch("TOKEN_CLS")
    found = results(model, **inputs, shared_prefix=TEXT)
    right = results(model, **joined(inputs), route="splice")
    right["logits"] = right["logits"][:, TEXT.shape[1] :]
    assert_equal(found, right)


@pytest.mark.parametrize("route", ["shared", "splice"])
def test_before_the_prompt(route: str) -> None:
    """By hand: text, prompt and rows joined as embeddings."""
    model, inputs = ours("Llama"), batch()
    found = results(model, **inputs, shared_prefix=TEXT, shared_prefix_place="before", route=route)
    base, embed = model.base_model, model.get_input_embeddings()
    model.zero_grad()
    front = torch.cat((embed(TEXT)[0], model.prompt_rows()))
    embeds = torch.cat((front.expand(3, -1, -1), embed(inputs["input_ids"])), 1)
    mask = torch.cat((torch.ones(3, len(front)).long(), inputs["attention_mask"]), 1)
    labels = torch.cat((torch.full((3, len(front)), -100), inputs["labels"]), 1)
    output = base(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    output.loss.backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    real = mask.bool()
    found["logits"] = found["logits"][real]
    assert_equal(found, {"loss": output.loss, "logits": output.logits[real], **grads})


@pytest.mark.parametrize("route", ["shared", "splice"])
def test_rows_of_several_adapters_and_of_none(route: str) -> None:
    model, inputs = ours("Llama"), batch(padded=False)
    model.add_adapter("longer", fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    names = ["longer", BASE, "default"]
    found = results(model, **inputs, shared_prefix=TEXT, adapter_names=names, route=route)
    assert_equal(found, results(model, **joined(inputs), adapter_names=names, route="splice"))


@pytest.mark.parametrize("method", ["MLP", "PREFIX"])
def test_without_a_prompt(method: str) -> None:
    model, inputs = ours("Qwen2", method=method), batch()  # whose keys are narrower than its embeddings
    del inputs["labels"]
    with model.disable_adapter():
        found, right = model(**inputs, shared_prefix=TEXT), model(**joined(inputs))
    real = joined(inputs)["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], right.logits[real])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bloom"])
def test_generate(family: str, beams: int) -> None:
    model, ids = ours(family), tokens(3, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = model.generate(ids, shared_prefix=TEXT, **options)
    right = model.generate(torch.cat((TEXT.expand(3, -1), ids), 1), route="splice", **options)
    assert torch.equal(found[:, :5], ids) and torch.equal(found[:, 5:], right[:, 11:])


def test_a_conversation_that_goes_on() -> None:
    model, ids, more = ours("Llama"), tokens(2, 5), tokens(2, 3, seed=4)
    first = model(ids, shared_prefix=TEXT, use_cache=True)
    found = model(more, past_key_values=first.past_key_values, shared_prefix=TEXT)
    right = model(torch.cat((TEXT.expand(2, -1), ids, more), 1), route="splice")
    torch.testing.assert_close(found.logits, right.logits[:, -3:], rtol=0, atol=2e-5)


def test_apply() -> None:
    import peft

    base = build("Llama")
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    inputs, ids = batch(padded=False), tokens(2, 5)
    right, answer = (
        results(theirs, **joined(inputs)),
        theirs.generate(input_ids=torch.cat((TEXT.expand(2, -1), ids), 1), max_new_tokens=4, do_sample=False),
    )
    fusedprompt.apply(theirs)
    assert_equal(results(theirs, **inputs, shared_prefix=TEXT), right)
    found = theirs.generate(input_ids=ids, shared_prefix=TEXT, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[:, 5:], answer[:, 11:])


def test_it_is_computed_once() -> None:
    """Token-layers: N + K once, and B rows of text."""
    model, inputs, seen = ours("Llama"), batch(padded=False), []
    for layer in model.base_model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    model(**inputs, shared_prefix=TEXT, route="shared", logits="text")
    assert sum(seen) == 2 * (4 + 6 + 3 * 7)


def test_explain() -> None:
    model = ours("Llama")
    assert "row 0: P P P P t t t t t t t t" in model.explain(input_ids=tokens(2, 2), shared_prefix=TEXT)
    said = model.explain(input_ids=tokens(2, 2), shared_prefix=TEXT, shared_prefix_place="before")
    assert "row 0: t t t t t t P P P P t t" in said


def test_threads_with_texts_of_their_own() -> None:
    model, inputs = ours("Llama"), batch(padded=False)
    texts = [tokens(1, 3 + one, seed=20 + one) for one in range(4)]
    right = [model(**joined(inputs, text), route="splice").logits for text in texts]
    found: dict[int, Tensor] = {}

    def run(one: int) -> None:
        for _ in range(5):
            found[one] = model(**inputs, shared_prefix=texts[one], route="shared").logits

    threads = [threading.Thread(target=run, args=(one,)) for one in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, expected in enumerate(right):
        torch.testing.assert_close(found[one], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"shared_prefix": [1, 2]}, TypeError, "shared_prefix: expected a tensor"),
        ({"shared_prefix": TEXT.float()}, TypeError, "shared_prefix: expected an integer dtype"),
        ({"shared_prefix": TEXT.expand(3, -1)}, ValueError, r"shape \(1, K\).*got \(3, 6\)"),
        ({"shared_prefix": TEXT[:, :0]}, ValueError, "K >= 1"),
        ({"shared_prefix": TEXT, "shared_prefix_place": "middle"}, ValueError, "shared_prefix_place: expected"),
        ({"shared_prefix": TEXT, "slots": torch.zeros(3, 11).long()}, ValueError, "slots: expected None"),
        ({"shared_prefix": TEXT + 1000}, IndexError, "index"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "generate"])
def test_bad_texts(given: dict[str, Any], error: type[Exception], said: str, method: str) -> None:
    model = ours("Llama")
    with pytest.raises(error, match=said):
        getattr(model, method)(input_ids=tokens(), **given)


PREFIXES = ("PREFIX", "PROJECTED", "CARTRIDGE")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_behind_a_prefix(family: str, side: str) -> None:
    """The right result is that of the rows with the text in front, each unpadded and alone."""
    model, inputs, real = ours(family, method="PREFIX"), batch(), []
    if side == "left":
        inputs = {
            name: torch.stack([row.roll(by) for row, by in zip(field, (0, 3, 2))]) for name, field in inputs.items()
        }
    real = inputs["attention_mask"].bool()
    found = results(model, **inputs, shared_prefix=TEXT)
    found["logits"] = found["logits"][real]
    model.zero_grad()
    logits, losses = [], []
    for row, own in zip(inputs["input_ids"], real):
        ids = torch.cat((TEXT, row[own][None]), 1)
        logits.append(model(ids).logits[0, -int(own.sum()) - 1 :])
        losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], row[own], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert_equal(found, {"loss": loss, "logits": torch.cat([one[1:] for one in logits]), **grads})


@pytest.mark.parametrize("method", PREFIXES)
def test_behind_prefixes_of_all_kinds(method: str) -> None:
    model, inputs = ours("Llama", method=method), batch(padded=False)
    found, right = results(model, **inputs, shared_prefix=TEXT), results(model, **joined(inputs))
    right["logits"] = right["logits"][:, TEXT.shape[1] :]
    assert_equal(found, right)


def test_behind_prefixes_of_several_adapters_and_of_none() -> None:
    model, inputs = ours("Llama", method="PREFIX"), batch(padded=False)
    model.add_adapter("longer", fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    names = ["longer", BASE, "default"]
    found = results(model, **inputs, shared_prefix=TEXT, adapter_names=names)
    # Without a prompt nothing else predicts a row's first token; behind a text that does.
    right = results(model, **joined(inputs), adapter_names=names)
    right["logits"] = right["logits"][:, TEXT.shape[1] :]
    assert_equal(found, right)


def test_a_prefix_s_classifier() -> None:
    model, inputs = ours("Llama", "SEQ_CLS", method="PREFIX"), batch("SEQ_CLS")
    assert_equal(results(model, **inputs, shared_prefix=TEXT), results(model, **joined(inputs)))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bloom"])
def test_generate_behind_a_prefix(family: str, beams: int) -> None:
    model, ids = ours(family, method="PREFIX"), tokens(3, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = model.generate(ids, shared_prefix=TEXT, **options)
    right = model.generate(torch.cat((TEXT.expand(3, -1), ids), 1), **options)
    assert torch.equal(found[:, :5], ids) and torch.equal(found[:, 5:], right[:, 11:])


def test_apply_behind_a_prefix() -> None:
    import peft

    theirs = peft.get_peft_model(
        build("Llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    inputs, ids = batch(padded=False), tokens(2, 5)
    right = results(theirs, **joined(inputs))
    answer = theirs.generate(input_ids=torch.cat((TEXT.expand(2, -1), ids), 1), max_new_tokens=4, do_sample=False)
    right["logits"] = right["logits"][:, TEXT.shape[1] :]
    fusedprompt.apply(theirs)
    assert_equal(results(theirs, **inputs, shared_prefix=TEXT), right)
    found = theirs.generate(input_ids=ids, shared_prefix=TEXT, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[:, 5:], answer[:, 11:])


def test_text_behind_a_prefix_is_computed_once() -> None:
    model, inputs, seen = ours("Llama", method="PREFIX"), batch(padded=False), []
    for layer in model.base_model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    model(**inputs, shared_prefix=TEXT)
    assert sum(seen) == 2 * (6 + 3 * 7)


def test_a_conversation_behind_a_prefix_goes_on() -> None:
    model, ids, more = ours("Llama", method="PREFIX"), tokens(2, 5), tokens(2, 3, seed=4)
    first = model(ids, shared_prefix=TEXT, use_cache=True)
    found = model(more, past_key_values=first.past_key_values, shared_prefix=TEXT)
    right = model(torch.cat((TEXT.expand(2, -1), ids, more), 1))
    torch.testing.assert_close(found.logits, right.logits[:, -3:], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "task", "place", "said"),
    [
        ("Llama", "CAUSAL_LM", "before", "stands in front of all text"),
        ("Bert", "SEQ_CLS", "behind", "only a decoder reads"),
        ("T5", "SEQ_2_SEQ_LM", "behind", "only a decoder reads"),
    ],
)
def test_text_that_no_prefix_can_have_is_refused(family: str, task: str, place: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"shared_prefix: expected None with adapter 'default'.*{said}"):
        ours(family, task, method="PREFIX")(**batch(task), shared_prefix=TEXT, shared_prefix_place=place)


def test_cpt_weighs_its_own_context() -> None:
    model = ours("Llama", method="CPT")
    model(tokens(), shared_prefix=TEXT)
    with pytest.raises(ValueError, match="CPT weighs the loss of its own context"):
        model(tokens(), labels=tokens(), shared_prefix=TEXT)


# Finding it


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[5, 6, 7, 8], [5, 6, 9, 8]], [5, 6]),
        ([[5, 6, 7], [5, 6, 7]], [5, 6]),  # something must be left
        ([[5, 6, 7, 8], [5, 6]], [5]),
        ([[5], [5, 6]], []),
        ([[4, 6], [5, 6]], []),
        ([[5, 6, 7, 8]], [5, 6, 7]),
        ([[5, 6, 7, 8, 9, 9], [5, 6, 1, 8, 9, 9]], [5, 6]),  # not what is equal behind
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_finding(rows: list[list[int]], shared: list[int], side: str) -> None:
    width = max(map(len, rows)) + 1
    ids, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, own in enumerate(rows):
        columns = slice(width - len(own), None) if side == "left" else slice(0, len(own))
        ids[row, columns], mask[row, columns] = torch.tensor(own), 1
    assert find_shared_prefix(ids, mask).tolist() == [shared]
    parts = split_shared_prefix({"input_ids": ids, "attention_mask": mask, "labels": ids, "note": "kept"})
    assert parts["note"] == "kept"
    rest = [row[own.bool()].tolist() for row, own in zip(parts["input_ids"], parts["attention_mask"])]
    assert rest == [own[len(shared) :] for own in rows]
    assert ("shared_prefix" in parts) == bool(shared) and parts["labels"].shape == parts["input_ids"].shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_that_was_split_gives_the_same_loss(side: str) -> None:
    model, whole = ours("Llama"), joined(batch())
    if side == "left":
        for row, length in ((1, 10), (2, 11)):
            for field in whole.values():
                field[row] = field[row].roll(13 - length)
    split = split_shared_prefix(whole, TEXT)
    assert split["input_ids"].shape == (3, 7)
    found, right = results(model, **split, route="shared"), results(model, **whole, route="splice")
    del found["logits"], right["logits"]
    assert_equal(found, right)


def test_what_is_no_shared_text_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_prefix: expected what all 3 rows begin with"):
        split_shared_prefix({"input_ids": tokens()}, TEXT[:, :2])
    with pytest.raises(TypeError, match="input_ids: expected an integer"):
        find_shared_prefix(torch.rand(2, 3))
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        find_shared_prefix(tokens(), torch.ones(2, 2))
    assert find_shared_prefix(tokens()[:0]).shape == (1, 0)
