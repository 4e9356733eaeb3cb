"""Prompts' keys and values kept between calls: when they serve, and when they must be made again."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedprompt
from models import build, config_fields, ours, task_inputs, tokens

ROWS = 20
IDS = tokens(8, 10)


def evaluate(model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


class Prompts:
    """Counts the prompt's passes through the base model's first layer."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.base_model.model.layers[0].register_forward_pre_hook(self._see)

    def _see(self, _: Any, args: tuple[torch.Tensor]) -> None:
        self.count += args[0].shape[:2] == (1, ROWS)


def kept(method: str = "MLP", **overrides: Any) -> tuple[Any, Prompts]:
    """A model that has its prompt in the cache, and the count of passes, which is 1."""
    model = ours("Llama", method=method, rows=ROWS, **overrides)
    prompts = Prompts(model)
    evaluate(model)
    assert prompts.count == 1 and len(model.prompt_cache) == 1
    return model, prompts


def assert_fresh(model: Any, **given: Any) -> None:
    """The output is what it would be without a cache."""
    torch.testing.assert_close(evaluate(model, **given), evaluate(model, **given, route="splice"), rtol=1e-4, atol=1e-4)


def test_calls_that_train_nothing_share_one_pass() -> None:
    model, prompts = kept()
    assert_fresh(model)
    model.generate(input_ids=IDS, max_new_tokens=2)
    with torch.inference_mode():
        model(input_ids=IDS)
    evaluate(model, logits="text")
    assert prompts.count == 1


def test_a_frozen_adapter_needs_no_no_grad_and_keeps_gradients_of_embeddings() -> None:
    model, prompts = kept()
    model.set_adapter("default", inference_mode=True)
    embeds = torch.randn(8, 10, 32, requires_grad=True)
    model(inputs_embeds=embeds, labels=IDS).loss.backward()
    found = embeds.grad.clone()
    embeds.grad = None
    model(inputs_embeds=embeds, labels=IDS, route="splice").loss.backward()
    torch.testing.assert_close(found, embeds.grad, rtol=1e-4, atol=1e-6)
    assert prompts.count == 1


def test_a_prompt_kept_in_inference_mode_serves_training_of_embeddings() -> None:
    model = ours("Llama", rows=ROWS)
    model.set_adapter("default", inference_mode=True)
    with torch.inference_mode():
        model(input_ids=IDS)
    embeds = torch.randn(8, 10, 32, requires_grad=True)
    model(inputs_embeds=embeds, labels=IDS).loss.backward()
    assert embeds.grad.abs().sum() > 0


def test_training_steps_neither_use_nor_fill_the_cache() -> None:
    model = ours("Llama", method="MLP", rows=ROWS).train()
    prompts = Prompts(model)
    for _ in range(2):
        model(**task_inputs("CAUSAL_LM", IDS)).loss.backward()
    assert prompts.count == 2 and len(model.prompt_cache) == 0


def test_a_random_encoder_is_not_kept() -> None:
    config = fusedprompt.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS, encoder_dropout=0.5)
    model = fusedprompt.get_prompt_model(build("Llama"), config).train()
    assert (evaluate(model) - evaluate(model)).abs().max() > 1e-3
    assert len(model.prompt_cache) == 0


# Every way in which weights change.


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(0.5)


def base_in_place(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.layers[1].self_attn.v_proj.weight.mul_(0.5)


def behind_autograds_back(model: Any) -> None:
    weight = model.base_model.model.layers[1].self_attn.v_proj.weight
    version = weight._version
    weight.data += torch.randn_like(weight)
    assert weight._version == version


def new_storage(model: Any) -> None:
    encoder = model.prompt_encoder["default"]
    encoder.embedding.weight.data = torch.randn_like(encoder.embedding.weight)


def new_parameter(model: Any) -> None:
    encoder = model.prompt_encoder["default"]
    encoder.embedding.weight = torch.nn.Parameter(torch.randn_like(encoder.embedding.weight))


def optimizer_step(model: Any) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**task_inputs("CAUSAL_LM", IDS)).loss.backward()
    optimizer.step()
    model.eval()


def to_dtype(model: Any) -> None:
    model.to(torch.float64)


