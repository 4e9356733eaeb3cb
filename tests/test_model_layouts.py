"""Models with explicit slots against the base model itself, called row by row without padding, in fp64.

The oracle builds each row's embeddings by hand from the prompt table and the word embeddings, column by column.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fusedprompt
import oracle
from models import CPT_FIELDS, PAD, VOCAB, ours, pad, task_inputs, tokens
from tolerance import examples, one_thread  # noqa: F401

ROWS = 4


@dataclasses.dataclass
class Case:
    """Per row, the columns that are not padding: slots, and the padding on both sides of them."""

    slots: list[list[int]]
    left: list[int]
    right: list[int]
    length: int

    @property
    def width(self) -> int:
        return len(self.slots[0]) + self.left[0] + self.right[0]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Slots (padding refers to a prompt row or to a token, as it comes) and mask."""
        filler = [-1, 0, self.length - 1]
        slots = [
            [filler[i % 3] for i in range(left)] + row + [filler[i % 2] for i in range(right)]
            for row, left, right in zip(self.slots, self.left, self.right)
        ]
        mask = [[0] * a + [1] * len(row) + [0] * b for row, a, b in zip(self.slots, self.left, self.right)]
        return torch.tensor(slots), torch.tensor(mask)

    def ids(self) -> Tensor:
        return tokens(len(self.slots), self.length)


@st.composite
def cases(draw: st.DrawFn, padding: str = "both") -> Case:
    """Every token once, and prompt rows anywhere between them, some repeated and some not there at all."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    rows, widest = [], length + ROWS + draw(st.integers(0, 3))
    left, right = [], []
    for _ in range(batch):
        prompt = [-1 - draw(st.integers(0, ROWS - 1)) for _ in range(draw(st.integers(1, ROWS)))]
        kept = list(range(draw(st.integers(1, length))))
        row = draw(st.permutations([*prompt, *kept]))
        free = widest - len(row)
        at_left = {"both": draw(st.integers(0, free)), "left": free, "right": 0}[padding]
        rows.append(list(row))
        left.append(at_left)
        right.append(free - at_left)
    return Case(rows, left, right, length)


def model_of(family: str, task: str = "CAUSAL_LM") -> Any:
    return ours(family, task, rows=ROWS).double()


def row_embeddings(model: Any, case: Case, b: int, ids: Tensor) -> Tensor:
    """(1, n, D): one row's columns without padding."""
    prompt, table = model.prompt_encoder["default"].embedding.weight, model.get_input_embeddings().weight
    return torch.stack([prompt[-s - 1] if s < 0 else table[ids[b, s]] for s in case.slots[b]]).unsqueeze(0)


def gradient(model: Any, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, model.prompt_encoder["default"].embedding.weight, retain_graph=True)
    return found


