"""The patch on a PEFT model: methods that serve what they know, and call PEFT's own for the rest."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.state import evaluating
from ..methods import method_of
from ..methods.method import CACHE
from ..ops import explain
from ..ops._backend import BackendUnavailable, using
from ..routes.attention import cache_to_read, in_place_later
from ..routes.call import SHARED, SPLICE, Call
from ..routes.choice import RouteUnavailable, why_not_model
from ..routes.plan import plan
from ..routes.prefix import check_served, filled, prefix_states
from ..routes.run import run
from .calls import TASKS, PeftTask, bind, has_tasks, run_as_ours, run_as_peft, why_not_call
from .encoders import encode, prompt_rows, why_not_adapter
from .prefill import generating, prepare, without_prompt
from .record import PATCH, Record, record_on
from .report import operations, report

_REPLICATE = "_replicate_for_data_parallel"


class Patch(Record):
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
        super().__init__(model, backend, route, fix, *_task_of(model))
        self._class: Any = type(model)
        # PEFT's `generate` swaps a method of the base model as long as it runs.
        self._generating = threading.RLock()

    def report(self) -> str:
        """Each adapter with its ops, backends and route; what is left alone, and why; PEFT's defects."""
        return report(self)

    __str__ = report

    def revert(self) -> None:
        """Give the instance back as it was. A second call does nothing.

        If another library has wrapped a replaced method meanwhile, its wrapper stays, and calls PEFT's method. `apply`
        serves such a model again.
        """
        if not self.active:
            return
        for name in (PATCH, _REPLICATE):
            self.model.__dict__.pop(name, None)
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
        patch = Patch.__new__(Patch)
        memo[id(self)] = patch
        self._copy_to(patch, copy.deepcopy(self.model, memo))
        patch.replaced = copy.deepcopy(self.replaced, memo)
        patch.refused, patch.spliced = set(self.refused), set(self.spliced)
        patch.generated_alone = set(self.generated_alone)
        return patch

    def _copy_to(self, patch: Patch, model: Any) -> None:
        patch.__init__(model, self.backend, self.route, self.fix)  # type: ignore[misc]
        patch.task, patch.left_alone, patch.automatic = self.task, dict(self.left_alone), self.automatic
        patch.host.task = self.host.task

    def _serve_replica(self, replica: Any) -> None:
        """A patch of its own for a replica, which has the model's `__dict__`, methods that are bound to it included."""
        patch = Patch.__new__(Patch)
        self._copy_to(patch, replica)
        patch.replaced = {name: _rebound(before, self.model, replica) for name, before in self.replaced.items()}
        patch.refused, patch.spliced, patch.generated_alone = self.refused, self.spliced, self.generated_alone
        replica.__dict__[PATCH] = patch
        for name in patch.replaced:
            replica.__dict__[name] = _rebound(replica.__dict__.get(name), self.model, replica)

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
            if self.host.prompts[name].in_cache:
                if self.route == SPLICE:
                    raise RouteUnavailable(f"adapter {name!r} is keys and values of every layer", SPLICE)
                continue
            if self.route == SHARED:
                objection = why_not_model(self.host, name)
                if objection is not None:
                    raise RouteUnavailable(objection)

    def _install(self) -> None:
        task = None if self.task is None else self.task.task
        shares = task is not None and task.predicts_next and not self.fix and _generates_as_peft(self.model)
        names = {
            "forward": task is not None,
            "get_prompt": True,
            "get_prompt_embedding_to_save": True,
            "generate": hasattr(type(self.model), "generate"),
            "load_adapter": self.fix,
            "prepare_inputs_for_generation": shares,
        }
        if any(why_not_adapter(config) is None for config in self.model.peft_config.values()):
            self.replaced = {name: vars(self.model).get(name) for name, wanted in names.items() if wanted}
        self.model.__dict__[PATCH] = self
        for name, before in self.replaced.items():
            if _calls(before, _override(self._class, name)):  # a patch before this one left it inside of a wrapper
                self.replaced[name] = None
            else:
                self.model.__dict__[name] = types.MethodType(_override(self._class, name), self.model)
        if self.replaced:
            self.model.__dict__[_REPLICATE] = types.MethodType(_replicate_for_data_parallel, self.model)

    # The methods

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        task, given = self.task, bind(original.__func__, args, kwargs)  # type: ignore[attr-defined]
        assert task is not None
        if given is None:
            return original(*args, **kwargs)
        fixes = self.fix and why_not_adapter(self.model.active_peft_config) is None
        if fixes or "adapter_names" in given or "shared_prefix" in given:
            return run_as_ours(self.host, given)
        reason = why_not_call(self.model, task, given)
        if reason is not None:
            if not torch.compiler.is_compiling():
                self.refused.add(reason)
            return original(*args, **kwargs)
        return run_as_peft(self.host, task, given, self.spliced)

    def get_prompt(self, original: Callable[..., Any], batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if why_not_adapter(self.model.active_peft_config) is not None:
            return original(batch_size, *args, **kwargs)
        prompt = self.host.prompts[self.model.active_adapter]
        if prompt.in_cache:
            check_served(self.host, (prompt,), self.route, as_peft=True)
            states = prefix_states(self.host, (prompt,))
            return filled(self.host, cache_to_read(self.host, states, prompt.rows, batch_size))
        if without_prompt(self):
            table = next(self.model.prompt_encoder[self.model.active_adapter].embedding.parameters())
            return table.new_empty(batch_size, 0, self.model.active_peft_config.token_dim)
        if method_of(self.model.active_peft_config).num_tasks is not None:
            return original(batch_size, *args, **kwargs)
        with using(self.backend):
            return prompt_rows(self.model).repeat(batch_size, 1, 1)

    def get_prompt_embedding_to_save(self, original: Callable[..., Any], adapter_name: str) -> Tensor:
        config, encoder = self.model.peft_config[adapter_name], self.model.prompt_encoder[adapter_name]
        method = None if why_not_adapter(config) is not None else method_of(config)
        if method is None or method.product == CACHE or method.num_tasks is not None:
            result: Tensor = original(adapter_name)
            return result
        indices = self.model.prompt_tokens[adapter_name].unsqueeze(0)
        with using(self.backend), evaluating(encoder) if self.fix else contextlib.nullcontext():
            rows = encode(encoder, config, indices.to(next(encoder.embedding.parameters()).device))
        return rows.detach().cpu()

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        disabled = getattr(vars(self.model).get("forward"), "__self__", self.model) is self.model.base_model
        ours = any(kwargs.get(name) is not None for name in ("adapter_names", "shared_prefix"))
        mixed = not disabled and ours
        alone = not mixed and (disabled or why_not_adapter(self.model.active_peft_config) is not None)
        # A prefix comes from `get_prompt`, in every way in which PEFT generates.
        in_cache = not alone and not mixed and self.host.prompts[self.host.in_use].in_cache and not self.fix
        with self._generating:
            if in_cache:
                with in_place_later(self.host):
                    return original(*args, **kwargs)
            if alone or not (mixed or self.fix or "prepare_inputs_for_generation" in self.replaced):
                return original(*args, **kwargs)
            if not (mixed or self.fix):
                with generating(self, kwargs):
                    return original(*args, **kwargs)
            if not has_tasks(self.model):
                kwargs.pop("task_ids", None)
            inputs = args[0] if args else kwargs.pop("inputs", None)
            if "generation_config" in vars(self.model):  # as PEFT does
                self.model.base_model.generation_config = self.model.generation_config
            with torch.no_grad():
                return run(self.host, plan(self.host, Call.to_generate(inputs, kwargs, self.route)))

    def prepare_inputs_for_generation(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return prepare(self, original, args, kwargs)

    def load_adapter(self, original: Callable[..., Any], model_id: Any, adapter_name: str, **kwargs: Any) -> Any:
        config = self.model.peft_config.get(adapter_name)
        trained = config is not None and not config.inference_mode and why_not_adapter(config) is None
        result = original(model_id, adapter_name, **kwargs)
        if trained and method_of(config).keeps_encoder(config):
            config.inference_mode = True  # PEFT's word for: the table is the prompt
        return result


@functools.cache
def _override(model_class: Any, name: str) -> Any:
    """A method that asks the instance's patch. Without one, as in a copy that was pickled, it is the class's."""
    original = getattr(model_class, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = record_on(self)
        if patch is None:
            return original(self, *args, **kwargs)
        bound = patch.replaced[name] or types.MethodType(original, self)
        return getattr(patch, name)(bound, *args, **kwargs)

    return method


def _calls(method: Any, function: Any) -> bool:
    """Whether a method is this function, or a wrapper around it."""
    while method is not None:
        method = getattr(method, "__func__", method)
        if method is function:
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def _rebound(method: Any, model: Any, replica: Any) -> Any:
    bound = getattr(method, "__self__", None) is model
    return types.MethodType(method.__func__, replica) if bound else method


def _replicate_for_data_parallel(model: Any) -> Any:
    """DataParallel's copy of a patched model."""
    patch, replica = record_on(model), type(model)._replicate_for_data_parallel(model)
    replica.__dict__.pop(_REPLICATE, None)
    if patch is not None:
        patch._serve_replica(replica)
    return replica


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


def _task_of(model: Any) -> tuple[PeftTask | None, dict[str, str]]:
    """How PEFT's forward of this class works; or why it is left alone."""
    import peft

    for name, task in TASKS.items():
        known = getattr(peft, name)
        if isinstance(model, known):
            if type(model).forward is not known.forward:
                return None, {"forward": f"{type(model).__name__} has a forward of its own"}
            placed = vars(model).get("forward")
            kind: Any = type(model)
            ours = _calls(placed, _override(kind, "forward"))
            if placed is not None and not ours and getattr(placed, "__func__", None) is not known.forward:
                return None, {"forward": "another library has wrapped it; call apply before that"}
            return task, {}
    return None, {"forward": f"{type(model).__name__} has no task"}
