"""Templates themselves: their forms, what they learn of a tokenizer, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedprompt import Template
from fusedprompt.layouts.parts import Anchor, Field, Mask, Prompt, Separator
from tolerance import examples
from word_tokenizers import word_tokenizer

names = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda name: name not in ("prompt", "anchor", "mask", "sep")
)
parts = st.one_of(
    st.builds(Prompt, st.integers(1, 500)),
    st.builds(Anchor, st.text(min_size=1, max_size=6)),
    st.builds(lambda ids: Anchor(ids=tuple(ids)), st.lists(st.integers(0, 99999), min_size=1, max_size=3)),
    st.builds(Mask),
    st.builds(lambda token: Mask(token, named=False), st.integers(0, 99999)),
)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    fields = draw(st.lists(st.builds(Field, names), max_size=3, unique_by=lambda part: part.name))
    extra = draw(st.lists(parts, max_size=4)) + draw(st.sampled_from(([], [Separator()])))
    return Template(tuple(draw(st.permutations([Prompt(draw(st.integers(1, 9))), *fields, *extra]))))


@examples(60)
@given(template=templates())
def test_string_form_and_json_give_the_template_back(template: Template) -> None:
    assert Template.parse(str(template)) == template
    assert Template.parse(f"  {str(template).replace('] [', '][')} ") == template
    assert Template.from_json(template.to_json()) == template
    assert hash(Template.parse(str(template))) == hash(template)


def test_the_parts_of_a_string() -> None:
    template = Template.parse(
        r'[prompt 3] [text] [prompt 4] [anchor " capital \"x\""] [anchor 7 8] [sep] [mask] [mask 9]'
    )
    assert template.parts == (
        Prompt(3),
        Field("text"),
        Prompt(4),
        Anchor(' capital "x"'),
        Anchor(ids=(7, 8)),
        Separator(),
        Mask(),
        Mask(9, named=False),
    )
    assert template.num_prompt_rows == 7 and template.fields == ("text",) and template.num_masks == 2
    assert template == Template(template.parts) != Template.parse("[prompt 3]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prompt 3", r"such as \[prompt 3\].*, got '\[prompt 3' as part 0"),
        ("[prompt 3] text", "got 'text' as part 1"),
        ("[prompt 3] ['a']", r"got \"\['a'\]\" as part 1"),
        ("[a] [prompt]", r"template part 1 '\[prompt\]': expected \[prompt N\]"),
        ("[prompt 1 2]", r"template part 0 '\[prompt 1 2\]': expected \[prompt N\]"),
        ("[prompt 0]", r"template part 0 '\[prompt 0\]': expected a number of rows >= 1, got 0"),
        ("[prompt 1] [a 3]", r"template part 1 '\[a 3\]': .* a name alone"),
        ('[prompt 1] [a "b"]', r"template part 1 .*: a text in quotes belongs to an anchor"),
        ("[prompt 1] [anchor]", r"template part 1 '\[anchor\]': expected one text in quotes, or ids"),
        ('[prompt 1] [anchor "a" 3]', r"template part 1 .*: expected one text in quotes, or ids"),
        ('[prompt 1] [anchor ""]', r"template part 1 .*: expected a text that is not empty"),
        ("[prompt 1] [a] [b] [a]", r"template part 3 '\[a\]': 'a' is there already, as part 1"),
        ("[sep] [prompt 1] [sep]", r"template part 2 '\[sep\]': 'sep' is there already, as part 0"),
        ("[text]", r"expected a part \[prompt N\], got '\[text\]'"),
        ("", r"expected a part \[prompt N\], got ''"),
    ],
)
def test_a_string_that_is_no_template_is_refused_with_the_part(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.parse(text)


@pytest.mark.parametrize("part", [Prompt(True), Prompt("2"), Field("a b"), Field("mask"), Anchor(), Anchor(ids=())])
def test_a_part_that_is_none_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match=r"template part 1 '.*': expected"):
        Template((Prompt(1), part))


def test_anything_else_among_the_parts_is_refused() -> None:
    with pytest.raises(TypeError, match="expected Prompt, Field, Anchor, Mask or Separator, got str"):
        Template(("[prompt 3]",))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[]", "{}", "x", '{"parts": [{"kind": "other"}]}', '{"parts": [{"kind": "prompt"}]}'])
def test_json_that_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="template: expected the JSON object of a template"):
        Template.from_json(text)


@pytest.mark.parametrize(
    ("family", "pair", "expected"),
    [
        ("bert", False, ((3,), (), (4,), (0, 0, 0, 0))),
        ("bert", True, ((3,), (4,), (4,), (0, 0, 0, 1, 1))),
        ("roberta", False, ((3,), (), (1,), None)),
        ("roberta", True, ((3,), (1, 1), (1,), None)),
        ("llama", False, ((3,), (), (), None)),
        ("llama", True, ((3,), (3,), (), None)),
        ("gpt2", False, ((), (), (), None)),
        ("gpt2", True, ((), (), (), None)),
    ],
)
def test_special_tokens_are_those_that_the_tokenizer_puts(family: str, pair: bool, expected: Any) -> None:
    template = Template.parse(f"[prompt 1] [a] {'[sep] [b]' if pair else ''}").bind(word_tokenizer(family))
    assert template.specials is not None
    found = template.specials
    assert (found.before, found.between, found.after, found.types) == expected
    assert Template.from_json(template.to_json()) == template


def test_binding_gives_anchors_and_the_mask_their_ids() -> None:
    tokenizer = word_tokenizer("bert")
    template = Template.parse('[prompt 1] [anchor "is the"] [anchor 9] [mask] [mask 2]').bind(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert list(template.constant_ids()) == [
        (1, (vocabulary["is"], vocabulary["the"])),
        (2, (9,)),
        (3, (5,)),
        (4, (2,)),
    ]
    assert str(template) == '[prompt 1] [anchor "is the"] [anchor 9] [mask] [mask 2]'
    assert template.bind(tokenizer) == template
    with pytest.raises(ValueError, match=r"expected the one that the template .* was bound to, got another"):
        template.bind(word_tokenizer("roberta"))


def test_what_a_tokenizer_lacks_is_refused_with_the_part() -> None:
    with pytest.raises(ValueError, match=r"template part 1 '\[mask\]': the tokenizer has no mask token"):
        Template.parse("[prompt 1] [mask]").bind(word_tokenizer("gpt2"))
    with pytest.raises(ValueError, match=r"template part 1 '\[anchor \" \"\]': the tokenizer makes no tokens of this"):
        Template.parse('[prompt 1] [anchor " "]').bind(word_tokenizer("gpt2"))


@pytest.mark.parametrize("text", ['[prompt 1] [anchor "is"]', "[prompt 1] [mask]", "[prompt 1] [sep]"])
def test_ids_of_a_template_that_is_not_bound_are_refused_with_the_part(text: str) -> None:
    with pytest.raises(ValueError, match=r"template part 1 '.*': needs a tokenizer; use template.bind\(tokenizer\)"):
        Template.parse(text).check(1)


@pytest.mark.parametrize(
    ("text", "limits", "message"),
    [
        (
            "[prompt 3] [a] [prompt 2]",
            (4,),
            r"part 2 '\[prompt 2\]': makes 5 prompt rows, .* num_virtual_tokens = 4",
        ),
        ("[prompt 3] [a] [prompt 2]", (6,), r"part 2 '\[prompt 2\]': is the last of 5 prompt rows, .* = 6"),
        ("[prompt 3] [anchor 5 6]", (3, 4), r"part 1 '\[anchor 5 6\]': .* take 5 positions .* the base model has 4"),
        ("[prompt 3] [prompt 9] [a]", (12, 10), r"part 1 '\[prompt 9\]': .* take 12 positions .* has 10"),
        ("[prompt 3] [anchor 5 66]", (3, None, 60), r"part 1 '\[anchor 5 66\]': expected ids in \[0, 60\), got 66"),
        ("[prompt 3] [mask 70]", (3, None, 60), r"part 1 '\[mask 70\]': expected ids in \[0, 60\), got 70"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_part(text: str, limits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"template {message}"):
        Template.parse(text).check(*limits)


def test_the_plain_prefix_is_a_prompt_before_the_text_and_all_special_tokens() -> None:
    plain = Template.parse("[prompt 3] [text]")
    assert plain.is_plain_prefix and plain.bind(word_tokenizer("gpt2")).is_plain_prefix
    assert not plain.bind(word_tokenizer("bert")).is_plain_prefix  # [CLS] stays in front of the prompt
    assert not Template.parse("[prompt 1] [prompt 2] [text] [prompt 1]").is_plain_prefix
    assert not Template.parse("[text] [prompt 3]").is_plain_prefix


def test_json_holds_the_string_form() -> None:
    text = '[prompt 1] [a] [anchor "is"]'
    assert json.loads(Template.parse(text).bind(word_tokenizer("bert")).to_json())["template"] == text
