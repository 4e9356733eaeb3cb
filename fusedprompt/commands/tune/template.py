"""How a row is written for the model: a text with the row's columns in braces, of which the last is the answer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ...layouts.layout import IGNORE_INDEX
from ...layouts.parts import Anchor, Field
from ...layouts.tokenizer import encode, learn
from ...methods.cpt_template import CPTTemplate
from ...ops.cpt.reference import is_label


@dataclass(frozen=True)
class TextTemplate:
    r"""A text such as "Description: {text}\nSection: {label}".

    The last field is the answer. It is learned with all that is behind it and the token that ends a text; what is
    before it is the question. Spaces between the two belong to the answer, because tokenizers join them with a word.

    Args:
        text: as in Python's `str.format`, with names of columns alone in braces, and {{ for a brace. The two
            characters \n stand for a line's end, and \t for a tab, for the sake of command lines.

    Raises:
        ValueError: it is no such text, or has no field.
    """

    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.text.replace("\\n", "\n").replace("\\t", "\t"))
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"--template: expected columns in braces, got {self.text!r}: {error}") from None
        if any(name is not None and (not name or form or conversion) for _, name, form, conversion in parts):
            raise ValueError(f"--template: expected names of columns in braces, got {self.text!r}")
        if not self.pieces:
            raise ValueError(f"--template: expected a column in braces, such as {{label}}, got {self.text!r}")
        if self.answer in self.asked:
            raise ValueError(f"--template: expected the last column, the answer, nowhere else, got {self.text!r}")

    @cached_property
    def _parsed(self) -> tuple[tuple[tuple[str, str], ...], str]:
        pieces, words = list[tuple[str, str]](), ""
        for more, name, _, _ in string.Formatter().parse(self.text):  # a brace that is meant ends a part as well
            words += more
            if name is not None:
                pieces, words = [*pieces, (words, name)], ""
        return tuple(pieces), words

    @property
    def pieces(self) -> tuple[tuple[str, str], ...]:
        """Words, and the name of the column behind them, in turn."""
        return self._parsed[0]

    @property
    def behind(self) -> str:
        """What is behind the answer."""
        return self._parsed[1]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, the answer last."""
        return tuple(dict.fromkeys(name for _, name in self.pieces))

    @property
    def answer(self) -> str:
        """The column that is learned."""
        return self.pieces[-1][1]

    @property
    def asked(self) -> tuple[str, ...]:
        """Columns of the question."""
        return tuple(dict.fromkeys(name for _, name in self.pieces[:-1]))

    def question(self, fields: Mapping[str, str]) -> str:
        """What the model is given."""
        return self._before(fields).rstrip(" ")

    def reply(self, fields: Mapping[str, str]) -> str:
        """What the model is to write."""
        before = self._before(fields)
        return before[len(before.rstrip(" ")) :] + fields[self.answer] + self.behind

    def _before(self, fields: Mapping[str, str]) -> str:
        parts = [words + fields[name] for words, name in self.pieces[:-1]]
        return "".join([*parts, self.pieces[-1][0]])


class Writer(Protocol):
    """Makes ids of rows."""

    def row(self, fields: Mapping[str, str]) -> dict[str, list[int]]:
        """`input_ids`, `labels` and what else the method asks for, each of T numbers."""

    def question(self, fields: Mapping[str, str]) -> list[int]:
        """What the answer follows."""


class PlainWriter:
    """Rows of every method but CPT: what begins a text, the question, the answer, and what ends a text."""

    def __init__(self, template: TextTemplate, tokenizer: Any) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.begin = list(learn(tokenizer, pair=False).before)
        self.end = _end(tokenizer)

    def question(self, fields: Mapping[str, str]) -> list[int]:
        text = self.template.question(fields)
        return self.begin + (encode(self.tokenizer, [text])[0] if text else [])

    def row(self, fields: Mapping[str, str]) -> dict[str, list[int]]:
        question = self.question(fields)
        answer = encode(self.tokenizer, [self.template.reply(fields)])[0] + self.end
        return {"input_ids": question + answer, "labels": [IGNORE_INDEX] * len(question) + answer}


class CPTWriter:
    """Rows that follow a context of examples, with a type code for each token."""

    def __init__(self, template: TextTemplate, tokenizer: Any) -> None:
        self.template, self.tokenizer, parts = template, tokenizer, list[Anchor | Field]()
        for words, name in template.pieces:
            # Spaces go with the column behind them.
            parts += [*([Anchor(words.rstrip(" "))] if words.rstrip(" ") else []), Field(name)]
        self.cpt = CPTTemplate(tuple(parts))
        self.end = _end(tokenizer)

    def example(self, fields: Mapping[str, str], answers: bool = True) -> dict[str, Any]:
        """Values for `CPTTemplate`, with the spaces before each, and the answer's end as ids."""
        values: dict[str, Any] = {
            name: " " * (len(words) - len(words.rstrip(" "))) + fields[name]
            for words, name in self.template.pieces
            if answers or name != self.template.answer
        }
        if answers:
            text = values[self.template.answer] + self.template.behind
            values[self.template.answer] = encode(self.tokenizer, [text])[0] + self.end
        return values

    def question(self, fields: Mapping[str, str]) -> list[int]:
        batch = self.cpt.render([self.example(fields, False)], self.tokenizer, answers=False)
        ids: list[int] = batch["input_ids"][0].tolist()
        return ids

    def row(self, fields: Mapping[str, str]) -> dict[str, list[int]]:
        batch = self.cpt.render([self.example(fields)], self.tokenizer)
        # The loss of CPT goes by the codes; that of the base model, which it is compared with, by labels alone.
        labels = batch["labels"].masked_fill(~is_label(batch["input_type_mask"]), IGNORE_INDEX)
        columns = {"input_ids": batch["input_ids"], "labels": labels, "input_type_mask": batch["input_type_mask"]}
        return {name: values[0].tolist() for name, values in columns.items()}


def writer_of(method: str, template: TextTemplate, tokenizer: Any) -> Writer:
    """The writer of a method's rows."""
    return CPTWriter(template, tokenizer) if method == "cpt" else PlainWriter(template, tokenizer)


def _end(tokenizer: Any) -> list[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return [] if end is None else [end]
