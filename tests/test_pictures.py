"""The pictures of the README and the docs come from the committed results, by one command."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches import pictures, tables


def test_every_committed_picture_is_drawn_again_from_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = {path.name for path in pictures.FOLDER.glob("*.svg")} - {"data.svg"}  # a drawing, of no figures
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.main([])
    drawn = {path.name: path for path in tmp_path.glob("*.svg")}
    assert drawn.keys() == committed
    for path in drawn.values():
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        # On a dark page a white background would glare.
        assert "fill: #ffffff" not in path.read_text()


def test_a_caption_names_baseline_and_machine() -> None:
    result = pictures.load("amd-epyc-2-threads")
    text = pictures.caption(result, "Baseline: PEFT.")
    machine = result["machine_info"]
    for part in ("Baseline: PEFT.", machine["cpu"], f"PEFT {machine['versions']['peft']}", result["datetime"][:10]):
        assert part in text


@pytest.mark.parametrize("name", tables.FILES)
def test_every_table_of_figures_is_that_of_the_committed_results(name: str) -> None:
    text = (tables.ROOT / name).read_text()
    assert "<!-- table" in text
    assert tables.filled(text) == text, "run: make pictures"


def test_a_table_names_rows_that_are_there_once() -> None:
    with pytest.raises(LookupError, match=r"step 'prompt tuning'.*expected one row of part '', got 2"):
        tables.find("", "step", "prompt tuning")