def assert_close(actual: Tensor, expected: Tensor, single: bool = False) -> None:
    """single: transformers computes a language model's loss in fp32, whatever the logits."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False} if single else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(actual, expected, **tolerance)  # type: ignore[arg-type]


LANGUAGE = {family: model_of(family) for family in ("Llama", "GPT2", "OPT")}


@examples(25)
@given(case=cases(), family=st.sampled_from(sorted(LANGUAGE)))
def test_language_models_give_logits_loss_and_gradients_of_rows_run_alone(case: Case, family: str) -> None:
    model, ids, (slots, mask) = LANGUAGE[family], case.ids(), case.tensors()
    labels = torch.randint(0, VOCAB, slots.shape).masked_fill((mask == 0) | (torch.rand(slots.shape) < 0.3), -100)
    labels[0, case.left[0] + len(case.slots[0]) - 1] = 5  # one label at least
    output = model(input_ids=ids, slots=slots, attention_mask=mask, labels=labels)
    text = model(input_ids=ids, slots=slots, attention_mask=mask, logits="text").logits
    assert output.logits.shape[:2] == slots.shape and text.shape[:2] == ids.shape
    losses, count = [], 0
    weight = torch.randn(VOCAB, dtype=torch.float64)
    weighted, true = (output.logits @ weight)[mask != 0].sum(), torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(case.slots):
        logits = model.base_model(inputs_embeds=row_embeddings(model, case, b, ids)).logits[0]
        columns = slice(case.left[b], case.left[b] + len(row))
        assert_close(output.logits[b, columns], logits)
        for column, slot in enumerate(row):
            if slot >= 0:
                assert_close(text[b, slot], logits[column])
        true = true + (logits @ weight).sum()
        own = labels[b, columns]
        losses.append(F.cross_entropy(logits[:-1], own[1:], ignore_index=-100, reduction="sum"))
        count += int((own[1:] != -100).sum())
    assert_close(gradient(model, weighted), gradient(model, true))
    if count:
        expected = torch.stack(losses).sum() / count
        assert_close(output.loss, expected, single=True)
        assert_close(gradient(model, output.loss), gradient(model, expected), single=True)


CLASSIFIERS = {
    (family, task): model_of(family, task)
    for family in ("Llama", "GPT2", "Bert", "Roberta")
    for task in ("SEQ_CLS", "TOKEN_CLS")
    if (family, task) != ("Llama", "TOKEN_CLS")
}


@examples(25)
@given(case=cases(), key=st.sampled_from(sorted(CLASSIFIERS)))
def test_classifiers_give_logits_loss_and_gradients_of_rows_run_alone(case: Case, key: tuple[str, str]) -> None:
    model, ids, (slots, mask) = CLASSIFIERS[key], case.ids(), case.tensors()
    per_token = key[1] == "TOKEN_CLS"
    labels = torch.randint(0, 3, slots.shape) if per_token else torch.randint(0, 3, (len(ids),))
    if per_token:
        labels = labels.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, slots=slots, attention_mask=mask, labels=labels)
    all_logits, all_labels = [], []
    for b, row in enumerate(case.slots):
        logits = model.base_model(inputs_embeds=row_embeddings(model, case, b, ids)).logits[0]
        if per_token:
            for column, slot in enumerate(row):
                if slot >= 0:
                    assert_close(output.logits[b, slot], logits[column])
            all_labels.append(labels[b, case.left[b] : case.left[b] + len(row)])
        else:
            assert_close(output.logits[b], logits)
            all_labels.append(labels[b : b + 1])
        all_logits.append(logits.view(-1, 3))
    expected = F.cross_entropy(torch.cat(all_logits), torch.cat(all_labels))
    assert_close(output.loss, expected)
    assert_close(gradient(model, output.loss), gradient(model, expected))


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_a_classifier_reads_the_column_it_is_told(family: str) -> None:
    model = CLASSIFIERS[family, "SEQ_CLS"]
    case = Case([[0, -1, 1, -2, 2, -3]] * 2, [0, 0], [0, 0], 3)
    slots, pooled, ids = case.tensors()[0], torch.tensor([4, 2]), case.ids()
    logits = model(input_ids=ids, slots=slots, pool_index=pooled).logits
    for b, index in enumerate(pooled.tolist()):
        embeds = row_embeddings(model, case, b, ids)
        if family == "Llama":  # nothing behind the column matters to it
            expected = model.base_model(inputs_embeds=embeds[:, : index + 1]).logits
        else:
            positions = torch.arange(6).unsqueeze(0).roll(-index, 1)
            expected = model.base_model(inputs_embeds=embeds.roll(-index, 1), position_ids=positions).logits
        assert_close(logits[b], expected[0])


@examples(8)
@given(case=cases())
def test_answers_to_questions_move_with_their_tokens(case: Case) -> None:
    model, ids, (slots, mask) = QUESTIONS, case.ids(), case.tensors()
    first = [next(s for s in row if s >= 0) for row in case.slots]
    answers = {name: torch.tensor(first) for name in ("start_positions", "end_positions")}
    output = model(input_ids=ids, slots=slots, attention_mask=mask, **answers)
    losses = []
    for b, row in enumerate(case.slots):
        # The loss is a softmax over all columns, padding's too: those are compared as they come.
        alone = model.base_model(inputs_embeds=row_embeddings(model, case, b, ids))
        for name in ("start_logits", "end_logits"):
            for column, slot in enumerate(row):
                if slot >= 0:
                    assert_close(output[name][b, slot], alone[name][0, column])
        losses.append(row.index(first[b]))
    if not any(case.left) and not any(case.right):
        spans = torch.tensor(losses)
        embeds = torch.cat([row_embeddings(model, case, b, ids) for b in range(len(ids))])
        expected = model.base_model(inputs_embeds=embeds, start_positions=spans, end_positions=spans).loss
        assert_close(output.loss, expected)


QUESTIONS = model_of("Bert", "QUESTION_ANS")


@examples(8)
@given(case=cases(padding="right"))
def test_an_encoder_decoder_gives_logits_and_loss_of_rows_run_alone(case: Case) -> None:
    model, ids, (slots, mask) = ENCODER_DECODER, case.ids(), case.tensors()
    labels = torch.randint(3, VOCAB, (len(ids), 3))
    output = model(input_ids=ids, slots=slots, attention_mask=mask, labels=labels)
    losses = []
    for b in range(len(ids)):
        alone = model.base_model(inputs_embeds=row_embeddings(model, case, b, ids), labels=labels[b : b + 1])
        assert_close(output.logits[b], alone.logits[0])
        losses.append(alone.loss)
    expected = torch.stack(losses).mean()
    assert_close(output.loss, expected)
    assert_close(gradient(model, output.loss), gradient(model, expected))


ENCODER_DECODER = model_of("T5", "SEQ_2_SEQ_LM")


def test_features_have_the_columns_of_the_slots() -> None:
    model = model_of("Bert", "FEATURE_EXTRACTION")
    case = Case([[0, -1, 1, -2], [-4, -3, 0, 1]], [0, 0], [0, 0], 2)
    slots, mask = case.tensors()
    output = model(input_ids=case.ids(), slots=slots, attention_mask=mask, token_type_ids=(slots < 0).long())
    for b in range(2):
        types = (slots[b : b + 1] < 0).long()
        embeds = row_embeddings(model, case, b, case.ids())
        alone = model.base_model(inputs_embeds=embeds, token_type_ids=types)
        assert_close(output.last_hidden_state[b], alone.last_hidden_state[0])


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generation_continues_each_row_as_if_it_were_alone(family: str, options: dict[str, Any]) -> None:
    model = LANGUAGE[family]
    case = Case([[0, -1, -2, 1, 2, -3], [-2, 0, 1, -4]], [0, 1], [0, 1], 3)
    slots, mask = case.tensors()
    ids = case.ids()
    ids[1, 2] = PAD
    if "prompt_lookup_num_tokens" in options or "do_sample" in options:  # one row at a time, or one stream of numbers
        case, slots, mask, ids = (
            Case(case.slots[:1], [2], [0], 3),
            F.pad(slots[:1], (2, 0), value=-1),
            F.pad(mask[:1], (2, 0)),
            ids[:1],
        )
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": PAD, **options}
    torch.manual_seed(3)
    found = model.generate(input_ids=ids, slots=slots, attention_mask=mask, **options)
    assert torch.equal(found[:, :3], ids)
    for b in range(len(ids)):
        if "prompt_lookup_num_tokens" in options:
            options.pop("prompt_lookup_num_tokens")  # which gives what greedy search gives
        torch.manual_seed(3)
        alone = model.base_model.generate(inputs_embeds=row_embeddings(model, case, b, ids), **options)
        assert torch.equal(found[b, 3:], alone[0])


def prefix_batch(task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch without slots, and the same with the slots of the plain prefix."""
    inputs = task_inputs(task, *pad(tokens(2, 5), 0, 2))
    slots = torch.tensor([[*range(-1, -ROWS - 1, -1), *range(7)]] * 2)
    placed = {**inputs, "slots": slots, "attention_mask": F.pad(inputs["attention_mask"], (ROWS, 0), value=1)}
    if task == "CAUSAL_LM":
        placed["labels"] = F.pad(inputs["labels"], (ROWS, 0), value=-100)
    return inputs, placed


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("route", ["shared", "splice"])
def test_the_slots_of_a_plain_prefix_are_served_as_a_batch_without_slots(task: str, route: str) -> None:
    model = LANGUAGE["Llama"] if task == "CAUSAL_LM" else CLASSIFIERS["Llama", "SEQ_CLS"]
    inputs, placed = prefix_batch(task)
    expected, actual = model(**inputs, route=route), model(**placed, route=route)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)


