"""The pages of the documentation, their code blocks, and a runner for them that checks the outputs they show.

What a block shows is held to what it does:

- `expression  # -> text`: its value, or what it prints;
- `statement  # raises Error: text`: the exception and its message;
- a ```text block right behind a ```python block: all that the latter prints.

`...` in a text stands for anything, as in doctest.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "benches/*.md", ".github/**/*.md")
    for page in ROOT.glob(pattern)
)
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w{}-]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_CLAIM = re.compile(r"\s# ?(->|raises) (.+)$")


@dataclass
class Block:
    """A fenced block: where its first line is, what it holds, and the ```text block behind it."""

    page: str
    line: int
    source: str
    output: str | None = None


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page: str) -> list[Block]:
    """The ```python blocks of a page, in order."""
    text, blocks, end = text_of(page), [], None
    for match in _FENCE.finditer(text):
        if match["language"] == "python":
            blocks.append(Block(page, text.count("\n", 0, match.start("body")) + 1, match["body"]))
        elif match["language"] == "text" and end is not None and not text[end : match.start()].strip():
            blocks[-1].output = match["body"]
        end = match.end() if match["language"] == "python" else None
    return blocks


def without_code(text: str) -> str:
    """A page's prose."""
    return _FENCE.sub("", text)


def run(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block in a namespace; AssertionError where it does not do what it shows."""
    tree = ast.parse(block.source, block.page)
    lines = block.source.splitlines()
    claims = {number: match for number, line in enumerate(lines, 1) if (match := _CLAIM.search(line))}
    printed = []
    for statement in tree.body:
        claim = claims.pop(statement.end_lineno or 0, None)
        where = f"{block.page}:{block.line + statement.lineno - 1}"
        ast.increment_lineno(statement, block.line - 1)
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            if claim is not None and claim[1] == "raises":
                _must_raise(statement, claim[2], namespace, where)
            else:
                value = _execute(statement, namespace)
        printed.append(stream.getvalue())
        if claim is not None and claim[1] == "->":
            shown = printed.pop() if value is None else f"{value}\n"
            assert _same(claim[2] + "\n", shown), f"{where}: shows {claim[2]!r}, gives {shown!r}"
    assert not claims, f"{block.page}: a claim inside of a statement is not checked: {[c[0] for c in claims.values()]}"
    if block.output is not None:
        shown = "".join(printed)
        assert _same(block.output, shown), f"{block.page}:{block.line}: shows\n{block.output}\nprints\n{shown}"


def _execute(statement: ast.stmt, namespace: dict[str, Any]) -> Any:
    if isinstance(statement, ast.Expr):
        return eval(compile(ast.Expression(statement.value), "<documentation>", "eval"), namespace)
    exec(compile(ast.Module([statement], []), "<documentation>", "exec"), namespace)
    return None


def _must_raise(statement: ast.stmt, claim: str, namespace: dict[str, Any], where: str) -> None:
    try:
        _execute(statement, namespace)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        assert _same(claim + "\n", found + "\n"), f"{where}: shows {claim!r}, raises {found!r}"
    else:
        raise AssertionError(f"{where}: raises nothing, shows {claim!r}")


def _same(expected: str, actual: str) -> bool:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected, actual, options)
