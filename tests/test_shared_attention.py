"""Attention of all rows to one prefix, in base models as they are: equal to keys that are joined in each row, and no
copies of the prefix."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedprompt
from fusedprompt.base import first_use
from fusedprompt.base.prefixed_cache import PrefixedLayer, prefixed_cache
from fusedprompt.base.reading import NotRead, reading
from fusedprompt.layouts.mixture import BASE
from fusedprompt.routes import attention, plan_generate, planner
from fusedprompt.routes.attention import attending
from models import build, ours, pad, task_inputs, tokens
from tolerance import one_thread  # noqa: F401

READ = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Cohere", "Phi", "Mixtral", "GPTNeoX", "GPT2", "OPT")
JOINED = ("Bloom", "Falcon")
ALWAYS, NEVER = (lambda rows, size: None), (lambda rows, size: "not now")


def put(monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    for place in (attention, planner, plan_generate):
        monkeypatch.setattr(place, "cost_rule", rule)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """These batches are small."""
    put(monkeypatch, ALWAYS)
    yield monkeypatch


def batch(task: str = "CAUSAL_LM", padding: str = "both") -> dict[str, Tensor]:
    """Rows of 7, 4 and 5 tokens, in 7 or 9 columns."""
    if padding == "none":
        return task_inputs(task, tokens(3, 7))
    left = {"both": (2, 0, 2), "left": (2, 5, 4), "right": (0, 0, 0)}[padding]
    rows = [pad(tokens(1, n, seed=n), before, 9 - n - before) for n, before in zip((7, 4, 5), left)]
    ids, mask = (torch.cat(parts) for parts in zip(*rows))
    return task_inputs(task, ids, mask)


def results(model: Any, real: Tensor | None, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    logits = output.logits
    if real is not None and logits.dim() == 3:
        logits = logits[:, -real.shape[1] :][real]
    return {"loss": output.loss, "logits": logits, **grads}


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor], most: float = 3e-6) -> None:
    assert found.keys() == right.keys() and len(found) > 2
    for name, value in right.items():
        scale = float(value.detach().abs().max()) + 1e-12
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=most * scale, msg=lambda said, at=name: f"{at}: {said}"
        )


def both(monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[Any, Any]:
    """What a function gives where prefixes are read in place, and where they are joined."""
    found = run()
    with monkeypatch.context() as joined:
        put(joined, NEVER)
        return found, run()


def says(model: Any, **inputs: Any) -> str:
    return next(line for line in model.explain(**inputs, route="shared").splitlines() if line.startswith("attention"))


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
@pytest.mark.parametrize("family", READ)
def test_families(family: str, padding: str, always: pytest.MonkeyPatch) -> None:
    """A whole training step."""
    model, inputs = ours(family, method="MLP"), batch(padding=padding)
    real = inputs["attention_mask"].bool()
    assert says(model, **inputs) == "attention: all rows read one prefix where it is"
    assert_equal(*both(always, lambda: results(model, real, **inputs, route="shared")))


@pytest.mark.parametrize("family", JOINED)
def test_what_does_not_ask_the_registry_is_found_out(family: str, always: pytest.MonkeyPatch) -> None:
    model, inputs = ours(family), batch()
    assert "its attention is not one of transformers' registry" in says(model, **inputs)
    assert_equal(*both(always, lambda: results(model, inputs["attention_mask"].bool(), **inputs, route="shared")))


@pytest.mark.parametrize("method", ["PROMPT", "LSTM", "MULTITASK", "CPT", "PREFIX", "PROJECTED", "CARTRIDGE"])
def test_methods(method: str, always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama", method=method), batch()
    tasks = {"task_ids": torch.tensor([2, 0, 1])} if method == "MULTITASK" else {}
    route = {} if method in ("PREFIX", "PROJECTED", "CARTRIDGE") else {"route": "shared"}
    assert "all rows read one" in model.explain(**inputs, **tasks, **route)
    real = inputs["attention_mask"].bool()
    assert_equal(*both(always, lambda: results(model, real, **inputs, **tasks, **route)))


@pytest.mark.parametrize("method", ["PROMPT", "PREFIX"])
def test_rows_of_several_adapters_and_of_none(method: str, always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama", method=method), batch()
    config = {"PROMPT": fusedprompt.PromptTuningConfig, "PREFIX": fusedprompt.PrefixTuningConfig}[method]
    model.add_adapter("longer", config(task_type="CAUSAL_LM", num_virtual_tokens=9))
    for names in (["longer", BASE, "default"], ["default", "longer", "longer"]):
        route = {} if method == "PREFIX" else {"route": "shared"}
        given = {**inputs, "adapter_names": names, **route}
        assert "all rows read one" in model.explain(**given)
        assert_equal(*both(always, lambda given=given: results(model, inputs["attention_mask"].bool(), **given)))


def test_a_classifier(always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama", "SEQ_CLS"), batch("SEQ_CLS")
    assert_equal(*both(always, lambda: results(model, None, **inputs, route="shared")))


def test_text_beside_the_prompt(always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama"), batch()
    real, given = inputs["attention_mask"].bool(), {"shared_prefix": tokens(1, 6, seed=9), "route": "shared"}
    assert_equal(*both(always, lambda: results(model, real, **inputs, **given)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama").to(dtype), batch(padding="none")
    most = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float64: 1e-6}[dtype]
    assert_equal(*both(always, lambda: results(model, None, **inputs, route="shared")), most)


def test_autocast(always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama", method="PREFIX"), batch(padding="none")

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return results(model, None, **inputs)

    assert_equal(*both(always, run), 0.05)


def test_eager_attention(always: pytest.MonkeyPatch) -> None:
    model, inputs = ours("Llama", attn_implementation="eager"), batch()
    assert "all rows read one" in says(model, **inputs)
    assert_equal(*both(always, lambda: results(model, inputs["attention_mask"].bool(), **inputs, route="shared")))


@pytest.mark.parametrize("method", ["PROMPT", "PREFIX"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 1, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
def test_generate(family: str, options: dict[str, Any], method: str, always: pytest.MonkeyPatch) -> None:
    model, inputs = ours(family, method=method), batch(padding="left")
    del inputs["labels"]
    given = {**inputs, "max_new_tokens": 6, "do_sample": False, **options}
    assert "all rows read one" in model.explain("generate", **given)

    def run() -> Any:
        torch.manual_seed(3)
        output = model.generate(**given)
        return output if isinstance(output, Tensor) else output.sequences

    assert torch.equal(*both(always, run))


def test_a_conversation_that_goes_on(always: pytest.MonkeyPatch) -> None:
    """By hand and by `generate`; the cache holds one prefix all the while."""
    model, ids, more = ours("Llama"), tokens(3, 5), tokens(3, 2, seed=4)

    def run() -> tuple[Tensor, Tensor]:
        first = model(ids, use_cache=True, route="shared")
        cache = first.past_key_values
        second = model(more, past_key_values=cache)
        if attention.cost_rule is ALWAYS:
            assert all(layer.prefix[0].shape[0] == 1 for layer in cache.layers)
            assert cache.get_seq_length() == 4 + 7 and cache.layers[0].keys.shape[2] == 11
        whole = torch.cat((ids, more), 1)
        third = model.generate(whole, past_key_values=cache, max_new_tokens=3, do_sample=False)
        return second.logits, third

    (found, tokens_found), (right, tokens_right) = both(always, run)
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)
    assert torch.equal(tokens_found, tokens_right)


def test_a_cache_that_leaves_is_an_ordinary_one() -> None:
    """The base model alone goes on with it, and so does whoever reads its tensors."""
    model, ids, more = ours("Llama"), tokens(3, 5), tokens(3, 2, seed=4)
    cache = model(ids, use_cache=True, route="shared").past_key_values
    found = model.base_model(more, past_key_values=cache)
    right = model(torch.cat((ids, more), 1), route="splice").logits[:, -2:]
    torch.testing.assert_close(found.logits, right, rtol=0, atol=2e-5)
    assert cache.layers[0].prefix is None and cache.layers[0].keys.shape == (3, 2, 11, 8)


def test_apply(always: pytest.MonkeyPatch) -> None:
    import peft

    for method in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(build("Llama"), method(task_type="CAUSAL_LM", num_virtual_tokens=12)).eval()
        inputs = batch(padding="right")
        real = inputs["attention_mask"].bool()
        right = results(theirs, real, **inputs)
        given = {"input_ids": inputs["input_ids"][:, :4], "max_new_tokens": 4, "do_sample": False}
        answer = theirs.generate(**given)
        fusedprompt.apply(theirs, route="shared" if method is peft.PromptTuningConfig else "auto")
        with Copies(12, 3) as copies:
            assert_equal(results(theirs, real, **inputs), right)
        assert copies.found == []
        with Copies(12, 3) as copies:
            assert torch.equal(theirs.generate(**given), answer)
        assert copies.found == []


def test_another_attention_goes_on_with_a_cache_that_was_read_in_place() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register("another", sdpa_attention_forward)
    AttentionMaskInterface.register("another", sdpa_mask)
    model, ids, more = ours("Llama"), tokens(3, 5), tokens(3, 2, seed=4)
    cache = model(ids, use_cache=True, route="shared").past_key_values
    model.base_model.set_attn_implementation("another")
    found = model(more, past_key_values=cache)
    right = model(torch.cat((ids, more), 1), route="splice").logits[:, -2:]
    torch.testing.assert_close(found.logits, right, rtol=0, atol=2e-5)


def test_a_cache_whose_prefix_is_not_read_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a call that is planned for ever."""
    model, ids = ours("Llama"), tokens(3, 5)
    cache = model(ids, use_cache=True, route="shared").past_key_values
    monkeypatch.setattr(attention, "_named", lambda configs: contextlib.nullcontext())
    with pytest.raises(NotRead, match="registry"):
        model(ids, past_key_values=cache)


