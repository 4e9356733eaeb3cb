"""Rendered batches against rows that are put together by hand, column by column."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedprompt import Template, TemplateCollator
from fusedprompt.layouts.parts import Anchor, Field, Mask, Prompt
from models import VOCAB
from tolerance import examples, one_thread  # noqa: F401
from word_tokenizers import word_tokenizer

TOKENIZERS = {family: word_tokenizer(family) for family in ("bert", "roberta", "llama", "gpt2")}
# (before, between, after), and the types of first and second.
SPECIALS = {
    "bert": ((3,), (4,), (4,), True),
    "roberta": ((3,), (1, 1), (1,), False),
    "llama": ((3,), (3,), (), False),
    "gpt2": ((), (), (), False),
}


@dataclasses.dataclass
class Column:
    """A column: a prompt row (>= 0) or a token, its label, its type, and whether it is an anchor."""

    row: int | None
    token: int | None
    label: int = -100
    type: int = 0
    anchor: bool = False


def by_hand(
    template: Template, family: str, values: dict[str, list[int]], loss: tuple[str, ...], at_mask: list[int]
) -> Iterator[Column]:
    before, between, after, has_types = SPECIALS[family]
    kinds = [str(part) for part in template.parts]
    row, kind, masks = 0, 0, iter(at_mask)
    yield from (Column(None, token) for token in before)
    for text, part in zip(kinds, template.parts):
        if isinstance(part, Prompt):
            for _ in range(part.rows):
                yield Column(row, None, type=kind)
                row += 1
        elif isinstance(part, Field):
            for token in values[part.name]:
                yield Column(None, token, token if part.name in loss else -100, kind)
        elif isinstance(part, Anchor):
            for token in part.ids or (TOKENIZERS[family].convert_tokens_to_ids(word) for word in part.text.split()):  # type: ignore[union-attr]
                yield Column(None, token, type=kind, anchor=True)
        elif isinstance(part, Mask):
            yield Column(None, part.id or 5, next(masks), kind, True)
        else:
            assert text == "[sep]"
            yield from (Column(None, token, type=0) for token in between)
            kind = int(has_types)
    yield from (Column(None, token, type=kind) for token in after)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Template, dict[str, list[list[int]]], int]:
    family = draw(st.sampled_from(sorted(SPECIALS)))
    pool = ["[prompt 1]", "[prompt 3]", '[anchor "is the"]', "[anchor 9]", "[a]", "[b]", "[sep]", "[mask 5]"]
    chosen = draw(st.permutations(pool))[: draw(st.integers(1, len(pool)))]
    template = Template.parse(" ".join([*chosen, "[prompt 2]"]))
    size = draw(st.integers(1, 3))
    ids = st.lists(st.lists(st.integers(6, VOCAB - 1), max_size=4), min_size=size, max_size=size)
    return family, template, {name: draw(ids) for name in template.fields}, size


@examples(60)
@given(
    case=cases(),
    side=st.sampled_from(("left", "right")),
    multiple=st.sampled_from((None, 8)),
    pool=st.sampled_from(("first", "last")),
    data=st.data(),
)
def test_a_rendered_batch_has_the_columns_of_rows_by_hand(
    case: Any, side: str, multiple: int | None, pool: str, data: st.DataObject
) -> None:
    family, template, values, size = case
    loss = tuple(data.draw(st.lists(st.sampled_from(template.fields), unique=True))) if template.fields else ()
    labels = [[7 + b] * template.num_masks for b in range(size)]
    options: dict[str, Any] = {"mask_labels": labels} if template.num_masks else {}
    if not template.fields:
        size, labels = 1, labels[:1]
        options = {"mask_labels": labels} if labels[0] else {}
    batch = template.render(
        values,
        TOKENIZERS[family],
        loss=loss,
        padding_side=side,
        pad_to_multiple_of=multiple,
        pool=pool,
        position_ids=True,
        **options,
    )
    rows = [
        list(by_hand(template, family, {name: ids[b] for name, ids in values.items()}, loss, labels[b]))
        for b in range(size)
    ]
    width = max(map(len, rows))
    width = width if multiple is None else -(-width // multiple) * multiple
    assert batch["slots"].shape == batch["attention_mask"].shape == (size, width)
    assert batch["input_ids"].shape == (size, width - template.num_prompt_rows)
    assert ("token_type_ids" in batch) == (family == "bert") and ("labels" in batch) == bool(loss or options)
    for b, row in enumerate(rows):
        padding = width - len(row)
        first = padding if side == "left" else 0
        real = range(first, first + len(row))
        assert batch["attention_mask"][b].tolist() == [int(s in real) for s in range(width)]
        assert int(batch["pool_index"][b]) == (real[0] if pool == "first" else real[-1])
        symbols = []
        for position, (s, column) in enumerate(zip(real, row)):
            slot = int(batch["slots"][b, s])
            assert (slot < 0) == (column.row is not None)
            assert column.row == -slot - 1 if slot < 0 else column.token == int(batch["input_ids"][b, slot])
            assert int(batch["position_ids"][b, s]) == position
            if "labels" in batch:
                assert int(batch["labels"][b, s]) == column.label
            if "token_type_ids" in batch:
                assert int(batch["token_type_ids"][b, s]) == column.type
            symbols.append("A" if column.anchor else "P" if slot < 0 else "t")
        for s in {*range(width)} - {*real}:  # padding refers to padding
            assert int(batch["input_ids"][b, batch["slots"][b, s]]) == 0
            assert "labels" not in batch or int(batch["labels"][b, s]) == -100
        dots = ["·"] * padding
        if width <= 24:
            assert batch.picture(b).split() == (dots + symbols if side == "left" else symbols + dots)


def test_texts_and_their_ids_render_alike() -> None:
    tokenizer = TOKENIZERS["bert"]
    template = Template.parse("[prompt 2] [a] [sep] [b] [prompt 1]")
    texts = {"a": ["paris is big", "rome"], "b": ["cats purr", "no"]}
    ids = {name: tokenizer(values, add_special_tokens=False)["input_ids"] for name, values in texts.items()}
    tensors = {name: [torch.tensor(row) for row in rows] for name, rows in ids.items()}
    expected = template.render(texts, tokenizer)
    for values in (ids, tensors, {"a": texts["a"], "b": ids["b"]}):
        found = template.render(values, tokenizer)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    bound = template.bind(tokenizer).render(ids)  # without the tokenizer
    assert all(torch.equal(bound[name], expected[name]) for name in bound)


def test_a_template_around_one_text_keeps_the_tokenizers_own_sequence() -> None:
    tokenizer = TOKENIZERS["bert"]
    batch = Template.parse("[prompt 2] [a] [sep] [b] [prompt 1]").render({"a": ["paris"], "b": ["rome no"]}, tokenizer)
    own = tokenizer("paris", "rome no")
    assert batch["input_ids"][0].tolist() == own["input_ids"]
    assert batch["token_type_ids"][0, batch["slots"][0] >= 0].tolist() == own["token_type_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_shortens_the_longest_fields_and_nothing_else(side: str) -> None:
    tokenizer = word_tokenizer("bert", truncation_side=side)
    template = Template.parse('[prompt 2] [a] [anchor "is the"] [sep] [b] [prompt 1]')
    a, b = [[10, 11], list(range(10, 20))], [list(range(20, 26)), [30, 31, 32]]
    batch = template.render({"a": a, "b": b}, tokenizer, max_length=15, loss=["a", "b"])
    assert batch["slots"].shape == (2, 15)  # 3 prompt rows, 2 anchors, 3 special tokens, 7 of text
    found = [[label for label in row if label >= 0] for row in batch["labels"].tolist()]
    if side == "right":
        assert found == [[10, 11, 20, 21, 22, 23, 24], [10, 11, 12, 13, 30, 31, 32]]
    else:
        assert found == [[10, 11, 21, 22, 23, 24, 25], [16, 17, 18, 19, 30, 31, 32]]
    assert ((batch["slots"] < 0) & (batch["attention_mask"] > 0)).sum(1).tolist() == [3, 3]
    with pytest.raises(ValueError, match="max_length: expected more than the 8 columns of prompt and anchors"):
        template.render({"a": a, "b": b}, tokenizer, max_length=8)


@examples(40)
@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=2), room=st.integers(1, 20))
def test_truncation_takes_no_more_than_it_must_and_from_the_longest(lengths: list[int], room: int) -> None:
    values = {"a": [[7] * lengths[0]], "b": [[8] * lengths[1]]}
    batch = Template.parse("[prompt 1] [a] [b]").render(values, max_length=1 + room)
    ids = batch["input_ids"][0].tolist()
    kept = [ids.count(7), ids.count(8)]
    assert sum(kept) == min(room, sum(lengths))
    for own, other, before in ((0, 1, lengths[0]), (1, 0, lengths[1])):
        assert kept[own] == before or kept[own] >= kept[other] - 1  # none is cut below another


FIELDS = {"a": [[7]], "b": [[8]]}


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ([[7]], {}, r"fields: the template .* has the fields \('a', 'b'\); expected a value for each by name"),
        ({"a": [[7]]}, {}, r"fields: template part 2 '\[b\]': expected a value, got only \['a'\]"),
        ({**FIELDS, "c": [[7]]}, {}, r"fields: 'c' is no field of the template"),
        ({"a": [[7]], "b": [[8], [9]]}, {}, r"fields: template part 2 '\[b\]': expected 1 values.*got 2"),
        ({"a": "x", "b": [[8]]}, {}, r"fields: template part 1 '\[a\]': expected a list of texts"),
        ({"a": ["x"], "b": [[8]]}, {}, r"fields: template part 1 '\[a\]': texts need a tokenizer"),
        (FIELDS, {"loss": ["c"]}, r"loss: 'c' is no field of the template"),
        (FIELDS, {"labels": {"a": [[1, 2]]}}, "labels: field 'a': expected one label for each of its tokens"),
        (FIELDS, {"labels": [1], "loss": ["a"]}, "labels: expected None, or labels per field, with `loss`"),
        (FIELDS, {"padding_side": "up"}, r"padding_side: expected one of \('left', 'right'\), got 'up'"),
        (FIELDS, {"pool": "mean"}, r"pool: expected one of .*, got 'mean'"),
        (FIELDS, {"mask_labels": [[1, 2]]}, "mask_labels: expected one label for each of 1 masks"),
        (FIELDS, {"mask_labels": ["x"]}, "mask_labels: expected an id, because there is no tokenizer, got 'x'"),
        (FIELDS, {"mask_labels": [1, 2]}, "mask_labels: expected 1 labels"),
        (FIELDS, {"slots": False}, "slots: expected True for .*, which is not a prompt in front of all text"),
    ],
)
def test_values_that_do_not_fit_are_refused(fields: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.parse("[prompt 1] [a] [b] [mask 5]").render(fields, **options)


def test_a_mask_label_of_several_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a text of one token, got 'cats purr', which is 2"):
        Template.parse("[prompt 1] [mask]").render({}, TOKENIZERS["bert"], mask_labels=["cats purr"])


def test_labels_per_token_and_per_sequence() -> None:
    template = Template.parse("[a] [prompt 1] [b]")
    tokens = template.render({"a": [[7, 8]], "b": [[9]]}, labels={"a": [[1, 2]]}, loss="b")
    assert tokens["labels"].tolist() == [[1, 2, -100, 9]]
    assert template.render({"a": [[7], [8]], "b": [[9], [9]]}, labels=[1, 0])["labels"].tolist() == [1, 0]


def test_a_collator_makes_batches_of_examples() -> None:
    tokenizer, template = TOKENIZERS["bert"], Template.parse("[prompt 2] [a] [prompt 1] [mask]")
    examples_ = [{"a": "paris is", "mask_label": "france"}, {"a": "rome", "mask_label": "italy"}]
    batch = TemplateCollator(template, tokenizer, options={"max_length": 9})(examples_)
    expected = template.render({"a": ["paris is", "rome"]}, tokenizer, mask_labels=["france", "italy"], max_length=9)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert type(batch)({**batch}) == batch  # how accelerate copies a batch to a device
    classes = TemplateCollator(template, tokenizer)([{"a": "rome", "label": 2}])
    assert classes["labels"].tolist() == [2]
    by_field = TemplateCollator(Template.parse("[a] [prompt 1]"))([{"a": [7, 8], "labels": {"a": [1, 2]}}])
    assert by_field["labels"].tolist() == [[1, 2, -100]]


def test_a_plain_prefix_is_collated_without_slots_so_that_the_shared_route_serves_it() -> None:
    batch = TemplateCollator(Template.parse("[prompt 2] [a]"), TOKENIZERS["gpt2"], loss=["a"])(
        [{"a": "cats purr"}, {"a": "cats"}]
    )
    cats, purr = TOKENIZERS["gpt2"].convert_tokens_to_ids(["cats", "purr"])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[cats, purr], [cats, 0]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[cats, purr], [cats, -100]],
    }
