"""One version of one prompt in a bank, and the names that prompts may have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..layouts.mixture import BASE

DTYPES = ("float32", "float16", "bfloat16", "float64")
_LONGEST = 200


@dataclass(frozen=True)
class Entry:
    """A version of a prompt. No other one, of any prompt, ever has its serial number or one of its ids.

    name: of the prompt. serial: counts all versions of a bank. first: the id of its first row.
    rows: P. dtype: of its rows, as torch names it. size: bytes of its file. digest: `checkpoint.fingerprint` of its
    rows.
    """

    __slots__ = ("digest", "dtype", "first", "name", "rows", "serial", "size")

    name: str
    serial: int
    first: int
    rows: int
    dtype: str
    size: int
    digest: str

    @property
    def key(self) -> str:
        """Its name in a batch, which no later version has."""
        return f"{self.name}@{self.serial}"

    def __str__(self) -> str:
        return f"the prompt {self.name!r} (version {self.serial})"

    def to_record(self) -> dict[str, Any]:
        """Its line in the index."""
        return {"add": asdict(self)}

    @classmethod
    def of_record(cls, fields: Any) -> Entry:
        """From a line of the index.

        Raises:
            ValueError: a field is missing or none of its values.
        """
        if not isinstance(fields, dict) or set(fields) != set(cls.__slots__):
            raise ValueError(f"expected the fields {sorted(cls.__slots__)}, got {fields!r}")
        check_name(fields["name"])
        for field, least in (("serial", 1), ("first", 1), ("rows", 1), ("size", 1)):
            value = fields[field]
            if type(value) is not int or value < least:
                raise ValueError(f"{field}: expected an int >= {least}, got {value!r}")
        if fields["dtype"] not in DTYPES or not isinstance(fields["digest"], str):
            raise ValueError(f"dtype, digest: expected one of {DTYPES} and a string, got {fields!r}")
        return cls(**fields)


def dtype_name(rows: Tensor) -> str:
    """A tensor's dtype, as `Entry.dtype` has it."""
    return str(rows.dtype).removeprefix("torch.")


def check_name(name: Any) -> str:
    """Refuse names that could not be told from others, or written into a token.

    Raises:
        TypeError, ValueError: it is not 1 to 200 printable characters without < and >, or means rows without a prompt.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r}")
    if not 0 < len(name) <= _LONGEST or not name.isprintable() or set("<>") & set(name) or name == BASE:
        raise ValueError(
            f"name: expected 1 to {_LONGEST} printable characters without < and >, and not {BASE!r}, got {name!r}"
        )
    return name
