"""`generate` on the shared route: the prompt is in the cache before the first step, which computes the text alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers

import fusedprompt
from models import EOS, PAD, build, ours, pad, tokens

FAMILIES = ("GPT2", "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "OPT", "GPTNeoX", "Phi", "Falcon", "Bloom")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
ROWS = 4


def prefilled(model: Any, **given: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """What is generated, and the tokens of each pass through the first layer after the prompt's own."""
    model.prompt_cache.clear()
    layer = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    seen: list[tuple[int, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    output = model.generate(**given)
    hook.remove()
    if given.get("route") != "splice":
        assert seen.pop(0) == (1, ROWS)
    return output, seen


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sequences_equal_splices_from_the_texts_own_prefill(family: str, left: int) -> None:
    model = ours(family, method="MLP", **({"alibi": True} if family == "Falcon" else {}))
    ids, mask = pad(tokens(), left, 0)
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    found, seen = prefilled(model, **given, route="shared")
    assert torch.equal(found, model.generate(**given, route="splice"))
    assert seen[0] == (3, 7 + left) and set(seen[1:]) == {(3, 1)}


def test_auto_shares_and_the_second_call_needs_no_prompt() -> None:
    model = ours("Llama", method="MLP")
    _, seen = prefilled(model, input_ids=tokens(), **GREEDY)
    assert seen[0] == (3, 7) and len(model.prompt_cache) == 1


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several of one": {"num_beams": 2, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
    "configured": {"generation_config": {"max_new_tokens": 5, "num_beams": 2}},
    "configured static": {"generation_config": {"max_new_tokens": 5, "cache_implementation": "static"}},
    "long": {"max_new_tokens": 30},
}


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_every_mode_equals_splice(options: dict[str, Any], left: int) -> None:
    model = ours("Llama", method="MLP")
    ids, mask = pad(tokens(), left, 0)
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY, **options}
    if "generation_config" in options:
        config = transformers.GenerationConfig(**options["generation_config"], pad_token_id=PAD, eos_token_id=EOS)
        given = {"input_ids": ids, "attention_mask": mask, "generation_config": config, "disable_compile": True}
        before = config.to_dict()
    torch.manual_seed(3)
    found, seen = prefilled(model, **given, route="shared")
    torch.manual_seed(3)
    assert torch.equal(found, model.generate(**given, route="splice"))
    assert seen[0][1] == 7 + left
    if "generation_config" in options:
        assert config.to_dict() == before


@pytest.mark.parametrize("family", ["GPT2", "Gemma2", "Mistral"])
def test_a_static_cache_is_filled_in_every_kind_of_layer(family: str) -> None:
    model = ours(family, method="MLP")
    given = {"input_ids": tokens(), **GREEDY, "cache_implementation": "static", "disable_compile": True}
    output, seen = prefilled(model, **given, return_dict_in_generate=True, route="shared")
    assert seen[0] == (3, 7) and isinstance(output.past_key_values, transformers.StaticCache)
    assert torch.equal(output.sequences, model.generate(**given, route="splice"))


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_assisted_decoding_prefills_the_text_alone(family: str, kind: str, left: int) -> None:
    model = ours(family, method="MLP")
    ids, mask = pad(tokens(1).repeat(1, 2), left, 0)
    options = {"prompt_lookup_num_tokens": 2} if kind == "prompt lookup" else {"assistant_model": build(family, seed=4)}
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    found, seen = prefilled(model, **given, **options, route="shared")
    assert torch.equal(found, model.generate(**given, route="splice"))
    assert seen[0][1] in range(14 + left, 14 + left + 6)  # and the first candidates
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("routes", [("shared", "shared"), ("shared", "splice"), ("splice", "shared")], ids="-".join)
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
def test_a_returned_cache_continues_on_any_route(family: str, left: int, routes: tuple[str, str]) -> None:
    """The whole conversation, its new turn alone, and `forward`: whatever the route that the cache came from."""
    model = ours(family, method="MLP").double()
    ids, mask = pad(tokens(), left, 0)
    model.route = routes[0]
    first = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY, eos_token_id=None
    )
    model.route = routes[1]
    turn = tokens(3, 2, seed=9)
    conversation = torch.cat((first.sequences, turn), 1)
    whole = torch.cat((mask, torch.ones(3, conversation.shape[1] - mask.shape[1], dtype=torch.long)), 1)
    expected = model.generate(input_ids=conversation, attention_mask=whole, **GREEDY)
    cached = conversation.shape[1] + ROWS - first.past_key_values.get_seq_length()
    new = conversation[:, -cached:]
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.base_model.config)
        step = model(input_ids=new, attention_mask=whole, past_key_values=_copy(first.past_key_values, cache))
        torch.testing.assert_close(
            step.logits[:, -1], model(input_ids=conversation, attention_mask=whole).logits[:, -1], rtol=1e-6, atol=1e-9
        )
    if int(transformers.__version__.split(".")[0]) >= 5:  # before, generate slices new tokens as if they were all
        by_turn = model.generate(
            input_ids=new, attention_mask=whole, past_key_values=_copy(first.past_key_values, cache), **GREEDY
        )
        assert torch.equal(by_turn[:, new.shape[1] :], expected[:, conversation.shape[1] :])
    continued = model.generate(
        input_ids=conversation, attention_mask=whole, past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(continued, expected)


def _copy(cache: Any, like: Any) -> Any:
    import copy

    assert type(cache) is type(like)
    return copy.deepcopy(cache)


def test_a_forward_passes_cache_continues_too() -> None:
    model = ours("Llama", method="MLP", rows=20).double()
    rows = [pad(tokens(1, length, seed=length), 9 - length, 0) for length in (9, 6, 4, 7)]
    ids, mask = (torch.cat(parts) for parts in zip(*rows))
    more = tokens(4, 2, seed=5)
    whole = torch.cat((mask, torch.ones_like(more)), 1)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, route="shared")
        second = model(input_ids=more, attention_mask=whole, past_key_values=first.past_key_values)
        expected = model(input_ids=torch.cat((ids, more), 1), attention_mask=whole, route="splice")
    torch.testing.assert_close(second.logits, expected.logits[:, -2:], rtol=1e-6, atol=1e-9)


