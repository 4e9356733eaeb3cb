"""`apply`: a live PEFT model on this package's ops and routes, reversibly; `enable` does so for every new one.

Only the instance changes: methods of the same name are put into its `__dict__`, where they hide the class's. Each
serves what it knows to give PEFT's result, and calls PEFT's own method for the rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from ..ops._backend import AUTO, checked_name
from ..routes.choice import checked_route
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
    config = peft_model.peft_config[peft_model.active_adapter]
    if not config.is_prompt_learning:
        raise ValueError(f"peft_model: expected prompt learning, got {config.peft_type.value}")
    if patch_of(peft_model) is not None:
        raise ValueError(
            "peft_model: expected a model that is not patched; revert first: patch.revert(), or "
            "fusedprompt.integrations.peft.patch_of(peft_model).revert()"
        )
    checked_name("backend", backend)
    checked_route(route)
    patch = Patch(peft_model, backend, route, fix)
    patch._check_requests()
    patch._install()
    return patch


def patch_of(peft_model: Any) -> Patch | None:
    """The patch on a PEFT model, or None. A deep copy of a patched model has a patch of its own."""
    patch: Patch | None = record_on(peft_model)
    return patch


_enabled: list[Callable[[], None]] = []  # what undoes `enable`


def enable(backend: str = AUTO, route: str = AUTO, fix: bool = False) -> None:
    """Apply to every model with prompt learning that `get_peft_model` and `PeftModel.from_pretrained` make from now on.

    For scripts that cannot be edited. A script that says `from peft import get_peft_model` must do so after this call.

    Args and errors are those of `apply`; and ValueError, if it is enabled already.
    """
    _check_versions()
    import peft

    if _enabled:
        raise ValueError("enable: expected it not to be enabled already; call disable() first")
    checked_name("backend", backend)
    checked_route(route)
    plain, loader = peft.get_peft_model, vars(peft.PeftModel)["from_pretrained"]

    def patched(model: Any) -> Any:
        if isinstance(model, peft.PeftModel) and patch_of(model) is None:
            config = model.peft_config[model.active_adapter]
            if config.is_prompt_learning:
                apply(model, backend, route, fix)
        return model

    @functools.wraps(plain)
    def get_peft_model(*args: Any, **kwargs: Any) -> Any:
        return patched(plain(*args, **kwargs))

    @functools.wraps(loader.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return patched(loader.__func__(cls, *args, **kwargs))

    places = [module for module in (peft, peft.mapping_func) if module.get_peft_model is plain]
    for module in places:
        module.get_peft_model = get_peft_model
    peft.PeftModel.from_pretrained = classmethod(from_pretrained)

    def undo() -> None:
        for module in places:
            module.get_peft_model = plain
        peft.PeftModel.from_pretrained = loader

    _enabled.append(undo)


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
