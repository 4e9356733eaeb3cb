"""The example on a tiny model and made-up packages: what it reads of apt, what it writes, and what it tells."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from byte_models import save_byte_model
from tolerance import one_thread  # noqa: F401

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

PATH = Path(__file__).resolve().parent.parent / "examples" / "package_sections.py"


@pytest.fixture(scope="module")
def example() -> Any:
    specification = importlib.util.spec_from_file_location("package_sections", PATH)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def paragraph(section: str, description: str) -> str:
    return f"Package: some\nSection: {section}\nDescription-en: {description}\nDescription-md5: 0\n"


def test_descriptions_are_read_whole_cut_and_once(example: Any) -> None:
    sections = [name for name in example.SECTIONS if name != "games"]
    apt = [paragraph("universe/games", "play\n a long\n .\n game"), paragraph("games", "play\n a long\n .\n game")]
    apt += [paragraph("libs", "no"), "Package: bare", *(paragraph(name, f"one of {name} it is") for name in sections)]
    rows = example.packages("\n".join(apt), 1, letters=14)
    texts = {row["section"]: row["text"] for row in rows}
    assert len(rows) == 8 and texts["games"] == "play a long ga" and texts["net"] == "one of net it"
    with pytest.raises(SystemExit, match="apt knows 1 packages of section games, "):
        example.packages("\n".join(apt), 2, letters=14)


def test_the_whole_example_on_a_tiny_model(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apt = [paragraph(name, f"{name} {number}") for name in example.SECTIONS for number in range(20)]
    (tmp_path / "apt").write_text("\n".join(apt))
    model, out = save_byte_model(tmp_path / "model"), tmp_path / "out"
    arguments = ["--model", model, "--output", out, "--packages", tmp_path / "apt", "--each", 20, "--steps", 2]
    found = example.main([*map(str, arguments), "--virtual-tokens", "2", "--timed", "2"])
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(found))
    counts = [len((out / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "held-out", "test")]
    assert counts == [16, 48, 96]
    rows = [(out / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held-out", "test")]
    assert len({row for part in rows for row in part}) == 8 * 20  # none is in two of them
    for method in ("p-tuning", "prompt-tuning", "prefix"):
        assert (out / method / "adapter_model.safetensors").exists() and (out / method / "curve.png").exists()
        assert found[method]["difference"] < 1e-4 and min(found[method]["PEFT"], found[method]["fusedprompt"]) > 0
    told = capsys.readouterr().out
    assert "Right of 96 packages that were not trained on: 0 without a prompt." in told
    assert told.count("times as fast. PEFT reads it back: logits differ by at most ") == 3