# No copies


class Copies(TorchDispatchMode):
    """Operators whose result has, in each of `size` rows, keys or values of at least `rows` positions."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.rows, self.size, self.found = rows, size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) and not tensor._is_view() else ()
            if len(shape) == 4 and shape[0] == self.size and shape[2] > self.rows and shape[3] == 8:
                self.found.append((func.name(), shape))
        return result


@pytest.mark.parametrize("method", ["PROMPT", "PREFIX"])
def test_no_row_has_a_copy(method: str, always: pytest.MonkeyPatch) -> None:
    """Forward, backward, and steps of `generate`. Of text alone there are 7 positions at most, of the prompt 31."""
    model, inputs = ours("Llama", method=method, rows=31), batch(padding="none")
    route = {} if method == "PREFIX" else {"route": "shared"}
    model(**inputs, **route)  # the first use

    def run() -> list[Any]:
        with Copies(31, 3) as copies:
            model(**inputs, **route).loss.backward()
            model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
        return copies.found

    found, joined = both(always, run)
    assert found == [] and len(joined) > 8


def test_the_gradient_is_one_tensor() -> None:
    """Of the prefix's keys in a layer: (2 L, 1, heads, N, width) in all, and none for each row."""
    model, inputs = ours("Llama", method="PREFIX", rows=31), batch(padding="none")
    model(**inputs)
    with Copies(30, 3) as copies:
        model(**inputs).loss.backward()
    assert copies.found == []


