"""What the documentation points at is there: links, anchors, commands, files and names."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
import yaml

import fusedprompt
from fusedprompt.integrations import peft as integration
from pages import PAGES, ROOT, text_of, without_code

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SECTION = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_MAKE = re.compile(r"\bmake ((?:[a-z][a-z-]*)(?: [a-z]+-[a-z]+)*)")
_MODULE = re.compile(r"python -m (fusedprompt|benches)((?:[. ])[\w.]+)?((?: --[a-z-]+)*)")


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives a page's sections."""
    titles = [re.sub(r"[`*]", "", title).lower() for title in _SECTION.findall(without_code(text_of(page)))]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in _LINK.findall(without_code(text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page}: {target}"
        if anchor:
            name = str(place.resolve().relative_to(ROOT))
            assert anchor in anchors(name), f"{page}: {target} is none of {sorted(anchors(name))}"


def test_every_page_is_reached_from_the_first_one() -> None:
    listed = {
        str((ROOT / "docs" / link).resolve().relative_to(ROOT)) for link in _LINK.findall(text_of("docs/index.md"))
    }
    pages = {page for page in PAGES if not page.startswith(".github")}
    assert listed == pages - {"docs/index.md"}


@pytest.mark.parametrize("page", [*PAGES, "Makefile"])
def test_commands_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.MULTILINE))
    text = text_of(page)
    in_code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ {4,}(.+)$", text, re.MULTILINE)])
    for names in _MAKE.findall(in_code):
        for name in names.split():
            assert name in targets, f"{page}: make {name}"
    for package, rest, options in _MODULE.findall(in_code):
        name = rest.strip(". ")
        if package == "benches":
            assert (ROOT / "benches" / (name.replace(".", "/") + ".py")).exists(), f"{page}: python -m benches{rest}"
        elif name:
            for option in ("--help", *options.split()):
                assert option in help_of(name), f"{page}: python -m fusedprompt {name} {option}"
    for path in re.findall(r"python ((?:examples|benches|tests)/\S+\.py)", in_code):
        assert (ROOT / path).exists(), f"{page}: {path}"


@functools.cache
def help_of(command: str) -> str:
    arguments = [sys.executable, "-m", "fusedprompt", command, "--help"]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_file_of_the_package_is_in_the_table_of_files() -> None:
    section = text_of("docs/architecture.md").partition("## Files")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    package = ROOT / "fusedprompt"
    files = {entry.name + "/" * entry.is_dir() for entry in package.iterdir() if entry.suffix in ("", ".py")}
    shared = {name for name in files if name.startswith("__")}
    assert {name.split("/")[0] + "/" * ("/" in name) for name in named} == files - shared - {"_version.py"}
    for name in named:
        if "<op>" not in name:
            assert (package / name).exists(), name


def test_every_public_name_is_in_the_api_reference() -> None:
    page = text_of("docs/api.md")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE))
    public = {*fusedprompt.__all__, *fusedprompt.ops.__all__} - {"ops", "__version__"}
    public |= {"Patch", "patch_of", "enable", "disable"}
    assert documented == public and "__version__" in page
    for name in documented:
        owner = next(place for place in (fusedprompt, fusedprompt.ops, integration) if hasattr(place, name))
        assert (getattr(owner, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_the_version_is_the_changelogs_and_the_citations() -> None:
    version = re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)
    assert version is not None and version[1] == fusedprompt.__version__
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == fusedprompt.__version__
