"""`python -m fusedprompt doctor`: what is installed, which backend each op uses and why, and whether each op is right.

Only the standard library is imported at the top, and every probe is guarded: the doctor must be able to report on an
installation that is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

from .._version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
# Settings that change what runs; beside all of our own.
_SETTINGS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET")
_SECTIONS = ("versions", "system", "devices", "environment", "native code", "backends", "checks")


def main(arguments: list[str]) -> int:
    """Print the report; returns 1 if an op's self-check failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fusedprompt doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0 if report["healthy"] else 1


def examine() -> dict[str, Any]:
    """The whole report: strings, numbers, lists and dictionaries only; it names no user and no host."""
    report: dict[str, Any] = {
        "versions": {
            "fusedprompt": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "system": _guarded(_system),
        "devices": _guarded(_devices),
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith("FUSEDPROMPT_") or key in _SETTINGS
        },
        "native code": _guarded(_native_code),
        "backends": _guarded(_backends),
        "checks": _guarded(_checks),
    }
    checks = report["checks"]
    report["healthy"] = isinstance(checks, dict) and "error" not in checks and all(v == "ok" for v in checks.values())
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report for people; an issue takes it as it is."""
    lines = []
    for title in _SECTIONS:
        section = report[title] or {"none": ""}
        width = max(map(len, section))
        lines.append(f"{title}:")
        for key, value in section.items():
            shown = "; ".join(f"{name}: {why}" for name, why in value.items()) if isinstance(value, dict) else value
            lines.append(f"  {key:<{width}}  {shown}".rstrip())
    lines.append("healthy" if report["healthy"] else "NOT HEALTHY: see the checks")
    return "\n".join(lines)


def _guarded(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception:  # the report must be finished whatever is broken
        return {"error": traceback.format_exc(limit=3).strip().splitlines()[-1]}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _system() -> dict[str, Any]:
    import torch

    return {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda of torch": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "cuda driver": _driver(),
    }


def _driver() -> str:
    """The version of NVIDIA's driver, from the kernel: nothing has to be started for it."""
    try:
        with open("/sys/module/nvidia/version", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "none"


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"cpu": f"{platform.machine()}, {os.cpu_count()} processors"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _sample(device: str) -> dict[str, tuple[Any, ...]]:
    """Small arguments for each op, in the order its backends take them."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device)

    ids = torch.randint(0, 11, (2, 4), generator=generator).to(device)
    lstm_weights = [draw(12, 5), draw(12, 3), draw(12), draw(12)] * 2
    return {
        "mlp": (draw(4, 5), [draw(6, 5), draw(5, 6)], [draw(6), draw(5)], []),
        "lstm": (draw(1, 4, 5), lstm_weights, [], True),
        "splice": (draw(3, 5), None, ids, draw(11, 5), None, [], []),
        "cpt": (
            draw(3, 5),
            draw(3, 5),
            torch.tensor([0.1, 9.0, 0.5], device=device),
            torch.tensor([True, False, True], device=device),
        ),
        "head_loss": (draw(4, 5), draw(11, 5), draw(11), torch.tensor([3, -100, 0, 10], device=device), None),
    }


def _native_code() -> dict[str, Any]:
    from ..ops import _native

    return _native.build_info()


def _backends() -> dict[str, Any]:
    import torch

    from .. import ops

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {
        f"{op} on {device}": ops.explain(op, *arguments)
        for device in devices
        for op, arguments in _sample(device).items()
    }


def _checks() -> dict[str, Any]:
    """Each op and its gradients, on each device and backend that runs, against the formula in fp64 on the CPU."""
    import torch

    from .. import ops

    results: dict[str, Any] = {}
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for name, arguments in _sample(device).items():
            for backend, objection in ops.explain(name, *arguments).items():
                if objection == "runs":
                    key = f"{name} {backend} on {device}"
                    results[key] = _guarded(lambda: {"": _compare(name, backend, arguments)}).popitem()[1]  # noqa: B023
    return results


def _compare(name: str, backend: str, arguments: tuple[Any, ...]) -> str:
    """ "ok", or what differs."""
    import torch

    from .. import ops

    def leaves(values: tuple[Any, ...], dtype: torch.dtype, device: str) -> tuple[list[Any], list[torch.Tensor]]:
        tensors: list[torch.Tensor] = []

        def copy(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [copy(item) for item in value]
            if isinstance(value, torch.Tensor):
                moved = value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
                if moved.is_floating_point():
                    tensors.append(moved.requires_grad_())
                return moved
            return value

        return [copy(value) for value in values], tensors

    def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
        found = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
        return [output, *(value if value is not None else torch.zeros_like(at) for value, at in zip(found, inputs))]

    device = str(next(value.device for value in arguments if isinstance(value, torch.Tensor)))
    values, inputs = leaves(arguments, torch.float32, device)
    chosen = next(candidate for candidate in ops.OPS[name].backends if candidate.name == backend)
    output = chosen.call(*values)
    actual = gradients(output[0] if isinstance(output, tuple) else output, inputs)
    exact_values, exact_inputs = leaves(arguments, torch.float64, "cpu")
    expected = gradients(_FORMULAS[name](*exact_values), exact_inputs)
    for index, (found, right) in enumerate(zip(actual, expected)):
        error = (found.detach().cpu().double() - right.detach()).abs().max().item()
        if not error <= 1e-4 * max(1.0, right.abs().max().item()):  # also true for NaN
            return f"{'output' if index == 0 else f'gradient {index}'} differs from the formula by {error:.1e}"
    return "ok"


def _mlp_formula(x: Any, weights: Any, biases: Any, _: Any) -> Any:
    for weight, bias in zip(weights[:-1], biases[:-1]):
        x = (x @ weight.T + bias).clamp(min=0)
    return x @ weights[-1].T + biases[-1]


def _lstm_formula(x: Any, weights: Any, _: Any, bidirectional: bool) -> Any:
    import torch

    outputs = []
    for way in range(2 if bidirectional else 1):
        w_ih, w_hh, b_ih, b_hh = weights[4 * way : 4 * way + 4]
        h = c = x.new_zeros(x.shape[0], w_hh.shape[1])
        steps = []
        for t in range(x.shape[1])[:: -1 if way else 1]:
            i, f, g, o = (x[:, t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        outputs.append(torch.stack(steps[:: -1 if way else 1], 1))
    return torch.cat(outputs, -1)


def _splice_formula(prompt: Any, slots: Any, ids: Any, table: Any, *_: Any) -> Any:
    import torch

    return torch.stack([torch.cat((prompt, table[row])) for row in ids])


def _cpt_formula(embedding: Any, delta: Any, epsilon: Any, trainable: Any) -> Any:
    import torch

    scale = torch.minimum(torch.ones_like(epsilon), epsilon / delta.norm(dim=1)).detach()[:, None]
    # The gradient goes to delta as if there were no projection, where it is trainable.
    moved = torch.where(trainable[:, None], delta, delta.detach())
    return embedding.detach() + (delta * scale).detach() + moved - moved.detach()


def _head_loss_formula(hidden: Any, weight: Any, bias: Any, labels: Any, _: Any) -> Any:
    logits = hidden @ weight.detach().T + bias.detach()
    return sum(logits[row].logsumexp(0) - logits[row, label] for row, label in enumerate(labels) if label >= 0)


_FORMULAS: dict[str, Callable[..., Any]] = {
    "mlp": _mlp_formula,
    "lstm": _lstm_formula,
    "splice": _splice_formula,
    "cpt": _cpt_formula,
    "head_loss": _head_loss_formula,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
