"""`apply`: a live PEFT model on this package's ops and routes, reversibly; `enable` does so for every new one.

Only the instance changes: methods of the same name are put into its `__dict__`, where they hide the class's. Each
serves what it knows to give PEFT's result, and calls PEFT's own method for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..ops._backend import AUTO, checked_name
from ..routes.choice import checked_route
from .creation import watch
from .patch import Patch
from .record import record_on

__all__ = ["Patch", "apply", "disable", "enable", "patch_of"]

# The versions whose code was read and is tested: the first and the first that is too new.
_SUPPORTED = {"peft": ((0, 17), (0, 22)), "transformers": ((4, 57), (6, 0))}


def apply(peft_model: Any, backend: str = AUTO, route: str = AUTO, fix: bool = False) -> Patch:
    """Run a PEFT model's prompt learning (all of its methods, prefixes included) on this package's ops and routes.

    What the model computes stays PEFT's: loss, logits, gradients, generated tokens, files. Parameters, modules, hooks
    and state dicts are not touched. Adapters that are added later are served too.

    Args:
        peft_model: a `peft.PeftModel` with prompt learning, before anything wraps it (DDP, FSDP, `torch.compile`,
            `accelerator.prepare`). It is changed in place.
        backend: "auto", or "reference", "triton" or "native" for those ops that have it.
        route: "auto", "shared" or "splice"; docs/routes.md.
        fix: correct PEFT's defects that can be corrected; the report lists them.

    Returns:
        A handle: `report()`, `revert()`, and a context manager that reverts.

    Raises:
        TypeError, ValueError: not such a model, or patched already, or an unknown name.
        RuntimeError: an unsupported version of PEFT or transformers.
        BackendUnavailable: a backend or route that was asked for by name cannot run on this model.
    """
    _check_versions()
    import peft

    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(
            f"peft_model: expected a peft.PeftModel, before anything wraps it, got {type(peft_model).__name__}"
        )
    if not learns_prompts(peft_model):
        kind = peft_model.peft_config[peft_model.active_adapter].peft_type.value
        raise ValueError(f"peft_model: expected prompt learning, got {kind}")
    before = patch_of(peft_model)
    if before is not None and not before.automatic:
        raise ValueError(
            "peft_model: expected a model that is not patched; revert first: patch.revert(), or "
            "fusedprompt.integrations.peft.patch_of(peft_model).revert()"
        )
    checked_name("backend", backend)
    checked_route(route)
    patch = Patch(peft_model, backend, route, fix)
    patch._check_requests()
    if before is not None:
        before.revert()
    patch._install()
    return patch


def patch_of(peft_model: Any) -> Patch | None:
    """The patch on a PEFT model, or None. A deep copy of a patched model has a patch of its own."""
    patch: Patch | None = record_on(peft_model)
    return patch


_enabled: list[Callable[[], None]] = []  # what undoes `enable`


def enable(backend: str = AUTO, route: str = AUTO, fix: bool = False) -> None:
    """Apply to every model with prompt learning that PEFT makes or loads from now on, by whichever of its functions.

    For scripts that cannot be edited; `python -m fusedprompt run` does it from outside. A later `apply` to one of them
    takes its place.

    Args and errors are those of `apply`; and ValueError, if it is enabled already.
    """
    _check_versions()
    if _enabled:
        raise ValueError("enable: expected it not to be enabled already; call disable() first")
    checked_name("backend", backend)
    checked_route(route)

    def made(model: Any) -> None:
        if learns_prompts(model) and patch_of(model) is None:
            apply_automatically(model, backend, route, fix)

    _enabled.append(watch(made))


def learns_prompts(peft_model: Any) -> bool:
    """Whether `apply` is for a PEFT model of this kind."""
    return bool(peft_model.peft_config[peft_model.active_adapter].is_prompt_learning)


def apply_automatically(peft_model: Any, backend: str, route: str, fix: bool) -> Patch:
    """`apply`, where nobody asked for it for this model: whoever does so later is served."""
    patch = apply(peft_model, backend, route, fix)
    patch.automatic = True
    return patch


def disable() -> None:
    """Undo `enable`; models that are patched stay so. Without `enable` it does nothing."""
    while _enabled:
        _enabled.pop()()


def _check_versions() -> None:
    """Refuse versions of which nothing is known."""
    import peft
    import transformers

    for library in (peft, transformers):
        first, beyond = _SUPPORTED[library.__name__]
        numbers = tuple(map(int, re.findall(r"\d+", library.__version__)[:2]))
        if not first <= numbers < beyond:
            raise RuntimeError(
                f"fusedprompt.apply: expected {library.__name__} >= {first[0]}.{first[1]} and "
                f"< {beyond[0]}.{beyond[1]}, got {library.__version__}; the model is as it was"
            )
