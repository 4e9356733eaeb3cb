"""Packed examples, each behind its own prompt, against the same examples one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import fusedprompt
from fusedprompt.routes.packing import block_mask
from mixtures import BASE, assert_close, drawn_model, gradients
from mixtures import alone as of_adapter
from models import ours, tokens
from tolerance import examples, one_thread

__all__ = ["one_thread"]


def example(length: int, seed: int) -> dict[str, Any]:
    return {"input_ids": tokens(1, length, seed=seed)[0].tolist()}


def check(model: Any, texts: list[dict[str, Any]], names: list[str] | None = None, **options: Any) -> dict[str, Any]:
    """Loss and gradients of the packed batch are those of the examples, weighted by their tokens."""
    packed = fusedprompt.pack(model, texts, adapter_names=names, **options)
    model.zero_grad()
    output = model(**packed)
    output.loss.backward()
    found = {"loss": output.loss.detach(), **gradients(model)}
    model.zero_grad()
    losses, count = [], 0
    for text, name in zip(texts, names or [model.active_adapter] * len(texts)):
        ids = torch.tensor([text["input_ids"]])
        labels = torch.tensor(text.get("labels", text["input_ids"]))
        own = of_adapter(model, name, input_ids=ids).logits[0]
        targets = labels[1:] if name == BASE else labels
        losses.append(cross_entropy(own[-len(targets) - 1 : -1], targets, reduction="sum"))
        count += int((targets != -100).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    assert_close(found, {"loss": loss.detach(), **gradients(model)})
    return packed


def test_a_pack_is_written_out_as_expected() -> None:
    model = ours("Llama", rows=2)
    texts = [{"input_ids": [11, 12, 13]}, {"input_ids": torch.tensor([21]), "labels": [-100]}, {"input_ids": [31, 32]}]
    packed = fusedprompt.pack(model, texts, max_length=8)
    assert packed["slots"].tolist() == [[-1, -2, 0, 1, 2, -1, -2, 3], [-1, -2, 0, 1, 2, 3, 4, 5]]
    assert packed["input_ids"].tolist() == [[11, 12, 13, 21, 0, 0], [31, 32, 0, 0, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    n = -100
    assert packed["labels"].tolist() == [[n, n, 11, 12, 13, n, n, n], [n, n, 31, 32, n, n, n, n]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 5, 8, 12, 16]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 5 and packed["use_cache"] is False
    assert "attention_mask" not in packed and "adapter_names" not in packed


FAMILIES = ("GPT2", "Llama", "Qwen2", "Qwen3", "Mistral", "Mixtral", "Gemma", "Gemma2", "OPT", "GPTNeoX", "Phi")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_are_as_if_alone(family: str, attention: str) -> None:
    if (family, attention) == ("Gemma2", "sdpa"):
        pytest.skip("Gemma 2 has no sdpa")
    model = ours(family, method="MLP", rows=3, attn_implementation=attention)
    texts = [example(length, seed) for seed, length in enumerate((5, 1, 4, 7))]
    packed = check(model, texts, max_length=14)
    assert packed["slots"].shape == (3, 12)
    assert ("attention_mask" in packed) == (family == "OPT")


@pytest.mark.parametrize("family", ["Falcon", "Bloom"])
def test_models_that_cannot_keep_examples_apart_are_refused(family: str) -> None:
    alibi = {"alibi": True} if family == "Falcon" else {}
    with pytest.raises(ValueError, match=f"model: expected one that can keep packed examples apart, but {family}"):
        fusedprompt.pack(ours(family, **alibi), [example(3, 0)])


@given(
    drawn=st.lists(
        st.tuples(st.sampled_from([BASE, "long", "short", "again"]), st.integers(1, 6)), min_size=1, max_size=6
    ),
    max_length=st.sampled_from([None, 11, 17]),
)
@examples(10)
def test_drawn_packs_of_several_adapters_are_as_if_alone(drawn: list[tuple[str, int]], max_length: int | None) -> None:
    if all(name == BASE and length == 1 for name, length in drawn):
        drawn.append(("long", 2))
    texts = [example(length, seed) for seed, (_, length) in enumerate(drawn)]
    check(drawn_model(), texts, [name for name, _ in drawn], max_length=max_length)


def test_labels_of_the_caller_count_and_nothing_is_predicted_across_borders() -> None:
    model = ours("Llama", rows=2)
    texts = [{**example(4, 0), "labels": [-100, -100, 7, 8]}, {**example(3, 1), "labels": [9, -100, -100]}]
    packed = check(model, texts)
    labels = packed["labels"][0]
    begins = packed["cu_seq_lens_q"][1:-1].long()
    assert (labels[begins] == -100).all()


def test_a_block_mask_lets_a_position_see_its_own_example_alone() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    mask = block_mask(positions, torch.float32)
    assert mask.shape == (2, 1, 5, 5)
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])
    assert torch.equal(mask[0, 0] == 0, expected.bool())
    assert torch.equal(mask[1, 0] == 0, torch.ones(5, 5).tril().bool())


def test_lengths_go_to_flash_attention_alone() -> None:
    model, seen = ours("Llama"), {}
    model.base_model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    packed = fusedprompt.pack(model, [example(3, 0), example(4, 1)])
    model(**packed)
    assert "cu_seq_lens_q" not in seen and seen["use_cache"] is False
    # What transformers would call it with; there is no such attention on a CPU.
    from fusedprompt.routes.packing import flash_arguments

    model.base_model.config._attn_implementation_internal = "flash_attention_2"
    given = dict(packed)
    flash_arguments(model.base_model, given)
    assert given.keys() == packed.keys()


@pytest.mark.parametrize("workers", [0, 1])
def test_transformers_trainer_trains_on_packs(workers: int, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = ours("Llama", rows=3)
    before = model.prompt_encoder["default"].embedding.weight.detach().clone()
    texts = [example(3 + seed % 4, seed) for seed in range(12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_num_workers=workers,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    collator = fusedprompt.PackingCollator.of(model, max_length=24)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collator)
    trainer.train()
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses and losses[0] == losses[0]
    assert not torch.equal(model.prompt_encoder["default"].embedding.weight, before)


def test_wrong_examples_are_named() -> None:
    model = ours("Llama", rows=3)
    for texts, options, message in (
        ([], {}, "examples: expected at least one, got none"),
        ([{"input_ids": []}], {}, r"examples\[0\]\['input_ids'\]: expected shape \(T,\), T >= 1, got \(0,\)"),
        ([example(2, 0), {**example(2, 0), "labels": [1]}], {}, r"examples\[1\]\['labels'\]: expected shape \(2,\)"),
        ([example(9, 0)], {"max_length": 11}, r"at most max_length = 11 columns, got 3 prompt rows \+ 9 tokens"),
        ([example(2, 0)], {"adapter_names": ["other"]}, "expected names of prompts in front, .* got 'other'"),
        ([example(2, 0)], {"adapter_names": ["default"] * 2}, "expected 1 names, one per example, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            fusedprompt.pack(model, texts, **options)
    with pytest.raises(ValueError, match="expected a causal language model to pack examples for, got task SEQ_CLS"):
        fusedprompt.pack(ours("Llama", "SEQ_CLS"), [example(2, 0)])
    with pytest.raises(ValueError, match=r"adapter_names: expected names among .* with slots, got 'other'"):
        model(**{**fusedprompt.pack(model, [example(2, 0)]), "adapter_names": ["other"]})
