"""The parts of a template, their string form, and a sequence of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .tokenizer import Specials

_NAME = re.compile(r"[A-Za-z_]\w*\Z")
_PART = re.compile(r'\s*\[\s*([A-Za-z_]\w*)((?:\s+(?:\d+|"(?:[^"\\]|\\.)*"))*)\s*\]')


@dataclass(frozen=True)
class Prompt:
    """The next `rows` rows of the prompt; `[prompt 3]`."""

    rows: int

    def __str__(self) -> str:
        return f"[prompt {self.rows}]"


@dataclass(frozen=True)
class Field:
    """A text, or its ids, that each example brings along under this name; `[subject]`."""

    name: str

    def __str__(self) -> str:
        return f"[{self.name}]"


@dataclass(frozen=True)
class Anchor:
    """Tokens that are the same in every example; `[anchor " capital"]` or, by ids, `[anchor 17 4]`.

    text: as the tokenizer is to read it, with its leading space if it needs one.
    ids: of the tokens; from the tokenizer if there is a text.
    """

    text: str | None = None
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(int(token) for token in self.ids))

    def __str__(self) -> str:
        if self.text is not None:
            return f"[anchor {json.dumps(self.text, ensure_ascii=False)}]"
        return f"[anchor {' '.join(map(str, self.ids or ()))}]"


@dataclass(frozen=True)
class Mask:
    """The mask token, at which a masked model fills in its answer; `[mask]`, or by id `[mask 103]`."""

    id: int | None = None
    named: bool = True  # by the tokenizer: the id is not part of the string form

    def __str__(self) -> str:
        return "[mask]" if self.named or self.id is None else f"[mask {self.id}]"


@dataclass(frozen=True)
class Separator:
    """Where the first of two sentences ends and the second begins, in the way of the tokenizer; `[sep]`."""

    def __str__(self) -> str:
        return "[sep]"


Part = Prompt | Field | Anchor | Mask | Separator
_RESERVED = ("prompt", "anchor", "mask", "sep")


@dataclass(frozen=True)
class Pattern:
    """A sequence of parts, as `Template` checks and describes it.

    parts: in the order of the sequence. specials: the tokenizer's special tokens around and between them, if known.
    """

    parts: tuple[Part, ...]
    specials: Specials | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        for index, part in enumerate(self.parts):
            problem = _problem(part)
            if problem is None and isinstance(part, Field | Separator) and part in self.parts[:index]:
                problem = f"'{str(part)[1:-1]}' is there already, as part {self.parts.index(part)}"
            if problem is not None:
                raise ValueError(f"{self.where(index)}: {problem}")
        if not any(isinstance(part, Prompt) for part in self.parts):
            raise ValueError(f"template: expected a part [prompt N], got {str(self)!r}")

    def __str__(self) -> str:
        return " ".join(map(str, self.parts))

    def where(self, index: int) -> str:
        """A part as error messages name it."""
        return f"template part {index} '{self.parts[index]}'"

    @property
    def num_prompt_rows(self) -> int:
        """P: prompt rows of all parts."""
        return sum(part.rows for part in self.parts if isinstance(part, Prompt))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(part.name for part in self.parts if isinstance(part, Field))

    @property
    def num_masks(self) -> int:
        """How many mask tokens there are."""
        return sum(isinstance(part, Mask) for part in self.parts)

    @property
    def is_plain_prefix(self) -> bool:
        """Whether this is PEFT's place for the prompt: before all text, and before its special tokens."""
        kinds = [type(part) for part in self.parts]
        return kinds == [Prompt, Field] and not (self.specials and self.specials.before)

    def constant_ids(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of each part that is the same tokens in every example: its number, and their ids.

        Raises:
            ValueError: the ids are not known before `bind`.
        """
        for index, part in enumerate(self.parts):
            if isinstance(part, Anchor):
                ids = part.ids
            elif isinstance(part, Mask):
                ids = None if part.id is None else (part.id,)
            elif isinstance(part, Separator):
                ids = None if self.specials is None else self.specials.between
            else:
                continue
            if ids is None:
                raise ValueError(f"{self.where(index)}: needs a tokenizer; use template.bind(tokenizer)")
            yield index, ids


def parsed(text: str) -> Iterator[Part]:
    """The parts of a string: in brackets, with nothing but space between them.

    Raises:
        ValueError: some of it is not a part; the message says from where on.
    """
    position = index = 0
    while text[position:].strip():
        found = _PART.match(text, position)
        if found is None:
            raise ValueError(
                f'template: expected a part such as [prompt 3], [text], [anchor " is"], [mask] or [sep], got '
                f"{text[position:].strip()!r} as part {index}"
            )
        yield _parse_part(index, found.group(0).strip(), found.group(1), found.group(2))
        position, index = found.end(), index + 1


def _problem(part: Any) -> str | None:
    """Why a part is not what it must be, or None."""
    if isinstance(part, Prompt):
        if isinstance(part.rows, bool) or not isinstance(part.rows, int) or part.rows < 1:
            return f"expected a number of rows >= 1, got {part.rows!r}"
    elif isinstance(part, Field):
        if not isinstance(part.name, str) or not _NAME.match(part.name) or part.name in _RESERVED:
            return f"expected a name that is an identifier, and none of {_RESERVED}, got {part.name!r}"
    elif isinstance(part, Anchor):
        if part.text is None and not part.ids:
            return "expected a text or ids"
        if part.text == "":
            return "expected a text that is not empty"
    elif not isinstance(part, Mask | Separator):
        raise TypeError(f"template: expected Prompt, Field, Anchor, Mask or Separator, got {type(part).__name__}")
    return None


def _parse_part(index: int, text: str, name: str, rest: str) -> Part:
    where = f"template part {index} '{text}'"
    arguments = re.findall(r'\d+|"(?:[^"\\]|\\.)*"', rest)
    numbers = [int(argument) for argument in arguments if not argument.startswith('"')]
    if name == "anchor":
        if len(arguments) == 1 and not numbers:
            return Anchor(text=json.loads(arguments[0]))
        if numbers and len(numbers) == len(arguments):
            return Anchor(ids=tuple(numbers))
        raise ValueError(f'{where}: expected one text in quotes, or ids, such as [anchor " is"] or [anchor 17 4]')
    if len(numbers) != len(arguments):
        raise ValueError(f"{where}: a text in quotes belongs to an anchor")
    if name == "prompt" and len(numbers) == 1:
        return Prompt(numbers[0])
    if name == "mask" and len(numbers) <= 1:
        return Mask(numbers[0], named=False) if numbers else Mask()
    if name == "prompt" or numbers:
        raise ValueError(f"{where}: expected [prompt N], with one number, or a name alone")
    return Separator() if name == "sep" else Field(name)


def from_fields(fields: dict[str, Any]) -> Part:
    """A part of a JSON object: its `kind`, and what it holds."""
    kinds: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Prompt, Field, Anchor, Mask, Separator)}
    part: Part = kinds[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})
    return part