def load_state_dict(model: Any) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def merged_lora(model: Any) -> None:
    """PEFT merges with `weight.data += delta`: the parameter stays the same object of the same version."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model.base_model = get_peft_model(model.base_model, lora).merge_and_unload()


CHANGES = (
    in_place,
    base_in_place,
    behind_autograds_back,
    new_storage,
    new_parameter,
    optimizer_step,
    to_dtype,
    load_state_dict,
    merged_lora,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_make_a_new_prompt(change: Callable[[Any], None]) -> None:
    model, prompts = kept()
    before = evaluate(model)
    passes = prompts.count
    change(model)
    after = evaluate(model)
    assert prompts.count > passes and len(model.prompt_cache) == 1
    if change is not to_dtype:
        assert (after - before).abs().max() > 1e-3
    assert_fresh(model)


def test_switching_lora_on_and_off_makes_a_new_prompt() -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model, _ = kept()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), model.base_model)
    outputs = [evaluate(model)]
    layers = [module for module in model.base_model.modules() if isinstance(module, LoraLayer)]
    switches: tuple[Callable[[Any], None], ...] = (
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.set_scale("default", 5.0),
        lambda layer: layer.merge(),
    )
    for switch in switches:
        for layer in layers:
            switch(layer)
        outputs.append(evaluate(model))
        assert_fresh(model)
    off, on, scaled = (outputs[i] - outputs[0] for i in (1, 2, 3))
    assert off.abs().max() > 1e-3 and scaled.abs().max() > 1e-3 and on.abs().max() < 1e-5


def test_autocast_has_a_prompt_of_its_own() -> None:
    model, prompts = kept()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluate(model)
    evaluate(model)
    assert prompts.count == 3


def test_adapters_have_prompts_of_their_own_and_loading_replaces_them(tmp_path: Path) -> None:
    model, prompts = kept("PROMPT")
    _, fields = config_fields("PROMPT", rows=ROWS)
    model.add_adapter("other", fusedprompt.PromptTuningConfig(**fields))
    model.set_adapter("other")
    other = evaluate(model)
    model.set_adapter("default")
    assert (evaluate(model) - other).abs().max() > 1e-3
    assert prompts.count == 2 and len(model.prompt_cache) == 2
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "default")
    torch.testing.assert_close(evaluate(model), other)
    model.delete_adapter("other")
    assert len(model.prompt_cache) == 1


def test_memory_is_bounded_and_cleared() -> None:
    model, prompts = kept()
    size = model.prompt_cache.nbytes()
    assert size == 2 * 2 * (2 * 8 * ROWS) * 4 + ROWS * 67 * 4  # layers, keys and values, heads; logits
    name, fields = config_fields("PROMPT", rows=ROWS)
    for other in ("a", "b"):
        model.add_adapter(other, getattr(fusedprompt, name)(**fields))
    model.prompt_cache.max_bytes = 2 * size
    for adapter in ("a", "default", "b"):  # the least recently used goes
        model.set_adapter(adapter)
        evaluate(model)
        assert model.prompt_cache.nbytes() <= 2 * size
    assert prompts.count == 3
    model.set_adapter("default")
    evaluate(model)
    assert prompts.count == 3
    model.set_adapter("a")
    evaluate(model)
    assert prompts.count == 4
    model.prompt_cache.clear("a")
    assert len(model.prompt_cache) == 1
    model.prompt_cache.clear()
    assert len(model.prompt_cache) == 0 and model.prompt_cache.nbytes() == 0
    model.prompt_cache.max_bytes = 0
    assert_fresh(model)
    assert len(model.prompt_cache) == 0


def test_nothing_that_a_caller_does_with_a_returned_cache_changes_the_kept_prompt() -> None:
    model, prompts = kept()
    expected = evaluate(model)
    with torch.no_grad():
        for layer in model(input_ids=IDS).past_key_values.layers:
            layer.keys.zero_()
            layer.values.zero_()
    model.generate(input_ids=IDS, max_new_tokens=4, num_beams=2)
    assert torch.equal(evaluate(model), expected) and prompts.count == 1


def test_copies_and_pickles_start_with_an_empty_cache() -> None:
    model, _ = kept()
    model.base_model.model.layers[0]._forward_pre_hooks.clear()
    model.prompt_cache.max_bytes = 12345
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(twin.prompt_cache) == 0 and twin.prompt_cache.max_bytes == 12345
        assert torch.equal(evaluate(twin), evaluate(model))


def test_threads_share_a_model() -> None:
    model, prompts = kept()
    batches = [tokens(6, 10, seed=seed) for seed in range(4)]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(input_ids=batch, **options) for batch in batches]
    model.prompt_cache.clear()
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = model.generate(input_ids=batches[index], **options)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(4))
    assert prompts.count == 2
