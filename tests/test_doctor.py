"""`python -m fusedprompt doctor`: a report that an issue can take as it is, whatever is broken."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedprompt
from fusedprompt.commands import doctor, op_checks
from pages import ROOT

SECTIONS = ["versions", "system", "devices", "environment", "native code", "backends", "checks"]


def test_the_report_has_versions_system_backends_and_a_check_of_every_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDPROMPT_CHECK", "1")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == SECTIONS
    assert f"fusedprompt   {fusedprompt.__version__}" in text and torch.__version__ in text
    assert platform.platform() in text and "FUSEDPROMPT_CHECK  1" in text
    for op in fusedprompt.ops.OPS:
        assert f"{op} reference on cpu" in text
    assert text.splitlines()[-1] == "healthy"
    assert platform.node() not in text and str(Path.home()) not in text and f"/{getpass.getuser()}/" not in text


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.examine()


def test_an_op_with_wrong_numbers_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    op = fusedprompt.ops.OPS["mlp"]
    right = op.backends[-1].call

    def wrong(*args: Any) -> torch.Tensor:
        result: torch.Tensor = right(*args)
        return result * 1.001

    broken = [*op.backends[:-1], type(op.backends[-1])("reference", op.backends[-1].why_not, wrong)]
    monkeypatch.setattr(op, "backends", broken)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "mlp reference on cpu output differs from the formula by" in " ".join(text.split())
    assert text.splitlines()[-1] == "NOT HEALTHY: see the checks"


def test_checks_take_no_tf32_and_leave_the_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes TF32 unasked: its error, 5e-4, would be reported as a wrong LSTM."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    found: list[tuple[str, ...]] = []
    differentiate = op_checks._differentiate

    def recorded(*arguments: Any) -> Any:
        found.append(tuple(place.fp32_precision for place in places))
        return differentiate(*arguments)

    monkeypatch.setattr(op_checks, "_differentiate", recorded)
    try:
        for place in places:
            place.fp32_precision = "tf32"
        op_checks.check_all()
        assert [place.fp32_precision for place in places] == ["tf32", "tf32"]
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value
    assert len(found) >= 2 * len(fusedprompt.ops.OPS) and set(found) == {("ieee", "ieee")}


def test_a_torch_that_does_not_import_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so: cannot open shared object file')")
    command = [sys.executable, "-m", "fusedprompt", "doctor"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 1 and process.stderr == ""
    assert process.stdout.count("ImportError: libc10.so: cannot open shared object file") == 5
    assert f"fusedprompt   {fusedprompt.__version__}" in process.stdout