def test_a_prefix_with_labels_of_its_own_is_not_the_plain_prefix() -> None:
    model, (_, placed) = LANGUAGE["Llama"], prefix_batch("CAUSAL_LM")
    before = model(**placed).loss
    placed["labels"][:, 1] = 5
    with pytest.raises(fusedprompt.BackendUnavailable, match="the slots say where each prompt row goes"):
        model(**placed, route="shared")
    assert model(**placed).loss != before


GIVEN = {"input_ids": tokens(2, 3), "slots": torch.tensor([[0, -1, 1, 2], [-4, 0, 1, 2]])}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"slots": [[0]]}, TypeError, "slots: expected an int64 tensor"),
        ({"slots": torch.zeros(2, 4)}, ValueError, "slots: expected int64 of shape"),
        ({"slots": torch.zeros(3, 4).long()}, ValueError, r"slots: expected shape \(B, S\) with B = 2, got \(3, 4\)"),
        ({"slots": torch.full((2, 4), 3)}, ValueError, r"slots: expected values from -4 .* to 2 \(tokens\), got 3"),
        ({"slots": torch.full((2, 4), -5)}, ValueError, "slots: expected values from -4 .*, got -5"),
        ({"slots": torch.zeros(2, 97).long()}, ValueError, "at most the base model's 96 positions in a row, got 97"),
        ({"attention_mask": torch.ones(2, 3)}, ValueError, r"attention_mask: expected the shape of slots, \(2, 4\)"),
        ({"labels": torch.ones(2, 3).long()}, ValueError, r"labels: expected the shape of slots, \(2, 4\), got \(2, 3"),
        ({"position_ids": torch.ones(1, 4).long()}, ValueError, "position_ids: expected the shape of slots"),
    ],
)
def test_slots_that_fit_nothing_are_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LANGUAGE["GPT2"](**{**GIVEN, **changed})


