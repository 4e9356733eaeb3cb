"""Text that every row of a call begins with, beside its prompt: rows of the prompt, as far as routes can tell."""

from __future__ import annotations

from collections.abc import Mapping

from ..base.facts import device_of
from ..layouts.mixture import BASE
from ..layouts.prompt import Prompt
from ..layouts.shared_text import BEFORE, SharedText
from ..methods import find_method
from .call import Call, refuse
from .host import Host
from .prefix_text import why_not_behind


def prompts_of_call(host: Host, call: Call) -> Mapping[str, Prompt]:
    """The prompts of a host, with the text of the call beside each; and where there is text, that alone as BASE's.

    Raises:
        TypeError, ValueError: the text is none, or cannot stand beside the call's prompts.
    """
    if call.shared_prefix is None:
        return host.prompts
    text = SharedText.of(call.shared_prefix, call.shared_prefix_place, device_of(host.word_embeddings))
    case = "with shared_prefix, which stands in front of all text"
    refuse("slots", call.slots, case)
    refuse("fields", None if call.fields is None else sorted(call.fields), case)
    if host.facts.needs_ids or host.facts.placeholder is not None:
        refuse("shared_prefix", call.shared_prefix, "for a base model that needs ids of all text in every row")
    names = call.adapter_names if isinstance(call.adapter_names, (list, tuple)) else [host.in_use]
    named = [host.prompts[name] for name in dict.fromkeys(names) if isinstance(name, str) and name in host.prompts]
    for prompt in named:
        objection = _why_not(host, prompt, call)
        if objection is not None:
            refuse("shared_prefix", call.shared_prefix, f"with adapter {prompt.name!r}, {objection}")
    # Rows without an adapter, beside rows with prefixes, read the text from the cache too.
    in_cache = call.adapter_names is not None and any(prompt.in_cache for prompt in named)
    alone = Prompt(BASE, "", (*named, *host.prompts.values())[0].task, 0, in_cache=in_cache)
    return {name: prompt.beside(text) for name, prompt in {**host.prompts, BASE: alone}.items()}


def _why_not(host: Host, prompt: Prompt, call: Call) -> str | None:
    method = find_method(prompt.method)
    if prompt.in_cache:
        return why_not_behind(host, prompt, call.shared_prefix_place == BEFORE)
    if prompt.pattern is not None or prompt.start:
        return "whose prompt does not all stand in front of the text"
    if method is not None and method.targets is not None and call.batch.labels is not None:
        return f"whose {prompt.method} weighs the loss of its own context"
    return None