# Settings


def settings(model: Any) -> list[str]:
    return [config._attn_implementation for config in model._state.configs()]


def test_the_configuration_is_as_it_was_after_a_call_and_after_an_error() -> None:
    model, inputs = ours("Llama"), batch()
    before = settings(model)
    seen: list[str] = []
    hook = model.base_model.model.layers[0].register_forward_pre_hook(
        lambda layer, _: seen.append(layer.self_attn.config._attn_implementation)
    )
    model(**inputs, route="shared")
    assert "fusedprompt_sdpa" in seen and settings(model) == before
    hook.remove()

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of somebody's hook")

    hook = model.base_model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="somebody's hook"):
        model(**inputs, route="shared")
    assert settings(model) == before and not attention._in_use
    hook.remove()


def test_threads() -> None:
    """Some through prompts, some through the base model alone: each as if it were alone."""
    model, ids = ours("Llama"), tokens(3, 7)
    with torch.no_grad():
        jobs = {
            "prompt": lambda: model(ids, route="shared").logits,
            "base": lambda: model.base_model(ids).logits,
            "generate": lambda: model.generate(ids, max_new_tokens=4, do_sample=False),
            "splice": lambda: model(ids, route="splice").logits,
        }
        right = {name: job() for name, job in jobs.items()}
    wrong: list[str] = []

    def run(name: str) -> None:
        with torch.no_grad():
            for _ in range(25):
                found = jobs[name]()
                if not torch.allclose(found.float(), right[name].float(), atol=2e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in jobs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and settings(model)[0] == "sdpa" and not attention._in_use


def test_other_attentions_keep_their_own() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    transformers.AttentionInterface.register("somebody_s", sdpa_attention_forward)
    AttentionMaskInterface.register("somebody_s", sdpa_mask)
    model = ours("Llama")
    model.base_model.set_attn_implementation("somebody_s")
    assert "the base model's attention is 'somebody_s'" in says(model, input_ids=tokens())
    model(tokens(), route="shared")


def test_what_a_call_asks_for_otherwise() -> None:
    model, inputs = ours("Llama", method="PREFIX"), batch()
    model.base_model.set_attn_implementation("eager")
    assert len(model(**inputs, output_attentions=True).attentions) == 2
    said = model.explain("generate", input_ids=tokens(), cache_implementation="static", max_new_tokens=4)
    assert "a static cache holds it" in said
    model.train()
    model.base_model.config.attention_dropout = 0.1
    assert "training mode with" in model.explain(**inputs)


def test_a_window_that_would_cut_the_prefix() -> None:
    model = ours("Mistral", method="PREFIX", sliding_window=8)
    assert "11 positions are more than the window of 8" in model.explain(input_ids=tokens())


def test_the_first_use_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDPROMPT_FIRST_USE", "0")
    assert "it was not tried" in says(ours("Llama", hidden_size=48), input_ids=tokens())


def test_an_attention_that_turns_away_later_is_served_all_the_same(always: pytest.MonkeyPatch) -> None:
    """It read the prefix on first use; now somebody has put another in."""
    model, inputs = ours("Llama"), batch()
    right = model(**inputs, route="shared").loss
    layer = model.base_model.model.layers[1].self_attn
    own = type(layer).forward

    class Turned(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            class Changing:
                def update(self, keys: Tensor, values: Tensor, *more: Any, **others: Any) -> tuple[Tensor, Tensor]:
                    found = past_key_values.update(keys, values, *more, **others)
                    return found[0] * 1.0, found[1]

            return own(self, hidden_states, *args, past_key_values=Changing(), **kwargs)

    layer.__class__ = Turned
    found = model(**inputs, route="shared")
    torch.testing.assert_close(found.loss, right)
    assert "changes the keys that a cache gives" in says(model, **inputs)


# The first use


def test_what_differs_is_found_on_first_use() -> None:
    """An attention whose scores have something of their own, of which the function is not told."""
    model = build("Llama")
    config = model.config

    def factor(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        query, key, value, mask = args[1:5]
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * kwargs["scaling"]
        scores = scores + torch.arange(key.shape[2]) * 0.1  # a bias by position
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~causal, -1e9) + (0 if mask is None else mask)
        values = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (scores.softmax(-1) @ values).transpose(1, 2), None

    import transformers.models.llama.modeling_llama as file

    original = file.eager_attention_forward
    file.eager_attention_forward = factor
    try:
        model.set_attn_implementation("eager")
        prompts = fusedprompt.get_prompt_model(
            model, fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        )
        config.rms_norm_eps = 1.25e-6  # another configuration than any that was looked at
        assert "its attention gives other values" in says(prompts, input_ids=tokens())
    finally:
        file.eager_attention_forward = original
        first_use._of_kind.clear()


# The cache


def filled(size: int = 3, own: int = 2, index: Tensor | None = None) -> tuple[Any, Any, Tensor]:
    """Two layers of prefixes of 4 positions, and a text that was put in by an attention that reads them."""
    generator = torch.Generator("cpu").manual_seed(0)
    count = 1 if index is None else int(index.max()) + 1
    prefix = [tuple(torch.randn(count, 2, 4, 8, generator=generator, device="cpu") for _ in range(2)) for _ in range(2)]
    cache = prefixed_cache(prefix, size, index)
    text = torch.randn(size, 2, own, 8, generator=generator, device="cpu")
    with reading(cache) as now:
        for layer in range(2):
            keys, _ = cache.update(text, text, layer)
            assert keys.shape == text.shape and now.layer_of(keys, layer) is cache.layers[layer]
    return cache, prefix, text


def test_a_layer_counts_its_prefix_and_hides_it() -> None:
    cache, prefix, text = filled()
    assert cache.get_seq_length() == 6 and isinstance(cache.layers[0], PrefixedLayer)
    assert torch.equal(cache.layers[1].keys, torch.cat((prefix[1][0].expand(3, -1, -1, -1), text), 2))
    with reading(cache) as now:
        assert cache.layers[0].get_mask_sizes(5) == (7, 4)
        now.reads = 1
    assert cache.layers[0].get_mask_sizes(5) == (11, 0)


def test_rows_of_a_layer_are_reordered_cut_and_repeated() -> None:
    index = torch.tensor([1, 0, 1])
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.crop(-1),
        lambda cache: cache.crop(-3),
    ):
        cache, prefix, text = filled(index=index)
        change(cache)
        from transformers import DynamicCache

        plain = DynamicCache()
        for layer in range(2):
            keys = torch.cat((prefix[layer][0][index], text), 2)
            values = torch.cat((prefix[layer][1][index], text), 2)
            plain.update(keys, values, layer)
        change(plain)
        for ours_, theirs in zip(cache.layers, plain.layers):
            assert torch.equal(ours_.keys, theirs.keys) and torch.equal(ours_.values, theirs.values)
            assert ours_.get_seq_length() == theirs.get_seq_length()


def test_what_is_not_read_is_an_error() -> None:
    cache, _, text = filled()
    with pytest.raises(NotRead, match="registry"), reading(cache):
        cache.update(text, text, 0)
        cache.update(text, text, 1)
    cache, _, text = filled()
    with pytest.raises(NotRead, match="changes the keys"), reading(cache) as now:
        keys, _ = cache.update(text, text, 0)
        now.layer_of(keys.clone(), 0)
    with pytest.raises(NotRead), attending([], filled()[0]):
        pass
