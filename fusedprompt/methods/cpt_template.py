"""Examples in words for CPT: a context's ids, masks and type codes, and those of batches, from a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import IGNORE_INDEX
from ..layouts.parts import Anchor, Field, Part, Separator, parsed
from ..layouts.tokenizer import encode, learn
from .cpt import CPTConfig

_Coded = tuple[list[int], list[int]]  # ids, and a type code for each
# Type codes of an example's tokens. The next example of a context has 4 more.
_SPECIAL, _INPUT_TEMPLATE, _INPUT, _OUTPUT_TEMPLATE, _LABEL = range(5)
_CODES = 4


@dataclass(frozen=True)
class CPTTemplate:
    """How an example for CPT is written: fields, and the words around them, which are the same in every example.

        CPTTemplate.parse('[anchor "review:"] [text] [anchor " sentiment:"] [label]')

    Words up to the last field that is not the label are the input's template, those behind it the output's; `[sep]`,
    which makes no token, puts the border where it stands.

    Args:
        parts: `Field`, `Anchor` and at most one `Separator`, in the order of an example.
        label: the field whose tokens are learned; None for the last one.
        between: the text behind each example of a context, "" for none. Nothing of it is learned or changed.

    Raises:
        TypeError, ValueError: a part of another kind, two of one name, or no such label.
    """

    parts: tuple[Part, ...]
    label: str | None = None
    between: str = "\n"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Field | Anchor | Separator):
                raise TypeError(f'template: expected fields, [anchor "..."] and [sep] for CPT, got {part}')
            if not isinstance(part, Anchor) and self.parts.count(part) > 1:
                raise ValueError(f"template: expected {part} once, got '{self}'")
        if not self.fields:
            raise ValueError(f"template: expected a field, such as [label], got '{self}'")
        label = self.fields[-1] if self.label is None else self.label
        if label not in self.fields:
            raise ValueError(f"label: expected one of the fields {self.fields}, got {label!r}")
        object.__setattr__(self, "label", label)

    def __str__(self) -> str:
        return " ".join(map(str, self.parts))

    @classmethod
    def parse(cls, text: str, label: str | None = None, between: str = "\n") -> CPTTemplate:
        """The template of a string: parts in brackets, with nothing but space between them.

        Raises:
            ValueError: some of it is not a part; the message says from where on.
        """
        return cls(tuple(parsed(text)), label, between)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(part.name for part in self.parts if isinstance(part, Field))

    def context(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, list[int]]:
        """`cpt_token_ids`, `cpt_mask` and `cpt_tokens_type_mask` of few-shot examples, the most important last.

        The context begins with what the tokenizer puts before a text, such as <s>, and `between` ends each example.

        Args:
            examples: a text, or ids without special tokens, for each field.
            tokenizer: a transformers tokenizer.

        Raises:
            ValueError: there is no example, or one lacks a field, has another, or makes no token of its label.
        """
        if not examples:
            raise ValueError("examples: expected at least one, got none")
        ids, codes = [*learn(tokenizer, pair=False).before], list[int]()
        codes += [_SPECIAL] * len(ids)
        behind = encode(tokenizer, [self.between])[0] if self.between else []
        for number, example in enumerate(examples):
            own, kinds = self._coded(f"examples[{number}]", example, tokenizer)
            ids += [*own, *behind]
            codes += [*(kind + _CODES * number for kind in kinds), *(_SPECIAL for _ in behind)]
        return {"cpt_token_ids": ids, "cpt_mask": [1] * len(ids), "cpt_tokens_type_mask": codes}

    def config(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, **fields: Any) -> CPTConfig:
        """A `CPTConfig` whose prompt starts from these examples. fields: its further ones."""
        name = getattr(tokenizer, "name_or_path", None) or None
        own = {"task_type": "CAUSAL_LM", "tokenizer_name_or_path": name, **self.context(examples, tokenizer)}
        return CPTConfig(**{**own, **fields})

    def render(
        self,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        answers: bool = True,
        padding_side: str | None = None,
    ) -> dict[str, Tensor]:
        """A batch of examples, as they follow the context.

        Args:
            examples: as in `context`.
            answers: False to end each row before its label, which then need not be there, for `generate`.
            padding_side: "left" or "right"; by default the tokenizer's, or "left" without answers.

        Returns:
            input_ids and attention_mask (B, T) int64 and, with answers, labels and input_type_mask, (B, T) int64: the
            codes tell the loss which labels count.

        Raises:
            ValueError: as in `context`.
        """
        side = padding_side or (getattr(tokenizer, "padding_side", "right") if answers else "left")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side: expected 'left' or 'right', got {side!r}")
        rows = [self._coded(f"examples[{row}]", one, tokenizer, answers) for row, one in enumerate(examples)]
        length, pad = max((len(ids) for ids, _ in rows), default=0), getattr(tokenizer, "pad_token_id", None) or 0

        def filled(values: list[list[int]], fill: int) -> Tensor:
            gaps = [[fill] * (length - len(row)) for row in values]
            joined = [gap + row if side == "left" else row + gap for gap, row in zip(gaps, values)]
            return torch.tensor(joined, dtype=torch.int64, device="cpu").view(len(rows), length)

        ids, codes = ([row[which] for row in rows] for which in range(2))
        batch = {"input_ids": filled(ids, pad), "attention_mask": filled([[1] * len(row) for row in ids], 0)}
        if answers:
            batch |= {"labels": filled(ids, IGNORE_INDEX), "input_type_mask": filled(codes, _SPECIAL)}
        return batch

    def _coded(self, where: str, example: Mapping[str, Any], tokenizer: Any, answers: bool = True) -> _Coded:
        """An example's ids and type codes, up to its label without answers."""
        needed = [name for name in self.fields if answers or name != self.label]
        if any(name not in example for name in needed) or any(name not in self.fields for name in example):
            raise ValueError(f"{where}: expected a value for each of {needed}, got {[*example]}")
        ids, codes = list[int](), list[int]()
        for part, code in self._kinds():
            if code == _LABEL and not answers:
                break
            value: Any = part.ids if isinstance(part, Anchor) and part.ids else None
            if value is None:
                value = part.text if isinstance(part, Anchor) else example[part.name]
            own = encode(tokenizer, [value])[0] if isinstance(value, str) else [int(token) for token in value]
            if code == _LABEL and not own:
                raise ValueError(f"{where}: expected a token of the label {self.label!r}, got {value!r}")
            ids, codes = ids + own, codes + [code] * len(own)
        return ids, codes

    def _kinds(self) -> Iterator[tuple[Field | Anchor, int]]:
        """Fields and anchors with their type codes."""
        inputs = [i for i, part in enumerate(self.parts) if isinstance(part, Field) and part.name != self.label]
        border = next((i for i, part in enumerate(self.parts) if isinstance(part, Separator)), max(inputs, default=-1))
        for index, part in enumerate(self.parts):
            if isinstance(part, Field):
                yield part, _LABEL if part.name == self.label else _INPUT
            elif isinstance(part, Anchor):
                yield part, _INPUT_TEMPLATE if index <= border else _OUTPUT_TEMPLATE
