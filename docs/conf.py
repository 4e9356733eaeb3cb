"""The documentation site: `make docs`. Its pages are the repository's own Markdown files, as GitHub shows them too.

The repository's root is the source folder, so that a link from one page to another, or to a file of the code, is the
same link in both places. Sphinx checks every one of them, anchors included, and a warning is an error.

Sphinx, because its releases keep coming, and because it reads docstrings, checks anchors and fails on warnings without
plugins. MkDocs had its last release in 2024, and Zensical, which follows it, is at 0.1.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

from fusedprompt import __version__

project, author, copyright, release = "fusedprompt", "the fusedprompt contributors", "", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benches/README.md"]
templates_path: list[str] = []

html_theme = "furo"
html_title = f"fusedprompt {release}"
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3
default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The links of the first page, in their order, are the site's table of contents; GitHub shows them as they are.
_PAGE = re.compile(r"^- \[.*?\]\((?!https?:)([^)#]+)\.md\)", re.MULTILINE)


def _add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        pages = "\n".join(_PAGE.findall(source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def _mark_formulas(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """In our docstrings, as in Markdown, indented lines after a paragraph are literal; Sphinx wants them marked."""
    marked: list[str] = []
    paragraph = ""  # the last line with text
    for line in lines:
        if line.startswith("    ") and marked and not marked[-1] and paragraph[:1].strip() and paragraph[-1] != ":":
            marked += ["::", ""]
        marked.append(line)
        paragraph = line if line.strip() else paragraph
    lines[:] = marked


def _redirect(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        page = f"{root_doc}.html"
        text = f'<!doctype html><meta http-equiv="refresh" content="0; url={page}"><a href="{page}">{project}</a>\n'
        Path(app.outdir, "index.html").write_text(text)


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_contents)
    app.connect("autodoc-process-docstring", _mark_formulas, priority=400)  # before napoleon
    app.connect("build-finished", _redirect)
