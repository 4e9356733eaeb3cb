"""What is compiled, and when: the LSTM for CPU always, for CUDA where it can run. Everything else is in pyproject.toml.

Nothing here is needed: without a compiler, or without torch at build time, the package installs pure and says so.

FUSEDPROMPT_NATIVE  auto (default): compile if possible; 0: never; 1: or fail.
FUSEDPROMPT_CUDA    auto (default): compile for CUDA if there is a toolkit and torch is built with CUDA; 0: never;
                    1: for any torch, or fail.
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX: as in torch.utils.cpp_extension.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tempfile

from setuptools import Extension, setup

CUDA = "fusedprompt._cuda"
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# The oldest torch that the result runs on; headers hide what is newer.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def say(message: str) -> None:
    print(f"fusedprompt: {message}", file=sys.stderr, flush=True)


def choice(name: str) -> str:
    value = os.environ.get(name, "auto") or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def why_not_native() -> str | None:
    if choice("FUSEDPROMPT_NATIVE") == "0":
        return "FUSEDPROMPT_NATIVE=0"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not installed where this is built (install it first, and pass --no-build-isolation to pip)"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler.split()[0]) else f"there is no C++ compiler ({compiler})"


def why_not_cuda() -> str | None:
    import torch

    wanted = choice("FUSEDPROMPT_CUDA")
    if wanted == "0":
        return "FUSEDPROMPT_CUDA=0"
    if not os.path.exists("csrc/lstm_cuda.cu"):
        return "no source"
    if toolkit() is None:
        if wanted == "1":
            raise SystemExit("FUSEDPROMPT_CUDA=1: no CUDA toolkit found (CUDA_HOME, or nvcc in PATH)")
        return "there is no CUDA toolkit"
    if wanted == "auto" and torch.version.cuda is None:
        return "torch is built without CUDA (FUSEDPROMPT_CUDA=1 compiles it nevertheless)"
    return None


def toolkit() -> str | None:
    """The path of nvcc. torch's own CUDA_HOME is None for every CPU build of torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0a;12.0+PTX"."""
    flags = []
    for item in architectures.replace(" ", ";").split(";"):
        number = item.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if item.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def compile_cuda(source: str, target: str) -> None:
    """One library without Python in it. torch's CUDAExtension would link libraries that a CPU build of torch lacks.

    Raises:
        RuntimeError: nvcc failed; the message ends with what it said.
    """
    from torch.utils import cpp_extension

    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        libraries = cpp_extension.library_paths()
        if not any(os.path.exists(os.path.join(path, "libtorch_cuda.so")) for path in libraries):
            # Its symbols are looked up when the library is loaded, which happens only where torch has CUDA.
            stub = [*compiler(), "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libtorch_cuda.so"]
            subprocess.run([*stub, "-o", f"{folder}/libtorch_cuda.so"], check=True)
            libraries = [*libraries, folder]
        process = subprocess.run(
            [
                *(toolkit(), "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"),
                *("--threads", str(os.cpu_count() or 1), *STABLE_ABI, *gencode(architectures())),
                *(f"-I{path}" for path in cpp_extension.include_paths()),
                *(f"-L{path}" for path in libraries),
                # Some linkers drop a library that defines nothing we use, as the stub does; then nothing is found.
                *("-Xlinker", "--no-as-needed", "-Xlinker", "--allow-shlib-undefined"),
                *(source, "csrc/lstm_plan.cpp", "-ltorch_cpu", "-ltorch_cuda"),
                *("-o", target),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    sys.stderr.write(process.stdout)
    if process.returncode:
        raise RuntimeError(f"nvcc ended with status {process.returncode}: {process.stdout[-2000:].strip()}")


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def architectures() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES


def build() -> dict[str, object]:
    reason = why_not_native()
    if reason is not None:
        if choice("FUSEDPROMPT_NATIVE") == "1":
            raise SystemExit(f"FUSEDPROMPT_NATIVE=1: {reason}")
        say(f"installing without native code: {reason}. Every op runs in plain PyTorch.")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    insists = "1" in (choice("FUSEDPROMPT_NATIVE"), choice("FUSEDPROMPT_CUDA"))

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            """CUDA first, because the library for CPU says what became of it: pip hides all output of a build."""
            for extension in [item for item in self.extensions if item.name == CUDA]:
                try:
                    compile_cuda(extension.depends[0], self.get_ext_fullpath(CUDA))
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    if insists:
                        raise
                    say(f"installing without the library for CUDA: {' | '.join(str(error).splitlines())}")
                    self.extensions.remove(extension)
                    for other in self.extensions:
                        other.define_macros[0] = ("FUSEDPROMPT_CUDA_BUILD", '"not built: compiling it failed"')
            super().build_extensions()

        def build_extension(self, extension: Extension) -> None:
            if extension.name != CUDA:
                super().build_extension(extension)

        def run(self) -> None:
            try:
                super().run()
            except (RuntimeError, subprocess.CalledProcessError) as error:
                if insists:
                    raise
                self.extensions = []
                say(f"installing without native code: compiling failed ({str(error).splitlines()[0]})")

    reason = why_not_cuda()
    cuda = f"not built: {reason}" if reason else architectures()
    say(f"compiling for CPU; CUDA: {cuda}")
    sources = sorted(glob.glob("csrc/*.cpp"))
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", *STABLE_ABI]
    facts = [("FUSEDPROMPT_CUDA_BUILD", f'"{cuda}"'), ("FUSEDPROMPT_TORCH_BUILD", f'"{torch.__version__}"')]
    extensions = [CppExtension("fusedprompt._C", sources, extra_compile_args=flags, define_macros=facts)]
    if reason is None:
        # Not a source: torch's command refuses any .cu if torch is a CPU build.
        extensions.append(Extension(CUDA, [], depends=["csrc/lstm_cuda.cu"]))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


setup(**build())
