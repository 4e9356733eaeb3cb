"""examples/tour.ipynb runs from its first cell to its last, and what is committed with it is small and whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook is read by nbformat, which comes with nbclient")
nbclient = pytest.importorskip("nbclient", reason="the notebook is executed by nbclient")
pytest.importorskip("ipykernel", reason="the notebook's cells run in ipykernel")
pytest.importorskip("matplotlib", reason="the notebook draws pictures")
pytest.importorskip("peft", reason="the notebook compares with PEFT")

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "examples" / "tour.ipynb"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def check(notebook: Any) -> None:
    """What a reader is told is there: shared and spliced alike, PEFT alike, the prefix as the text in context."""
    text = printed(notebook)
    assert pictures(notebook) == 3
    assert "P_TUNING, 10 virtual tokens, route shared where it pays" in text and "\nroute shared\n" in text
    differences = [float(line.rpartition(" ")[2]) for line in text.splitlines() if "logits differ by at most" in line]
    assert len(differences) == 3 and max(differences) < 1e-4


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()  # raises what a cell raises
    check(notebook)


def test_what_is_committed_of_the_tour_is_small_and_whole() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    check(notebook)
    assert TOUR.stat().st_size < 300_000
    assert all(cell.outputs or "import" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs(notebook))
    assert "/home/" not in TOUR.read_text() and "/tmp/" not in TOUR.read_text()
