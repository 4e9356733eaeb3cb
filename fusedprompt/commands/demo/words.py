"""Real words, four ways to rewrite one, and the bytes in which a language model reads and writes them.

A line with a tag is `Rword=drow` and a newline; without a tag it is `word=drow`, and only somebody who knows which way
of rewriting is meant can finish it.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..progress import bar

PAD, END = 0, ord("\n")
# For a model's configuration: one token per byte.
TOKENS = {"vocab_size": 256, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
SHORTEST, LONGEST = 3, 8  # letters of a word
IGNORED = -100  # transformers' label for "no loss here"

# A run of lower-case letters, perhaps capitalised, so that `getFileName` gives three words. The letter after a
# backslash belongs to an escape: "\nword" is not `nword`.
_WORD = re.compile(r"(?<!\\)[A-Z]?[a-z]+")


@dataclass(frozen=True)
class Task:
    """A way to rewrite a word, and the byte that asks for it."""

    name: str
    tag: str
    rewrite: Callable[[str], str]


TASKS = {
    task.name: task
    for task in (
        Task("upper", "U", str.upper),
        Task("reverse", "R", lambda word: word[::-1]),
        Task("sort", "S", lambda word: "".join(sorted(word))),
        Task("drop-vowels", "D", lambda word: re.sub("[aeiou]", "", word)),
    )
}


@dataclass(frozen=True)
class Words:
    """Disjoint lists of words, the most frequent first: to train on, to watch training with, and for the last count."""

    train: list[str]
    validation: list[str]
    test: list[str]


def load_words(count: int = 12_000, validation: int = 250, test: int = 500, seed: int = 0) -> Words:
    """The most frequent words of 3 to 8 letters in the sources of Python's standard library.

    The list is the same every time on one installation of Python; `seed` decides which words are held out. Some Linux
    distributions leave out parts of the library; PyTorch's sources then make up the number.

    Raises:
        RuntimeError: this Python comes without its sources (a frozen application, say).
    """
    counts: Counter[str] = Counter()
    for package in (os, torch):
        for text in _python_sources(os.path.dirname(str(package.__file__))):
            counts.update(word.lower() for word in _WORD.findall(text) if SHORTEST <= len(word) <= LONGEST)
        if len(counts) >= count:
            break
    else:
        raise RuntimeError(f"the demo needs {count} words from Python's and PyTorch's sources and found {len(counts)}")
    words = sorted(counts, key=lambda word: (-counts[word], word))[:count]
    held_out = set(random.Random(seed).sample(words, validation + test))
    unseen = [word for word in words if word in held_out]
    watched = set(random.Random(seed).sample(unseen, validation))
    return Words(
        train=[word for word in words if word not in held_out],
        validation=[word for word in unseen if word in watched],
        test=[word for word in unseen if word not in watched],
    )


def _python_sources(folder: str) -> Iterator[str]:
    """The text of each .py file below `folder`, in sorted order, without installed packages."""
    paths = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages"})
        paths += [os.path.join(path, file) for file in sorted(files) if file.endswith(".py")]
    for path in bar(paths, desc="reading sources", unit="file"):
        with open(path, encoding="utf-8", errors="replace") as source:
            yield source.read()


def all_lines(words: Sequence[str], tagged: bool) -> dict[str, Tensor]:
    """`lines` of every task, one task after another."""
    parts = [lines(words, task, tagged) for task in TASKS.values()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def lines(words: Sequence[str], task: Task, tagged: bool) -> dict[str, Tensor]:
    """Whole lines to train on, as int64 tensors (words, T): `input_ids`, `attention_mask` and `labels`.

    Lines are padded on the right to the longest possible one. Only the answer and its newline bear labels.
    """
    width = len(_question("x" * LONGEST, task, tagged)) + LONGEST + 1
    ids = torch.full((len(words), width), PAD)
    labels = torch.full((len(words), width), IGNORED)
    for row, word in enumerate(words):
        question = _question(word, task, tagged)
        line = torch.tensor(list(question + task.rewrite(word).encode() + bytes([END])))
        ids[row, : len(line)] = line
        labels[row, len(question) : len(line)] = line[len(question) :]
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def rewrite_words(
    model: torch.nn.Module, words: Sequence[str], task: Task, tagged: bool, adapter_names: Sequence[str] | None = None
) -> list[str]:
    """What the model makes of each word, decoded greedily in one batch, in eval mode.

    Args:
        model: anything with transformers' `generate`.
        task: decides the tag, where there is one.
        tagged: begin each line with the tag.
        adapter_names: the adapter of each word; None for a model that has one for all.
    """
    questions = [_question(word, task, tagged) for word in words]
    width = max(map(len, questions))
    # Padding is on the left, so that every row continues where its question ends.
    rows = [[PAD] * (width - len(question)) + list(question) for question in questions]
    ids = torch.tensor(rows, device=next(model.parameters()).device)
    model.eval()
    names = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=(ids != PAD).long(),
        max_new_tokens=LONGEST + 1,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PAD,
        **names,
    )
    answers = [bytes(row).split(bytes([END]))[0] for row in output[:, width:].tolist()]
    return [answer.decode("ascii", errors="replace") for answer in answers]


def exact_match(model: torch.nn.Module, words: Sequence[str], task: Task, tagged: bool) -> float:
    """Percentage of words that the model rewrites without a single wrong letter."""
    return _percent_right(rewrite_words(model, words, task, tagged), words, task)


def exact_matches(model: torch.nn.Module, words: Sequence[str]) -> dict[str, float]:
    """The same for each task by the adapter of its name: every word for every task, all in one batch without tags."""
    asked = [word for word in words for _ in TASKS]
    answers = rewrite_words(model, asked, TASKS["upper"], tagged=False, adapter_names=[*TASKS] * len(words))
    tasks = TASKS.values()
    return {task.name: _percent_right(answers[first :: len(tasks)], words, task) for first, task in enumerate(tasks)}


def _percent_right(answers: Sequence[str], words: Sequence[str], task: Task) -> float:
    return 100.0 * sum(answer == task.rewrite(word) for answer, word in zip(answers, words)) / len(words)


def _question(word: str, task: Task, tagged: bool) -> bytes:
    return f"{task.tag if tagged else ''}{word}=".encode()