def test_padding_does_not_count_against_the_position_limit() -> None:
    slots, mask = F.pad(GIVEN["slots"], (100, 0)), F.pad(torch.ones(2, 4), (100, 0))
    model = LANGUAGE["GPT2"]
    padded = model(input_ids=GIVEN["input_ids"], slots=slots, attention_mask=mask).logits[:, 100:]
    assert_close(padded, model(**GIVEN).logits)


def test_pool_index_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pool_index: expected shape \(B,\) = \(2,\), got \(1,\)"):
        CLASSIFIERS["Llama", "SEQ_CLS"](**GIVEN, pool_index=torch.tensor([1]))


def test_pool_index_where_nothing_is_pooled_by_it_is_refused() -> None:
    pooled = torch.tensor([1, 1])
    for model, inputs in ((LANGUAGE["Llama"], GIVEN), (CLASSIFIERS["Llama", "SEQ_CLS"], {"input_ids": tokens(2, 3)})):
        with pytest.raises(ValueError, match="pool_index: expected None but for SEQ_CLS with slots or a template"):
            model(**inputs, pool_index=pooled)


def test_slots_are_an_objection_to_the_shared_route_and_to_a_model_without_a_prompt() -> None:
    model = LANGUAGE["Llama"]
    for call in (model, model.generate):
        with pytest.raises(fusedprompt.BackendUnavailable, match="the slots say where each prompt row goes"):
            call(**GIVEN, route="shared")
        with model.disable_adapter(), pytest.raises(ValueError, match="slots: expected None for a model without"):
            call(**GIVEN)
    cache = model(**GIVEN, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="slots: expected None for tokens that follow a cache"):
        model(**GIVEN, past_key_values=cache)


def test_tokens_after_a_cache_continue_a_row_with_slots() -> None:
    model, more = LANGUAGE["GPT2"], tokens(2, 2, seed=9)
    mask = torch.ones(2, 4).long()
    cache = model(**GIVEN, attention_mask=mask, use_cache=True).past_key_values
    found = model(input_ids=more, past_key_values=cache, attention_mask=F.pad(mask, (0, 2), value=1)).logits
    longer = torch.cat((GIVEN["slots"], torch.tensor([[3, 4]] * 2)), 1)
    whole = model(input_ids=torch.cat((GIVEN["input_ids"], more), 1), slots=longer).logits
    assert_close(found, whole[:, -2:])


def test_explain_shows_the_first_row() -> None:
    slots = torch.tensor([[-1, -2, 0, 1, -3, 2, -4, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0]])
    text = LANGUAGE["Llama"].explain(input_ids=tokens(1, 3), slots=slots, attention_mask=mask)
    assert text.splitlines() == [
        "route splice: the slots say where each prompt row goes, and it is not in front of all text",
        "row 0: P P t t P t P · ·",
    ]
    left = LANGUAGE["Llama"].explain(**task_inputs("CAUSAL_LM", *pad(tokens(1, 3), 2, 0)))
    assert left.endswith("row 0: · · P P P P t t t")


@examples(6)
@given(case=cases())
def test_cpt_with_slots_gives_the_weighted_loss_of_rows_run_alone(case: Case) -> None:
    model, ids, (slots, mask) = CONTEXT, case.ids(), case.tensors()
    rows = model.prompt_rows().detach()
    total, count = torch.zeros((), dtype=torch.float64), 0
    output = model(input_ids=ids, slots=slots, attention_mask=mask, labels=slots.clamp(min=0) + 3)
    for b, row in enumerate(case.slots):
        embeds = torch.stack([rows[-s - 1] if s < 0 else model.get_input_embeddings().weight[ids[b, s]] for s in row])
        logits = model.base_model(inputs_embeds=embeds.unsqueeze(0)).logits
        # The context's codes are 1 ... 8, those of the text come after them: 4, and 8 above the context's.
        types = [CPT_FIELDS["cpt_tokens_type_mask"][-s - 1] if s < 0 else 12 for s in row]
        targets = [CPT_FIELDS["cpt_token_ids"][-s - 1] if s < 0 else s + 3 for s in row]
        labels = [target if kind % 4 == 0 else -100 for target, kind in zip(targets, types)]
        own = sum(label != -100 for label in labels[1:])
        total = total + own * oracle.cpt_loss(logits, torch.tensor([labels]), torch.tensor([types]), 1.0)
        count += own
    assert_close(output.loss, total / max(count, 1), single=True)


CONTEXT = ours("Llama", method="CPT").double()
