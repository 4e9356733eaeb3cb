"""Progress bars on a terminal alone: in a file each of their thousand states would be a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


def bar(iterable: Any = None, **options: Any) -> Any:
    """tqdm's bar, which goes away when it is done; without a terminal, nothing is shown."""
    from tqdm import tqdm

    return tqdm(iterable, leave=False, disable=None, **options)  # None: tqdm looks whether stderr is a terminal


def is_shown() -> bool:
    """Whether bars can be seen; if not, a line now and then takes their place."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own, such as one for each file of weights, and no advice to programmers."""
    from transformers.utils import logging

    was_enabled, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_enabled:
            logging.enable_progress_bar()
