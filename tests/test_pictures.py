"""The pictures of the README and the docs come from the committed results, by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches import pictures, tables
from benches.gpu import page


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
    if name == "docs/gpu.md":
        pytest.importorskip("fusedprompt._C", reason="the planner of the LSTM is in the compiled extension")
    text = (tables.ROOT / name).read_text()
    assert "<!-- table" in text
    assert tables.filled(text) == text, "run: make pictures"


def test_a_table_names_rows_that_are_there_once() -> None:
    with pytest.raises(LookupError, match=r"step 'prompt tuning'.*expected one row of part '', got 2"):
        tables.find("", "step", "prompt tuning")


def test_the_page_of_a_gpu_fills_itself_from_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fusedprompt._C", reason="the planner of the LSTM is in the compiled extension")
    measured = {"median_ms": 0.4, "ratio": 1.0}
    row = {"group": "splice", "case": "B=32 T=2048 D=4096", "dtype": "bf16", "mode": "forward", "state": "cold"}
    others = {"PEFT": {"median_ms": 0.8, "ratio": 2.0}}
    step = {"group": "metamath", "case": "prompt tuning N=200 B=4", "dtype": "bf16", "mode": "training step"}
    times = {"fusedprompt": {"median_ms": 90.0}, "PEFT": {"median_ms": 180.0}, "PEFT LoRA 32": {"median_ms": 100.0}}
    rows = [{**row, "contenders": {"fusedprompt": measured, **others}}, {**step, "contenders": times}]
    limits = {"copy_gb_per_s": 2000.0, "matrix_gflop_per_s": {"fp32": 1e4, "tf32": 1e5, "bf16": 5e5}}
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "limits": limits}
    result = {"machine_info": machine, "benchmarks": [{"extra_info": each} for each in rows]}
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(result))
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    header, *lines = page.kernels("h100")
    assert header[0].startswith("NVIDIA H100 80GB HBM3")
    line = next(line for line in lines if "B=32, T=2048" in line[0])
    floor = float(line[1].split(" / ")[0])  # of the limits that were measured: 1.08 GB at 2 TB/s
    assert floor == pytest.approx(1080 / 2, rel=0.01)
    assert line[3:] == ["400 / ", f"{floor / 4:.0f} % / ", "PEFT 2.00 / "]
    assert [line[3] for line in lines].count("") == len(lines) - 1
    assert page.steps("h100")[1] == ["prompt tuning N=200", "90.0", "180.0", "100.0", "0.90"]
    assert page.steps("h200")[1][1:] == [""] * 4
