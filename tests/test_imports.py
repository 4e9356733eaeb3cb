"""What importing the package brings with it, and which part may import which."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedprompt

PACKAGE = Path(fusedprompt.__file__).resolve().parent
OPTIONAL = ("transformers", "peft", "triton", "safetensors", "matplotlib", "tqdm", "huggingface_hub")
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = [path for path in SOURCES if path.is_relative_to(PACKAGE / "ops")]


def run_python(code: str) -> str:
    """The output of a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    code = f"""
import sys
import fusedprompt
print(sorted({{"torch", "numpy", *{OPTIONAL}}} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


def test_using_every_public_name_imports_nothing_optional_that_torch_does_not() -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import fusedprompt
from fusedprompt import *
for name in fusedprompt.__all__:
    assert getattr(fusedprompt, name) is globals()[name], name
assert set(fusedprompt.__all__) <= set(dir(fusedprompt))
print(sorted(set({OPTIONAL}) & (set(sys.modules) - before)))
"""
    assert run_python(code).strip() == "[]"


def test_everything_but_models_runs_where_optional_packages_are_missing() -> None:
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Missing())
import torch
import fusedprompt as fp

x = torch.ones(2, 3, requires_grad=True)
y = fp.ops.mlp(x, [torch.ones(4, 3)], [torch.ones(4)])
assert torch.equal(y, torch.full((2, 4), 4.0))
ids = torch.zeros(5, 1, dtype=torch.int64)
batch = fp.ops.splice_batch(y, fp.Layout.prefix(2), input_ids=ids, table=torch.zeros(1, 4), labels=ids)
batch.inputs_embeds.sum().backward()
assert torch.equal(x.grad, torch.full((2, 3), 20.0))
for kind in ("MLP", "LSTM"):
    config = fp.PromptEncoderConfig(num_virtual_tokens=2, token_dim=4, encoder_reparameterization_type=kind)
    assert fp.PromptEncoder(config).encode().shape == (2, 4)
rows, _ = fp.ops.cpt(x.detach(), x, torch.ones(2), torch.ones(2, dtype=torch.bool))
assert fp.explain("mlp", x, [], [], [])["reference"] == "runs"
for name in {OPTIONAL}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
print("done")
"""
    assert run_python(code).strip() == "done"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fusedprompt' has no attribute 'nonsense'"):
        fusedprompt.nonsense  # noqa: B018


def imported_names(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports, with relative imports resolved.

    top_level_only: without those inside of functions, and those for type checkers.
    """
    tree = ast.parse(path.read_text())
    package = ["fusedprompt", *path.relative_to(PACKAGE).parent.parts]

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                stem = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*stem, *([child.module] if child.module else [])])
                yield from (f"{base}.{alias.name}" for alias in child.names)
            elif top_level_only and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from ()
            elif not (top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
                yield from visit(child)

    return visit(tree)


def imports_of(path: Path, forbidden: tuple[str, ...], top_level_only: bool = False) -> list[str]:
    return [
        name
        for name in imported_names(path, top_level_only)
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in forbidden)
    ]


def test_the_scan_of_imports_sees_relative_nested_and_type_checking_imports() -> None:
    folder = PACKAGE / "ops" / "mlp"
    assert "fusedprompt.base.check" in set(imported_names(folder / "__init__.py"))
    assert "fusedprompt.ops.mlp.reference" in set(imported_names(folder / "__init__.py"))
    assert "fusedprompt.ops._library.LIBRARY" in set(imported_names(folder / "reference.py"))
    face, doctor = PACKAGE / "__init__.py", PACKAGE / "commands" / "doctor.py"
    assert "fusedprompt.layouts.layout.Layout" in set(imported_names(face))
    assert "fusedprompt.layouts.layout.Layout" not in set(imported_names(face, top_level_only=True))
    assert "fusedprompt.ops" in set(imported_names(doctor))
    assert "fusedprompt.ops" not in set(imported_names(doctor, top_level_only=True))
    assert len(OPS) > 10 and len(SOURCES) > 20


