"""What a template needs of a tokenizer: ids of texts, and the special tokens that it puts around and between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SAMPLES = ("a", "the", "1", "A", "x", ".")  # any text will do of which the tokenizer makes a token


@dataclass(frozen=True)
class Specials:
    """The special tokens of one sentence, or of a pair: `before` first `between` second `after`.

    types: token type of each special token and of the two sentences, in this order, or None if the tokenizer has none.
    """

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    types: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Specials:
        """From the lists of a JSON object."""
        before, between, after = (tuple(map(int, fields[name])) for name in ("before", "between", "after"))
        return cls(before, between, after, None if fields["types"] is None else tuple(map(int, fields["types"])))

    @property
    def types_of_parts(self) -> tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]]:
        """Types of before (each), first, between (each), second, after (each); 0 where there are none."""
        first, between = len(self.before), len(self.between)
        types = self.types or (0,) * (first + between + len(self.after) + 2)
        second = first + 1 + between
        return types[:first], types[first], types[first + 1 : second], types[second], types[second + 1 :]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without special tokens."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def learn(tokenizer: Any, pair: bool) -> Specials:
    """The special tokens that a transformers tokenizer puts around one text, or around and between two.

    They are read off what it makes of a sample, because that is all that every tokenizer has in common.

    Raises:
        ValueError: it makes no token of any sample.
    """
    sample = next((text for text in _SAMPLES if encode(tokenizer, [text])[0]), None)
    if sample is None:
        raise ValueError(f"tokenizer: expected one that makes tokens of any of {_SAMPLES}, got {type(tokenizer)}")
    plain = encode(tokenizer, [sample])[0]
    encoded = tokenizer(*((sample, sample) if pair else (sample,)), return_token_type_ids=True)
    ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids")
    begin = _find(ids, plain, 0)
    end = begin + len(plain)
    second = _find(ids, plain, end) if pair else begin  # nothing is between one text and itself
    last = second + len(plain)
    kept = None
    if types is not None and "token_type_ids" in getattr(tokenizer, "model_input_names", ()):
        kept = (*types[: begin + 1], *types[end:second], types[second], *types[last:])
    return Specials(tuple(ids[:begin]), tuple(ids[end:second]), tuple(ids[last:]), kept)


def _find(ids: list[int], wanted: list[int], start: int) -> int:
    """Where `wanted` begins in `ids`."""
    for place in range(start, len(ids) - len(wanted) + 1):
        if ids[place : place + len(wanted)] == wanted:
            return place
    raise ValueError(f"tokenizer: expected the ids {wanted} of a text among those with special tokens, got {ids}")
