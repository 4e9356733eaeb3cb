"""Which backend runs: named, preferred, from the environment, or the first that can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedprompt as fp
from fusedprompt.ops._backend import Op, never_objects
from tolerance import sample

ROOT = Path(fp.__file__).resolve().parent.parent


def needs_positive(number: int) -> str | None:
    return None if number > 0 else f"needs a positive number, got {number}"


@pytest.fixture
def op() -> Op:
    """An op whose triton backend takes positive numbers, and which has no native backend."""
    op = Op("double")
    op.add("reference", lambda number: 2 * number, never_objects)
    op.add("triton", lambda number: number + number, needs_positive)
    return op


@pytest.mark.parametrize("requested", [None, "auto"])
def test_auto_takes_the_first_backend_that_can_run(op: Op, requested: str | None) -> None:
    assert op.select(requested, 1).name == "triton"
    assert op.select(requested, -1).name == "reference"


def test_a_backend_added_later_comes_first(op: Op) -> None:
    op.add("native", abs, never_objects)
    assert [backend.name for backend in op.backends] == ["native", "triton", "reference"]
    assert op.select("auto", 1).name == "native"


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_named_backend_runs_where_it_can(op: Op, name: str) -> None:
    backend = op.select(name, 3)
    assert backend.name == name and backend.call(3) == 6


def test_a_named_backend_that_cannot_run_raises_with_its_reason(op: Op) -> None:
    message = r"^backend 'triton' of op 'double' cannot run: it needs a positive number, got -1$"
    with pytest.raises(fp.BackendUnavailable, match=message):
        op.select("triton", -1)


@pytest.mark.parametrize("name", ["native", "cuda", "Reference"])
def test_a_named_backend_that_the_op_lacks_raises_value_error_naming_the_choices(op: Op, name: str) -> None:
    message = rf"backend: expected one of \('auto', 'triton', 'reference'\) for op 'double', got '{name}'"
    with pytest.raises(ValueError, match=message):
        op.select(name, 1)


def test_explain_lists_every_backend_fastest_first_with_its_reason(op: Op) -> None:
    assert list(op.explain(-1).items()) == [("triton", "needs a positive number, got -1"), ("reference", "runs")]
    assert op.explain(1) == {"triton": "runs", "reference": "runs"}


def test_use_backend_prefers_a_backend_within_its_block_only(op: Op) -> None:
    with fp.use_backend("reference"):
        assert op.select(None, 1).name == "reference"
        with fp.use_backend("auto"):
            assert op.select(None, 1).name == "triton"
        assert op.select("auto", 1).name == "reference"
    assert op.select(None, 1).name == "triton"


def test_use_backend_ends_with_its_block_after_an_error(op: Op) -> None:
    with pytest.raises(KeyError), fp.use_backend("reference"):
        raise KeyError
    assert op.select(None, 1).name == "triton"


def test_a_named_backend_overrides_use_backend(op: Op) -> None:
    with fp.use_backend("reference"):
        assert op.select("triton", 1).name == "triton"


def test_a_preferred_backend_that_the_op_lacks_falls_back_to_auto(op: Op) -> None:
    with fp.use_backend("native"):
        assert op.select(None, 1).name == "triton"
        assert op.select(None, -1).name == "reference"


def test_a_preferred_backend_that_cannot_run_raises_with_its_reason(op: Op) -> None:
    with fp.use_backend("triton"), pytest.raises(fp.BackendUnavailable, match="needs a positive number, got -1"):
        op.select(None, -1)


@pytest.mark.parametrize("name", ["cuda", "", "Auto"])
def test_use_backend_refuses_an_unknown_name(name: str) -> None:
    message = rf"backend: expected one of \('auto', 'reference', 'triton', 'native'\), got '{name}'"
    with pytest.raises(ValueError, match=message), fp.use_backend(name):
        pass


def run_python(code: str, backend: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "FUSEDPROMPT_BACKEND"}
    if backend is not None:
        environment["FUSEDPROMPT_BACKEND"] = backend
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


SELECT = """
from fusedprompt.ops._backend import Op, never_objects, use_backend
op = Op("double")
op.add("reference", abs, never_objects)
op.add("triton", abs, never_objects)
with use_backend("triton"):
    inside = op.select(None).name
print(op.select(None).name, op.select("auto").name, op.select("triton").name, inside)
"""


def test_environment_variable_sets_the_preference_of_a_process() -> None:
    process = run_python(SELECT, "reference")
    assert process.stdout.split() == ["reference", "reference", "triton", "triton"], process.stderr


def test_environment_variable_with_an_unknown_name_raises_value_error_naming_it() -> None:
    process = run_python("import fusedprompt.ops", "cuda")
    assert process.returncode != 0
    assert "ValueError: FUSEDPROMPT_BACKEND: expected one of ('auto', 'reference', " in process.stderr
    assert "got 'cuda'" in process.stderr


@pytest.mark.parametrize("op", ["mlp", "lstm", "splice", "cpt", "head_loss", "prefix_attention"])
def test_every_op_has_a_reference_backend_that_comes_last_and_always_runs(op: str) -> None:
    reasons = fp.explain(op, *sample(op))
    assert list(reasons)[-1] == "reference" and reasons["reference"] == "runs"


def test_explain_of_an_unknown_op_names_the_ops() -> None:
    with pytest.raises(
        ValueError,
        match=r"op: expected one of \['cpt', 'head_loss', 'lstm', 'mlp', 'prefix_attention', 'splice'\], got 'gru'",
    ):
        fp.explain("gru")


@pytest.mark.parametrize("preferred", ["reference", "auto"])
def test_ops_give_the_bits_of_the_reference_under_each_preference(preferred: str) -> None:
    x, weights, biases = torch.randn(3, 4), [torch.randn(2, 4)], [torch.randn(2)]
    with fp.use_backend(preferred):
        assert torch.equal(fp.ops.mlp(x, weights, biases), torch.nn.functional.linear(x, weights[0], biases[0]))
