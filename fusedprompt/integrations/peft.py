"""`apply`: a live PEFT model on this package's ops and routes, reversibly; `enable` does so for every new one.

Only the instance changes: methods of the same name are put into its `__dict__`, where they hide the class's. Each
serves what it knows to give PEFT's result, and calls PEFT's own method for the rest.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import generation
from ..ops import explain
from ..ops._backend import AUTO, NAMES, BackendUnavailable
from ..sharing import SHARED, checked_route, why_not_model
from . import mixed
from .calls import TASKS, Task, bind, run, run_fixed, why_not_call
from .encoders import encode, prompt_rows, using, why_not_adapter
from .prefill import generating, prepare, without_prompt
from .report import operations, report
from .view import PeftView

if TYPE_CHECKING:
    from ..model import PromptModel

_PATCH = "_fusedprompt_patch"
# The versions whose code was read and is tested: the first and the first that is too new.
_SUPPORTED = {"peft": ((0, 17), (0, 22)), "transformers": ((4, 57), (6, 0))}


def apply(peft_model: Any, backend: str = AUTO, route: str = AUTO, fix: bool = False) -> Patch:
    """Run a PEFT model's prompt learning (P-tuning, prompt tuning, CPT) on this package's ops and routes.

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
    check_names(backend, route)
    patch = Patch(peft_model, backend, route, fix)
    patch._check_requests()
    patch._install()
    return patch


def patch_of(peft_model: Any) -> Patch | None:
    """The patch on a PEFT model, or None. A deep copy of a patched model has a patch of its own."""
    patch: Patch | None = vars(peft_model).get(_PATCH)
    return patch


