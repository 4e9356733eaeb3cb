"""One row of a layout as a picture: `P P P t t t A P P · ·`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

PADDING = "·"
_WIDEST = 24  # symbols that are written one by one; 48 columns


def row_symbols(
    slots: Sequence[int],
    mask: Sequence[float] | None = None,
    anchors: Collection[int] = (),
    letter: Callable[[int], str] = lambda row: "P",
) -> list[str]:
    """A symbol for each output position of a row: P prompt row, t token, A anchor, · padding.

    Args:
        slots: the row's slots.
        mask: the row's attention mask; 0 is padding.
        anchors: slots, of tokens or of rows of the table, that are anchors.
        letter: the symbol of a prompt row, for tables that hold the prompts of several adapters.
    """
    symbols = ["A" if slot in anchors else letter(~slot) if slot < 0 else "t" for slot in slots]
    if mask is None:
        return symbols
    return [symbol if real else PADDING for symbol, real in zip(symbols, mask)]


def join_symbols(symbols: Sequence[str]) -> str:
    """`P P t t t`; a long row by its runs: `20P 512t 3·`."""
    if len(symbols) <= _WIDEST:
        return " ".join(symbols)
    return " ".join(f"{len(list(run))}{symbol}" for symbol, run in itertools.groupby(symbols))