def test_generating_from_embeddings_returns_the_new_tokens() -> None:
    model = ours("Llama")
    embeds = model.get_input_embeddings()(tokens())
    found, seen = prefilled(model, inputs_embeds=embeds, **GREEDY, route="shared")
    assert torch.equal(found, model.generate(inputs_embeds=embeds, **GREEDY, route="splice")) and seen[0] == (3, 7)


REASONS: dict[str, dict[str, Any]] = {
    "the caller's own cache": {"past_key_values": "empty"},
    "the cache of kind 'offloaded'": {"cache_implementation": "offloaded"},
    "output_hidden_states covers": {"output_hidden_states": True, "return_dict_in_generate": True},
    "do not fit into the base model's window of 20": {"max_new_tokens": 10},
    "position_ids": {"position_ids": torch.arange(7).repeat(3, 1)},
}


@pytest.mark.parametrize(("reason", "options"), REASONS.items(), ids=REASONS.keys())
def test_what_the_route_cannot_do_is_spliced_or_refused_with_the_reason(reason: str, options: dict[str, Any]) -> None:
    model = ours("Mistral", sliding_window=20)
    options = {**options, **({"past_key_values": transformers.DynamicCache()} if "past_key_values" in options else {})}
    given = {"input_ids": tokens(), **GREEDY, **options}
    with pytest.raises(fusedprompt.BackendUnavailable, match=reason):
        model.generate(**given, route="shared")
    if options.get("cache_implementation") == "offloaded":
        return  # it needs CUDA
    output = model.generate(**given)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    assert torch.equal(sequences[:, :7], tokens()) and len(model.prompt_cache) == 0


def test_another_thread_may_meet_a_hook_before_torch_knows_that_it_takes_keywords() -> None:
    """torch first registers a hook before a forward and then marks it; it takes both away in this order too."""
    model, ids = ours("Llama", method="MLP"), tokens(1).repeat(1, 2)
    base, found, seen = model.base_model, [], set()
    expected = base(input_ids=ids).logits
    call = base._call_impl

    def other() -> None:
        found.append(call(input_ids=ids).logits)

    def halfway(*args: Any, **kwargs: Any) -> Any:
        seen.update(hook.__qualname__ for hook in base._forward_pre_hooks.values())
        marked = dict(base._forward_pre_hooks_with_kwargs)
        base._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        base._forward_pre_hooks_with_kwargs.update(marked)
        return call(*args, **kwargs)

    base._call_impl = halfway
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, **options)
    assert any("tell" in name for name in seen) and any("embed_prompt" in name for name in seen)
    assert len(found) >= 2 and all(torch.equal(logits, expected) for logits in found)


def test_assisted_decoding_in_one_thread_leaves_the_others_alone() -> None:
    model = ours("Llama", method="MLP")
    ids = tokens(1).repeat(1, 2)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    found: list[torch.Tensor] = []

    def work(more: dict[str, Any]) -> None:
        for _ in range(4):
            found.append(model.generate(input_ids=ids, **options, **more))

    threads = [threading.Thread(target=work, args=(more,)) for more in ({}, {"prompt_lookup_num_tokens": 2}) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and all(torch.equal(sequence, expected) for sequence in found)
