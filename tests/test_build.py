"""What setup.py decides, what it builds, and that the result needs nothing of libtorch but its stable ABI."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import BuildExtension

import fusedprompt
from fusedprompt.commands import doctor
from fusedprompt.ops import _native

ROOT = Path(fusedprompt.__file__).resolve().parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("an installed package has no setup.py", allow_module_level=True)
VARIABLES = ("FUSEDPROMPT_NATIVE", "FUSEDPROMPT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run setup.py without building; gives its names, with the arguments of `setuptools.setup` as "arguments"."""
    arguments: dict[str, Any] = {}
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    monkeypatch.chdir(ROOT)

    def run(**environment: str) -> dict[str, Any]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        arguments.clear()
        return {**runpy.run_path("setup.py"), "arguments": arguments}

    return run


def names(script: dict[str, Any]) -> list[str]:
    return [extension.name for extension in script["arguments"].get("ext_modules", [])]


def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "nvcc" else which(name, path=path))


def test_without_a_compiler_it_installs_pure_and_says_so_once(setup: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert names(setup(CXX="/no/such/compiler")) == []
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "fusedprompt: installing without native code: there is no C++ compiler (/no/such/compiler). "
        "Every op runs in plain PyTorch."
    ]


def test_without_torch_it_installs_pure_and_says_how_to_do_otherwise(
    setup: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    assert names(setup()) == []
    assert "torch is not installed where this is built" in (said := capfd.readouterr().err)
    assert "--no-build-isolation" in said


def test_native_0_builds_nothing_and_native_1_insists(setup: Any) -> None:
    assert names(setup(FUSEDPROMPT_NATIVE="0")) == []
    with pytest.raises(SystemExit, match=r"FUSEDPROMPT_NATIVE=1: there is no C\+\+ compiler"):
        setup(FUSEDPROMPT_NATIVE="1", CXX="/no/such/compiler")


@pytest.mark.parametrize("variable", ["FUSEDPROMPT_NATIVE", "FUSEDPROMPT_CUDA"])
def test_a_switch_that_is_none_of_auto_0_1_is_refused_by_name(setup: Any, variable: str) -> None:
    with pytest.raises(SystemExit, match=f"{variable}: expected auto, 0 or 1, got 'yes'"):
        setup(**{variable: "yes"})


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "toolkit", "built"),
    [
        ("auto", "13.0", True, True),
        ("auto", None, True, False),
        ("auto", "13.0", False, False),
        ("0", "13.0", True, False),
        ("1", None, True, True),
    ],
)
def test_cuda_is_built_by_toolkit_torch_and_switch_never_by_whether_a_gpu_is_there(
    setup: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    switch: str,
    torch_cuda: str | None,
    toolkit: bool,
    built: bool,
) -> None:
    (tmp_path / "bin").mkdir()
    if toolkit:
        (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    else:
        no_toolkit(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    script = setup(FUSEDPROMPT_CUDA=switch, CUDA_HOME=str(tmp_path))
    assert names(script) == ["fusedprompt._C", *(["fusedprompt._cuda"] if built else [])]
    # torch's build command refuses every .cu source where torch is a CPU build.
    assert not any(source.endswith(".cu") for item in script["arguments"]["ext_modules"] for source in item.sources)
    recorded = dict(script["arguments"]["ext_modules"][0].define_macros)["FUSEDPROMPT_CUDA_BUILD"]
    assert (recorded == '"8.0;8.6;8.9;9.0;10.0;12.0+PTX"') is built and recorded.startswith('"not built: ') is not built


@pytest.fixture
def failing_build(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`build_ext` with an nvcc that complains and fails; gives the macros of what would be compiled for the CPU."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'lstm_cuda.cu(7): error: identifier is undefined' >&2\nexit 2\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    built: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(
        BuildExtension,
        "build_extensions",
        lambda self: [self.build_extension(extension) for extension in self.extensions],
    )
    monkeypatch.setattr(
        BuildExtension,
        "build_extension",
        lambda self, extension: built.update({extension.name: dict(extension.define_macros)}),
    )

    def run(**environment: str) -> dict[str, dict[str, str]]:
        arguments = setup(CUDA_HOME=str(tmp_path), **environment)["arguments"]
        command = arguments["cmdclass"]["build_ext"](
            setuptools.Distribution({"ext_modules": arguments["ext_modules"]}), build_lib=str(tmp_path), inplace=False
        )
        command.ensure_finalized()
        command.run()
        return built

    return run


def test_errors_of_nvcc_are_shown_and_the_cpu_library_is_built_and_knows(
    failing_build: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    built = failing_build()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fusedprompt: ")][-1]
    assert "without the library for CUDA" in said and "lstm_cuda.cu(7): error: identifier is undefined" in said
    assert list(built) == ["fusedprompt._C"]
    assert built["fusedprompt._C"]["FUSEDPROMPT_CUDA_BUILD"] == '"not built: compiling it failed"'


@pytest.mark.parametrize("switch", ["FUSEDPROMPT_CUDA", "FUSEDPROMPT_NATIVE"])
def test_errors_of_nvcc_end_a_build_that_insists(failing_build: Any, switch: str) -> None:
    with pytest.raises(RuntimeError, match=r"lstm_cuda.cu\(7\): error: identifier is undefined"):
        failing_build(**{switch: "1"})


def test_cuda_1_without_a_toolkit_is_refused(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    no_toolkit(monkeypatch)
    with pytest.raises(SystemExit, match="FUSEDPROMPT_CUDA=1: no CUDA toolkit found"):
        setup(FUSEDPROMPT_CUDA="1")


def test_nvcc_in_path_is_found_where_cuda_home_has_none(
    setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("home/bin", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "other" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "other"), prepend=os.pathsep)
    script = setup(FUSEDPROMPT_CUDA="1", CUDA_HOME=str(tmp_path / "home"))
    assert "fusedprompt._cuda" in names(script) and script["toolkit"]() == str(tmp_path / "other" / "nvcc")
    shutil.copy(tmp_path / "other" / "nvcc", tmp_path / "home" / "bin" / "nvcc")
    assert script["toolkit"]() == str(tmp_path / "home" / "bin" / "nvcc")


def test_architectures_become_flags_of_nvcc(setup: Any) -> None:
    flags = setup(FUSEDPROMPT_NATIVE="0")["gencode"]("8.0;9.0a 12.0+PTX")
    assert flags[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]
    assert set(flags[::2]) == {"-gencode"}


def test_the_architecture_list_of_torch_is_honoured(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup(FUSEDPROMPT_NATIVE="0", TORCH_CUDA_ARCH_LIST="9.0")["architectures"]() == "9.0"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution made from a copy of this tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    for name in ("fusedprompt", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(folder), cwd=copy, FUSEDPROMPT_NATIVE="0")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder)
    return next(folder.glob("fusedprompt-*/"))


def test_the_source_distribution_has_every_source_file(unpacked_sdist: Path) -> None:
    def sources(root: Path) -> set[str]:
        files = [path for name in ("csrc", "fusedprompt") for path in (root / name).rglob("*")]
        return {
            str(path.relative_to(root))
            for path in files
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and "__pycache__" not in path.parts
        }

    assert sources(unpacked_sdist) == sources(ROOT)
    assert "csrc/lstm_cpu.cpp" in sources(ROOT)


@pytest.mark.skipif(_native.MODULE is None, reason="nothing was compiled here")
def test_the_source_distribution_builds_from_itself_and_runs(unpacked_sdist: Path) -> None:
    compiler = unpacked_sdist / "quick"  # optimised code takes twice as long to compile, and other tests run it
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    switches = {"FUSEDPROMPT_NATIVE": "1", "FUSEDPROMPT_CUDA": "0", "CXX": str(compiler)}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=unpacked_sdist, **switches)
    code = """
import torch, fusedprompt
x, weights = torch.ones(1, 2, 3), [torch.ones(4, 3), torch.ones(4, 1), torch.ones(4), torch.ones(4)]
results = [fusedprompt.ops.lstm(x, weights, bidirectional=False, backend=name) for name in ("native", "reference")]
torch.testing.assert_close(*results)
print(fusedprompt.__file__)
"""
    process = run(sys.executable, "-c", code, cwd=unpacked_sdist, PYTHONPATH=str(unpacked_sdist))
    assert Path(process.stdout.strip()).is_relative_to(unpacked_sdist)


@pytest.mark.skipif(_native.MODULE is None, reason="nothing was compiled here")
def test_doctor_shows_what_was_built() -> None:
    shown = doctor.examine()["native code"]
    assert shown == _native.build_info()
    assert set(shown) == {"compiler", "torch", "cuda", "cpu kernels", "cuda kernels"}
    assert shown["torch"].startswith("2.") and all(shown.values())


@pytest.mark.skipif(_native.MODULE is None or shutil.which("nm") is None, reason="needs the extension and nm")
def test_the_extension_uses_nothing_of_libtorch_but_its_stable_abi() -> None:
    symbols = run("nm", "-D", "-C", "--undefined-only", str(_native.MODULE.__file__), cwd=ROOT).stdout
    unstable = [line for line in symbols.splitlines() if any(name in line for name in (" at::", " c10::", " torch::"))]
    assert "torch_call_dispatcher" in symbols and unstable == []