# From the top of the house to the ground: a room knows those below it.
ROOMS = ("commands", "integrations", "model", "bank", "routes", "methods", "ops", "layouts", "base")
ENTRIES = {"__init__.py", "__main__.py", "_version.py", "py.typed", *ROOMS}


def test_the_package_has_thirteen_entries() -> None:
    built = {"__pycache__"}
    assert {entry.name for entry in PACKAGE.iterdir() if entry.suffix != ".so"} - built == ENTRIES


def room_of(name: str) -> str | None:
    """The room of a module or of a name in it."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fusedprompt" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent != PACKAGE], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_run_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0]
    above = ROOMS[: ROOMS.index(own)]
    assert [name for name in imported_names(path) if room_of(name) in above] == []


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("fusedprompt", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def test_no_file_imports_itself_in_a_circle() -> None:
    """Imports for type checkers and inside of functions count too."""
    modules = {module_of(path): path for path in SOURCES}
    faces = {name for name, path in modules.items() if path.name == "__init__.py"}

    def target(name: str) -> str | None:
        while name not in modules:
            name = name.rpartition(".")[0]
            if not name:
                return None
        return name

    edges = {name: {target(one) for one in imported_names(path)} - {None, name} for name, path in modules.items()}
    # The package's own face hands all names on when they are first used; a room's face imports what it hands on.
    edges["fusedprompt"] = set()
    assert faces and sum(map(len, edges.values())) > 200
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(filter(None, edges[name])):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(modules):
        visit(name, ())


def test_files_and_functions_are_small() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert max(lengths.values()) <= 450
    assert sorted(lengths.values())[len(lengths) // 2] <= 150
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


@pytest.mark.parametrize("path", OPS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ops_import_nothing_of_transformers_or_peft(path: Path) -> None:
    assert imports_of(path, ("transformers", "peft")) == []


BACKENDS = ("reference", "triton", "native")


@pytest.mark.parametrize(
    "path", [path for path in OPS if path.stem in BACKENDS], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_backend_imports_no_other_backend_and_no_other_op(path: Path) -> None:
    op = path.parent.name
    others = tuple(f"fusedprompt.ops.{op}.{name}" for name in BACKENDS if name != path.stem)
    other_ops = tuple(
        f"fusedprompt.ops.{folder.name}"
        for folder in (PACKAGE / "ops").iterdir()
        if (folder / "__init__.py").exists() and folder.name != op
    )
    assert len(other_ops) == 5
    assert imports_of(path, others + other_ops) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_inside_functions_only(path: Path) -> None:
    # Triton's kernels cannot be written without Triton; see the next test.
    optional = tuple(name for name in OPTIONAL if name != "triton" or path not in OPS)
    # Nor can a layer of transformers' cache be written without it: what imports this file does so in functions.
    optional = () if path.name == "prefixed_cache.py" else (*optional, "fusedprompt.base.prefixed_cache")
    assert imports_of(path, optional, top_level_only=True) == []


def test_no_file_but_those_of_triton_backends_needs_triton_at_module_level() -> None:
    needy: dict[Path, str] = {}
    while True:
        names = ("triton", *needy.values())
        more = [path for path in SOURCES if path not in needy and imports_of(path, names, top_level_only=True)]
        if not more:
            break
        for path in more:
            needy[path] = ".".join(("fusedprompt", *path.relative_to(PACKAGE).with_suffix("").parts))
    assert PACKAGE / "ops" / "_triton.py" in needy
    for path in needy:
        assert path in OPS and (path.stem == "triton" or re.fullmatch("_[a-z]+", path.stem)), path
        assert path.stem not in ("_backend", "_check", "_library", "_requirements", "_op"), path


@pytest.mark.parametrize("path", OPS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ops_catch_no_exception_they_do_not_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: except without a type"
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            assert not names & {"Exception", "BaseException"}, f"line {node.lineno}: {ast.unparse(node.type)}"
