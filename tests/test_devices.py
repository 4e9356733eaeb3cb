"""What is made names its device: `torch.set_default_device` is the user's.

Random numbers come from generators whose device is written down.

`torch.Generator()` is on the CPU whatever the default device is, and `torch.randn(..., generator=...)` is not: where
the default device is a GPU, as in `pytest benches --device cuda`, the two together are an error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path for part in ("fusedprompt", "benches", "tests", "examples") for path in sorted((ROOT / part).rglob("*.py"))
]
# These draw where their argument is, and have no argument `device`.
FOLLOW = {"bernoulli", "multinomial", "poisson"}


def undecided(source: str) -> Iterator[str]:
    """Each call of torch's in which a generator meets a device that is not written down."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        if name == "Generator":
            if not (node.args or "device" in keywords):
                yield f"line {node.lineno}: torch.Generator without a device"
        elif "generator" in keywords and "device" not in keywords and name not in FOLLOW:
            yield f"line {node.lineno}: torch.{name} with a generator and without a device"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.Generator()", 1),
        ("torch.Generator('cpu')", 0),
        ("torch.Generator(device=place)", 0),
        ("torch.randn(2, generator=g)", 1),
        ("torch.randn(2, generator=torch.Generator()).to(device)", 2),
        ("torch.randn(2, generator=g, device='cpu')", 0),
        ("torch.bernoulli(x, generator=g)", 0),
        ("torch.randn(2)", 0),
    ],
)
def test_what_is_undecided_is_found(source: str, found: int) -> None:
    assert len(list(undecided(source))) == found


def test_every_generator_has_a_device_that_is_written_down() -> None:
    found = {str(path.relative_to(ROOT)): list(undecided(path.read_text())) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


# What these rooms make is a batch's, on its device, or a table of the host's. Encoders follow the default device as
# every module of PyTorch does.
NAMED = [
    path
    for room in ("base", "layouts", "ops", "routes", "model")
    for path in (ROOT / "fusedprompt" / room).rglob("*.py")
]
MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "ones", "rand", "randint", "randn", "tensor", "zeros"}


def without_device(source: str) -> Iterator[str]:
    """Each tensor that torch makes on the default device."""
    for node in ast.walk(ast.parse(source)):
        made = isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in MAKERS
        if made and "device" not in {keyword.arg for keyword in node.keywords}:
            yield f"line {node.lineno}: {ast.unparse(node.func)} without a device"


@pytest.mark.parametrize(("source", "found"), [("torch.arange(3)", 1), ("torch.tensor([1], device='cpu')", 0)])
def test_what_has_no_device_is_found(source: str, found: int) -> None:
    assert len(list(without_device(source))) == found


def test_everything_that_is_made_has_a_device() -> None:
    found = {str(path.relative_to(ROOT)): list(without_device(path.read_text())) for path in NAMED}
    assert {path: lines for path, lines in found.items() if lines} == {}