class Patch:
    """What `apply` did to a PEFT model.

    Attributes:
        model: the PEFT model.
        backend, route, fix: as given to `apply`.
        replaced: the methods that are replaced, by name.
        left_alone: methods that are not, with the reason.
        refused: why calls so far went to PEFT's own method.
        spliced: why calls so far did not share the prompt, though it would have paid.
        generated_alone: why calls of generate so far ran without a shared prompt.
    """

    def __init__(self, model: Any, backend: str, route: str, fix: bool) -> None:
        self.model, self.backend, self.route, self.fix = model, backend, route, fix
        self.view: PromptModel = PeftView.of(model, backend, route)
        self.task, self.left_alone = _task_of(model)
        self.replaced: dict[str, Any] = {}
        self.refused: set[str] = set()
        self.spliced: set[str] = set()
        self.generated_alone: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether the model is patched still."""
        return patch_of(self.model) is self

    @property
    def _class(self) -> Any:
        return type(self.model)

    def report(self) -> str:
        """Each adapter with its ops, backends and route; what is left alone, and why; PEFT's defects."""
        return report(self)

    __str__ = report

    def revert(self) -> None:
        """Give the instance back as it was. A second call does nothing.

        If another library has wrapped a replaced method meanwhile, its wrapper stays, and calls PEFT's method.
        """
        if not self.active:
            return
        del self.model.__dict__[_PATCH]
        for name, before in self.replaced.items():
            if getattr(vars(self.model).get(name), "__func__", None) is not _override(self._class, name):
                continue
            del self.model.__dict__[name]
            if before is not None:
                self.model.__dict__[name] = before

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.revert()

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        import copy

        patch = Patch.__new__(Patch)
        memo[id(self)] = patch
        model = copy.deepcopy(self.model, memo)
        patch.model, patch.backend, patch.route, patch.fix = model, self.backend, self.route, self.fix
        patch.view = PeftView.of(model, self.backend, self.route)
        patch.task, patch.left_alone = self.task, dict(self.left_alone)
        patch.replaced = copy.deepcopy(self.replaced, memo)
        patch.refused, patch.spliced = set(self.refused), set(self.spliced)
        patch.generated_alone = set(self.generated_alone)
        return patch

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model is PEFT's own when it comes back: a patch depends on what is installed there."""
        return _no_patch, ()

    def _check_requests(self) -> None:
        for name, config in self.model.peft_config.items():
            if why_not_adapter(config) is not None:
                continue
            weight = self.model.prompt_encoder[name].embedding.weight
            for op in operations(self, name):
                reason = explain(op, weight).get(self.backend, "runs")
                if reason != "runs":
                    raise BackendUnavailable(f"backend '{self.backend}' of op '{op}' cannot run: it {reason}")
            if self.route == SHARED:
                objection = why_not_model(self.view, name)
                if objection is not None:
                    raise BackendUnavailable(f"route 'shared' cannot run: {objection}")

    def _install(self) -> None:
        served = any(why_not_adapter(config) is None for config in self.model.peft_config.values())
        names = ["get_prompt", "get_prompt_embedding_to_save"]
        if self.task is not None:
            names.insert(0, "forward")
        if hasattr(type(self.model), "generate"):
            names.append("generate")
        if self.fix:
            names.append("load_adapter")
        elif self.task is not None and self.task.generates and _generates_as_peft(self.model):
            names.append("prepare_inputs_for_generation")
        for name in names if served else ():
            self.replaced[name] = vars(self.model).get(name)
        self.model.__dict__[_PATCH] = self
        for name in self.replaced:
            self.model.__dict__[name] = types.MethodType(_override(self._class, name), self.model)

    # The methods

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        task, given = self.task, bind(original.__func__, args, kwargs)  # type: ignore[attr-defined]
        assert task is not None
        if given is None:
            return original(*args, **kwargs)
        if "adapter_names" in given:
            return mixed.forward(self.view, given)
        if self.fix and why_not_adapter(self.model.active_peft_config) is None:
            return run_fixed(self.view, task, given)
        reason = why_not_call(self.model, task, given)
        if reason is not None:
            if not torch.compiler.is_compiling():
                self.refused.add(reason)
            return original(*args, **kwargs)
        return run(self.model, self.view, task, self.backend, given, self.spliced)

    def get_prompt(self, original: Callable[..., Any], batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if why_not_adapter(self.model.active_peft_config) is not None:
            return original(batch_size, *args, **kwargs)
        if without_prompt(self):
            table = next(self.model.prompt_encoder[self.model.active_adapter].embedding.parameters())
            return table.new_empty(batch_size, 0, self.model.active_peft_config.token_dim)
        with using(self.backend):
            return prompt_rows(self.model).repeat(batch_size, 1, 1)

    def get_prompt_embedding_to_save(self, original: Callable[..., Any], adapter_name: str) -> Tensor:
        config, encoder = self.model.peft_config[adapter_name], self.model.prompt_encoder[adapter_name]
        if why_not_adapter(config) is not None:
            result: Tensor = original(adapter_name)
            return result
        indices = self.model.prompt_tokens[adapter_name].unsqueeze(0)
        with using(self.backend), _evaluating(encoder) if self.fix else contextlib.nullcontext():
            rows = encode(encoder, config, indices.to(next(encoder.embedding.parameters()).device))
        return rows[0].detach().cpu()

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        disabled = getattr(vars(self.model).get("forward"), "__self__", self.model) is self.model.base_model
        if not disabled and kwargs.get("adapter_names") is not None:
            return mixed.generate(self.view, args, kwargs)
        if disabled or why_not_adapter(self.model.active_peft_config) is not None:
            return original(*args, **kwargs)
        if not self.fix:
            if "prepare_inputs_for_generation" not in self.replaced:
                return original(*args, **kwargs)
            with generating(self, kwargs):
                return original(*args, **kwargs)
        kwargs.pop("task_ids", None)
        with torch.no_grad():
            return generation.generate(self.view, args[0] if args else kwargs.pop("inputs", None), self.route, **kwargs)

    def prepare_inputs_for_generation(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return prepare(self, original, args, kwargs)

    def load_adapter(self, original: Callable[..., Any], model_id: Any, adapter_name: str, **kwargs: Any) -> Any:
        config = self.model.peft_config.get(adapter_name)
        trained = config is not None and not config.inference_mode and why_not_adapter(config) is None
        result = original(model_id, adapter_name, **kwargs)
        if trained and str(getattr(config.peft_type, "value", config.peft_type)) in ("P_TUNING", "CPT"):
            config.inference_mode = True  # PEFT's word for: the table is the prompt
        return result


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@functools.cache
def _override(model_class: Any, name: str) -> Any:
    """A method that asks the instance's patch. Without one, as in a copy that was pickled, it is the class's."""
    original = getattr(model_class, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = patch_of(self)
        if patch is None:
            return original(self, *args, **kwargs)
        bound = patch.replaced[name] or types.MethodType(original, self)
        return getattr(patch, name)(bound, *args, **kwargs)

    return method


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
    check_names(backend, route)
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


def check_names(backend: str, route: str) -> None:
    """Refuse names that no op and no route has."""
    if backend not in (AUTO, *NAMES):
        raise ValueError(f"backend: expected one of {(AUTO, *NAMES)}, got {backend!r}")
    checked_route(route)


def _no_patch() -> None:
    return None


def _generates_as_peft(model: Any) -> bool:
    import peft

    names, own = ("generate", "prepare_inputs_for_generation"), peft.PeftModelForCausalLM
    return all(
        getattr(type(model), name) is getattr(own, name)
        and getattr(vars(model).get(name), "__func__", getattr(own, name)) is getattr(own, name)
        for name in names
    )


def _task_of(model: Any) -> tuple[Task | None, dict[str, str]]:
    """How PEFT's forward of this class works; or why it is left alone."""
    import peft

    for name, task in TASKS.items():
        known = getattr(peft, name)
        if isinstance(model, known):
            if type(model).forward is not known.forward:
                return None, {"forward": f"{type(model).__name__} has a forward of its own"}
            placed = vars(model).get("forward")
            if placed is not None and getattr(placed, "__func__", None) is not known.forward:
                return None, {"forward": "another library has wrapped it; call apply before that"}
            return task, {}
    return None, {"forward": f"{type(model).__name__} has no task"}


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
