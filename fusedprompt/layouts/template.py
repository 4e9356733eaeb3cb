"""Templates: where prompt rows, texts, anchor tokens and the mask token stand in a sequence.

A template is a list of parts and has a string form: `[prompt 3] [text] [prompt 4] [anchor " capital"] [prompt 2]`.
`bind` takes from a tokenizer what a template needs of it: the ids of its anchors and of the mask token, and the special
tokens around the text. A bound template renders ids without the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .parts import Anchor, Mask, Part, Pattern, Prompt, Separator, from_fields, parsed
from .rendering import render
from .tokenizer import Specials, encode, learn


@dataclass(frozen=True, repr=False)
class Template(Pattern):
    """A sequence of prompt rows, fields, anchors and the mask token.

    Args:
        parts: in the order of the sequence.
        specials: the tokenizer's special tokens around and between them, from `bind`.

    Raises:
        TypeError, ValueError: a part is not what it must be; the message names its number and its string form.
    """

    def __repr__(self) -> str:
        return f"Template.parse({str(self)!r}){'' if self.specials is None else '.bind(tokenizer)'}"

    @classmethod
    def parse(cls, text: str) -> Template:
        """The template of a string: parts in brackets, with nothing but space between them.

        Raises:
            ValueError: some of it is not a part; the message says from where on.
        """
        return cls(tuple(parsed(text)))

    def to_json(self) -> str:
        """The template as a JSON object, with all that a tokenizer has told it."""
        parts = []
        for part in self.parts:
            fields = {name: value for name, value in dataclasses.asdict(part).items() if value is not None}
            parts.append({"kind": type(part).__name__.lower(), **fields})
        specials = None if self.specials is None else dataclasses.asdict(self.specials)
        return json.dumps({"template": str(self), "parts": parts, "specials": specials}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Template:
        """The template of `to_json`.

        Raises:
            ValueError: the text is no JSON object of a template.
        """
        try:
            fields = json.loads(text)
            parts = tuple(from_fields(part) for part in fields["parts"])
            specials = None if fields.get("specials") is None else Specials.from_dict(fields["specials"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"template: expected the JSON object of a template: {error!r}") from None
        return cls(parts, specials)

    def bind(self, tokenizer: Any) -> Template:
        """With the ids of anchors and of the mask token, and the special tokens, of a transformers tokenizer.

        Raises:
            ValueError: the tokenizer has no mask token, makes no tokens of an anchor, or is not the one that the
                template is bound to.
        """
        parts: list[Part] = []
        for index, part in enumerate(self.parts):
            if isinstance(part, Anchor) and part.text is not None:
                ids = tuple(encode(tokenizer, [part.text])[0])
                if not ids:
                    raise ValueError(f"{self.where(index)}: the tokenizer makes no tokens of this text")
                part = Anchor(part.text, ids)
            elif isinstance(part, Mask) and part.named:
                if getattr(tokenizer, "mask_token_id", None) is None:
                    raise ValueError(f"{self.where(index)}: the tokenizer has no mask token; [mask ID] gives its id")
                part = Mask(int(tokenizer.mask_token_id))
            parts.append(part)
        pair = any(isinstance(part, Separator) for part in self.parts)
        bound = Template(tuple(parts), learn(tokenizer, pair))
        if self.specials is not None and bound != self:
            raise ValueError(f"tokenizer: expected the one that the template {str(self)!r} was bound to, got another")
        return bound

    def check(self, num_virtual_tokens: int, position_limit: int | None = None, vocabulary: int | None = None) -> None:
        """Refuse a template that does not fit an adapter and its base model.

        Raises:
            ValueError: wrong number of prompt rows, more positions than the model has, an id outside the vocabulary, or
                an anchor without ids; the message names the part.
        """
        constants, expected = dict(self.constant_ids()), f"expected num_virtual_tokens = {num_virtual_tokens} in all"
        rows = taken = 0
        for index, part in enumerate(self.parts):
            ids = constants.get(index, ())
            taken += len(ids)
            if isinstance(part, Prompt):
                rows, taken, last = rows + part.rows, taken + part.rows, index
            if rows > num_virtual_tokens:
                raise ValueError(f"{self.where(index)}: makes {rows} prompt rows, {expected}")
            unknown = [id for id in ids if vocabulary is not None and not 0 <= id < vocabulary]
            if unknown:
                raise ValueError(f"{self.where(index)}: expected ids in [0, {vocabulary}), got {unknown[0]}")
            if position_limit is not None and taken > position_limit:
                raise ValueError(
                    f"{self.where(index)}: prompt and anchors take {taken} positions up to here, and the base model "
                    f"has {position_limit}"
                )
        if rows != num_virtual_tokens:
            raise ValueError(f"{self.where(last)}: is the last of {rows} prompt rows, {expected}")

    def render(self, fields: Mapping[str, Sequence[Any]] | Sequence[Any], tokenizer: Any = None, **options: Any) -> Any:
        """A batch of B examples as a model takes it: a `RenderedBatch`.

        Args:
            fields: per field, B texts or lists of ids without special tokens; of a template with one field, just these.
            tokenizer: a transformers tokenizer, for texts, and for a template that is not bound to one.
            options: those of `fusedprompt.layouts.rendering.render`.

        Raises:
            ValueError: what is given does not fit the template; the message names the part.
        """
        return render(self if tokenizer is None else self.bind(tokenizer), fields, tokenizer, **options)
