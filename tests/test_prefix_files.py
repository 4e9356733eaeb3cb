"""Prefixes as files: PEFT's both ways, training resumed, starting points, and cartridges joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fusedprompt
from mixtures import assert_close
from models import build, ours, pair, task_inputs, tokens
from tolerance import assert_identical

METHODS = ("PREFIX", "PROJECTED", "CARTRIDGE")
load = fusedprompt.PromptModel.from_pretrained


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("Bert", "SEQ_CLS"), ("Bart", "SEQ_2_SEQ_LM")])
@torch.no_grad()
def test_files_are_read_both_ways_with_equal_outputs(family: str, task: str, method: str, tmp_path: Path) -> None:
    odd: dict[str, Any] = {"encoder_layers": 3, "decoder_layers": 3} if family == "Bart" else {}
    theirs, mine = pair(family, task, method, **odd)
    inputs = task_inputs(task, tokens())
    theirs.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "mine")]
    for one in written:  # PEFT names the heads twice
        one["modules_to_save"] = sorted(set(one["modules_to_save"] or []))
    assert written[0] == written[1]
    expected = theirs(**inputs).logits
    assert_close(
        {"logits": load(build(family, task, **odd), tmp_path / "theirs")(**inputs).logits}, {"logits": expected}
    )
    read = peft.PeftModel.from_pretrained(build(family, task, **odd), str(tmp_path / "mine"))
    assert_close({"logits": read(**inputs).logits}, {"logits": expected})


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_where_it_stopped(method: str, tmp_path: Path) -> None:
    model, inputs = ours("Llama", method=method).train(), task_inputs("CAUSAL_LM", tokens())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "prompt_encoder.safetensors").exists() == (method == "PROJECTED")
    resumed = load(build("Llama"), tmp_path, is_trainable=True)
    trained = [{n: p.detach() for n, p in one.named_parameters() if p.requires_grad} for one in (resumed, model)]
    assert_identical(*trained)
    assert len(trained[0]) == (5 if method == "PROJECTED" else 1)
    served = load(build("Llama"), tmp_path)
    assert not any(p.requires_grad for p in served.parameters())
    assert_close({"logits": served(**inputs).logits}, {"logits": model.eval()(**inputs).logits.detach()})


def test_a_projection_cannot_be_trained_on_from_what_peft_saved(tmp_path: Path) -> None:
    theirs, _ = pair("Llama", "CAUSAL_LM", "PROJECTED")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prompt_embeddings: expected an adapter without prefix_projection"):
        load(build("Llama"), tmp_path, is_trainable=True)


@torch.no_grad()
def test_layers_that_peft_ties_come_apart_here_and_do_not_go_back(tmp_path: Path) -> None:
    theirs, mine = pair("T5", "SEQ_2_SEQ_LM", "PREFIX", num_layers=4, num_decoder_layers=4)
    inputs = task_inputs("SEQ_2_SEQ_LM", tokens())
    theirs.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    base = lambda: build("T5", "SEQ_2_SEQ_LM", num_layers=4, num_decoder_layers=4)  # noqa: E731
    found, expected = load(base(), tmp_path / "theirs")(**inputs).logits, theirs(**inputs).logits
    assert_close({"logits": found}, {"logits": expected})
    back, own = load(base(), tmp_path / "mine")(**inputs).logits, mine(**inputs).logits
    assert_close({"logits": back}, {"logits": own})
    assert not torch.allclose(own, expected, rtol=1e-2)
    with pytest.raises(Exception, match="keys and values of its own in each of 4 layers"):
        peft.PeftModel.from_pretrained(base(), str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("family", "encoder", "decoder", "told"),
    [
        ("T5", 6, 2, None),  # as ByT5: PEFT counts the encoder's layers
        ("T5", 6, 3, 3),
        ("T5", 2, 5, 5),
        ("Bart", 4, 3, None),
    ],
)
@torch.no_grad()
def test_a_decoder_with_other_layers_than_its_encoder_has_files_both_ways(
    family: str, encoder: int, decoder: int, told: int | None, tmp_path: Path
) -> None:
    names = ("num_layers", "num_decoder_layers") if family == "T5" else ("encoder_layers", "decoder_layers")
    base = lambda: build(family, "SEQ_2_SEQ_LM", **dict(zip(names, (encoder, decoder))))  # noqa: E731
    fields = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4, "num_layers": told}
    theirs = peft.get_peft_model(base(), peft.PrefixTuningConfig(**fields)).eval()
    mine = fusedprompt.get_prompt_model(base(), fusedprompt.PrefixTuningConfig(**fields)).eval()
    inputs = task_inputs("SEQ_2_SEQ_LM", tokens())
    theirs.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    assert_close({"": load(base(), tmp_path / "theirs")(**inputs).logits}, {"": theirs(**inputs).logits})
    read = peft.PeftModel.from_pretrained(base(), str(tmp_path / "mine"))
    assert_close({"": read(**inputs).logits}, {"": mine(**inputs).logits})


def test_a_decoder_with_more_layers_than_its_encoder_has_a_prefix_in_each() -> None:
    model = ours("T5", "SEQ_2_SEQ_LM", "PREFIX", num_layers=2, num_decoder_layers=5)
    model(**task_inputs("SEQ_2_SEQ_LM", tokens())).loss.backward()
    assert model.peft_config["default"].num_layers == 5
    assert model.prompt_encoder["default"].embedding.weight.grad.view(4, 10, -1).any(2).all()
    with pytest.raises(ValueError, match="num_layers: expected the 5 layers of the base model's cache, got 4"):
        config = fusedprompt.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_layers=4)
        model.add_adapter("few", config)


# Starting points


class Words:
    """A tokenizer of words, whose ids are their lengths; `template` makes it one for chats."""

    def __init__(self, template: bool) -> None:
        if template:
            self.apply_chat_template = self._chat

    def __call__(self, text: str, return_tensors: str, truncation: bool, max_length: int | None) -> dict[str, Any]:
        assert truncation == (max_length is not None)
        return {"input_ids": torch.tensor([[2 + len(word) for word in text.split()]])[:, :max_length]}

    def _chat(self, messages: list[dict[str, str]], **options: Any) -> Any:
        assert options.pop("add_generation_prompt") is False
        return torch.tensor([[60, *(2 + len(word) for word in messages[0]["content"].split()), 61]])


TEXT = "a prefix of a text is what the base model made of it once and keeps"


@pytest.mark.parametrize("method", ["PREFIX", "CARTRIDGE"])
@pytest.mark.parametrize("options", [{}, {"use_chat_template": False, "max_length": 9}])
def test_a_prefix_from_a_text_is_that_of_peft_and_the_text_in_context(method: str, options: dict[str, Any]) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", method)
    tokenizer: Any = Words(template=not options)
    expected = peft.tuners.cartridge.utils.initialize_kv_prefix_from_text(theirs, tokenizer, text=TEXT, **options)
    found = fusedprompt.initialize_kv_prefix_from_text(mine.train(), tokenizer, text=TEXT, **options)
    assert mine.training and torch.equal(found, expected)
    assert torch.equal(mine.prompt_rows(), theirs.prompt_encoder["default"].embedding.weight)
    ids = ([60] if not options else []) + [2 + len(word) for word in TEXT.split()]
    text, more = torch.tensor([ids[:4]]), tokens(2)
    right = mine.base_model(input_ids=torch.cat((text.expand(2, -1), more), 1)).logits[:, 4:]
    assert_close({"logits": mine.eval()(input_ids=more).logits}, {"logits": right})
    frozen = [n for n, p in mine.prompt_encoder.named_parameters() if not p.requires_grad]
    assert frozen == (["default.frozen_embedding"] if method == "CARTRIDGE" else [])


@pytest.mark.parametrize("source", ["PROMPT", "LSTM", "PREFIX"])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
@torch.no_grad()
def test_an_adapter_of_any_method_becomes_a_prefix_that_says_the_same(family: str, source: str) -> None:
    model = ours(family, method=source)
    config = fusedprompt.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model.add_adapter("prefix", config)
    expected = model(input_ids=tokens(), logits="text").logits
    fusedprompt.initialize_kv_prefix_from_adapter(model, source="default", adapter_name="prefix")
    model.set_adapter("prefix")
    assert_close({"logits": model(input_ids=tokens()).logits}, {"logits": expected})


def test_what_a_prefix_cannot_begin_with_is_named() -> None:
    model = ours("Llama", method="PREFIX")
    start, rows = (
        fusedprompt.initialize_kv_prefix_from_past_key_values,
        fusedprompt.prompt_embeddings_from_past_key_values,
    )
    cache = model.base_model(input_ids=tokens(2), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"expected tensors \(1, heads, T, width\), of one row, got \(2, 2, 7, 8\)"):
        start(model, past_key_values=cache)
    short = model.base_model(input_ids=tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="at least num_virtual_tokens = 4 positions, got 3 in layer 0"):
        start(model, past_key_values=short)
    with pytest.raises(ValueError, match=r"prompt_embeddings: expected shape \(R, width\) = \(4, 64\), got \(3, 64\)"):
        start(model, past_key_values=short, num_virtual_tokens=3)
    one, other = torch.zeros(1, 2, 4, 8), torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"layers with equal heads, \(2, 8\), got \(4, 8\) in layer 1"):
        rows([(one, one), (other, other)], num_virtual_tokens=4)
    with pytest.raises(ValueError, match="got an empty one"):
        rows([], num_virtual_tokens=4)
    with pytest.raises(TypeError, match="expected a cache, or pairs of keys and values, got int"):
        rows(3, num_virtual_tokens=4)
    model.add_adapter("rows", fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="expected a prefix of keys and values, got 'rows' of PROMPT_TUNING"):
        start(model, adapter_name="rows", past_key_values=cache)
    with pytest.raises(ValueError, match="source: expected an adapter of 4 virtual tokens, got 'rows' of 2"):
        fusedprompt.initialize_kv_prefix_from_adapter(model, source="rows")
    with pytest.raises(ValueError, match="expected an adapter without prefix_projection, got 'default' with it"):
        start(ours("Llama", method="PROJECTED"), past_key_values=cache)


@torch.no_grad()
def test_cartridges_joined_are_the_files_of_peft_bit_for_bit(tmp_path: Path) -> None:
    paths: list[str | Path] = []
    for seed, rows in ((1, 3), (2, 5)):
        model = ours("Llama", method="CARTRIDGE", rows=rows, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
    peft.tuners.cartridge.utils.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    fusedprompt.compose_cartridge_adapters(paths, output_path=tmp_path / "mine")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    joined = load(build("Llama"), tmp_path / "mine")
    assert joined.peft_config["default"].num_frozen_tokens == 1
    assert torch.equal(joined.prompt_rows(), torch.cat([load(build("Llama"), path).prompt_rows() for path in paths]))
    ours("Llama", method="PREFIX").save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match=r"expected cartridges, got .*prefix' of PREFIX_TUNING"):
        fusedprompt.compose_cartridge_adapters([paths[0], tmp_path / "prefix"], output_path=tmp_path / "none")
    ours("GPT2", method="CARTRIDGE").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected cartridges of one token_dim, 16, got 32 in"):
        fusedprompt.compose_cartridge_adapters([paths[0], tmp_path / "other"], output_path=tmp_path / "none")
    with pytest.raises(ValueError, match="adapter_paths: expected at least 2 folders, got 1"):
        fusedprompt.compose_cartridge_adapters(paths[:1], output_path=tmp_path / "none")
    assert not (tmp_path / "none").exists()
