"""A bank's prompts in models: as names of a batch's rows, and as ids that an attached base model answers."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fusedprompt as fp
from by_hand import relative
from models import PAD, VOCAB, WIDTH, build, pad, tokens

SIZES = {"a": 4, "b": 6, "c": 4}
BASE = "__base__"


def filled(base: Any, **options: Any) -> fp.PromptBank:
    bank = fp.PromptBank(None, base, **options)
    generator = torch.Generator("cpu").manual_seed(3)
    for name, count in SIZES.items():
        bank.add(name, torch.randn(count, WIDTH, generator=generator, device="cpu"))
    return bank


def embeds_of(bank: fp.PromptBank, base: Any, name: str, ids: Tensor) -> Tensor:
    """(P + T, D) of one row, joined by hand."""
    words = base.get_input_embeddings()(ids)
    return words if name == BASE else torch.cat((bank.rows(name).to(words.dtype), words))


def greedy(bank: fp.PromptBank, base: Any, name: str, ids: Tensor, count: int = 8) -> list[int]:
    """Greedy tokens behind a prompt, each from a whole pass of the base model."""
    embeds, found = embeds_of(bank, base, name, ids), list[int]()
    for _ in range(count):
        with torch.no_grad():
            found.append(int(base(inputs_embeds=embeds.unsqueeze(0)).logits[0, -1].argmax()))
            embeds = torch.cat((embeds, base.get_input_embeddings()(torch.tensor(found[-1:]))))
    return found


@pytest.fixture(scope="module")
def base() -> Any:
    return build("Llama")


@pytest.fixture(scope="module")
def bank(base: Any) -> fp.PromptBank:
    return filled(base)


# Names of a batch's rows


@pytest.mark.parametrize("route", ["shared", "splice"])
@pytest.mark.parametrize("names", [["a", "c", "a"], ["a", "b", BASE], ["b"] * 3])
def test_logits_are_those_of_rows_that_were_joined_by_hand(base: Any, names: list[str], route: str) -> None:
    base = copy.deepcopy(base).double()
    bank = filled(base)
    model, ids = fp.PromptModel(base, bank=bank).eval(), tokens(3, 7)
    padded, mask = pad(ids, 2, 0)
    for given in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        with torch.no_grad():
            found = model(**given, adapter_names=names, route=route).logits[:, -7:]
        for row, name in enumerate(names):
            embeds = embeds_of(bank, base, name, ids[row])
            right = base(inputs_embeds=embeds.unsqueeze(0)).logits[0, -7:]
            assert relative(found[row], right) < 1e-9
    assert model.explain(input_ids=ids, adapter_names=names, route=route).startswith(f"route {route}")


def test_generate_gives_the_greedy_tokens_of_each_row_alone(base: Any, bank: fp.PromptBank) -> None:
    model, ids = fp.PromptModel(base, bank=bank).eval(), tokens(4, 5)
    names = ["a", "b", BASE, "b"]
    found = model.generate(ids, adapter_names=names, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found[:, 5:].tolist() == [greedy(bank, base, name, row) for name, row in zip(names, ids)]
    assert found[:, :5].equal(ids)


def test_a_model_of_a_bank_trains_nothing_and_without_names_is_the_base_model(bank: fp.PromptBank) -> None:
    base, ids = build("Llama"), tokens()
    model = fp.PromptModel(base, bank=bank).eval()
    assert not any(one.requires_grad for one in model.parameters())
    assert model.explain().startswith("PromptBank(") and "3 prompts" in model.explain()
    assert {*model.state_dict()} == {f"base_model.{name}" for name in base.state_dict()}
    for names in (None, [BASE] * 3):
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, base(input_ids=ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=3), base.generate(ids, max_new_tokens=3))


def test_logits_and_loss_of_text_are_as_of_adapters(base: Any, bank: fp.PromptBank) -> None:
    ids = tokens(3, 7)
    model = fp.PromptModel(base, logits="text", bank=bank).eval()
    with_adapters = fp.PromptModel(copy.deepcopy(base), logits="text").eval()
    for name, count in SIZES.items():
        config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)
        with_adapters.add_adapter(name, config)
        with_adapters.prompt_encoder[name].load_prompt_embeddings(bank.rows(name))
    found, right = (one(input_ids=ids, labels=ids, adapter_names=[*"abc"]) for one in (model, with_adapters))
    assert found.logits.shape == (3, 7, VOCAB)
    torch.testing.assert_close((found.loss, found.logits), (right.loss, right.logits))


def test_a_call_keeps_its_versions_though_others_come_and_the_old_are_purged(base: Any) -> None:
    bank, ids = filled(base, max_bytes=0), tokens(2, 5)
    model = fp.PromptModel(base, bank=bank).eval()
    old, rows = greedy(bank, base, "a", ids[0]), bank.rows("a")

    class Writes(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            bank.add("a", -rows[:3])
            bank.purge()
            return scores

    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "adapter_names": ["a", "b"]}
    for route in ("splice", "shared"):
        bank.add("a", rows)
        processors = transformers.LogitsProcessorList([Writes()])
        found = model.generate(ids, logits_processor=processors, route=route, **options)
        assert found[0, 5:].tolist() == old
        new = greedy(bank, base, "a", ids[0])
        assert new != old and model.generate(ids, route=route, **options)[0, 5:].tolist() == new


def test_models_and_banks_that_do_not_belong_together_are_refused(bank: fp.PromptBank) -> None:
    for wrong, message in ((build("Llama", hidden_size=64), "width 32"), (build("Llama", vocab_size=50), "50 tokens")):
        with pytest.raises(ValueError, match=f"base_model: expected the bank's.*{message}"):
            fp.PromptModel(wrong, bank=bank)
    with pytest.raises(TypeError, match=r"bank: expected a fusedprompt.PromptBank, got dict"):
        fp.PromptModel(build("Llama"), bank={})
    model = fp.PromptModel(build("Llama"), bank=bank)
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"adapter_name: expected none in a model of a bank, got 'x'"):
        model.add_adapter("x", config)
    with pytest.raises(ValueError, match="name: expected one of the bank's 3 prompts, got 'nobody'"):
        model(input_ids=tokens(), adapter_names=["a", "nobody", "b"])
    with pytest.raises(ValueError, match="adapter_names: expected B = 3 names"):
        model(input_ids=tokens(), adapter_names=["a"])
    with pytest.raises(TypeError, match="adapter_names: expected a list of one name per row, got 'a'"):
        model(input_ids=tokens(), adapter_names="a")


# Ids that an attached base model answers

FAMILIES = ("Llama", "Gemma", "GPT2", "Qwen2", "OPT")


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_give_the_logits_of_embeddings_that_were_joined_by_hand(family: str) -> None:
    base, ids = build(family).double(), tokens(1, 5)[0]
    bank = filled(base)
    right = [base(inputs_embeds=embeds_of(bank, base, name, ids).unsqueeze(0)).logits for name in "ab"]
    with bank.attach(base):
        inside = torch.tensor([[*ids[:2], *bank.ids("a"), *ids[2:]]])
        found = [base(torch.tensor([bank.ids(name) + ids.tolist()])).logits for name in "ab"]
        middle = base(inside).logits
    for one, other in zip(found, right):
        assert one.shape[-1] == VOCAB and relative(one, other) < 1e-9
    words = base.get_input_embeddings()(ids)
    joined = torch.cat((words[:2], bank.rows("a").double(), words[2:])).unsqueeze(0)
    assert relative(middle, base(inputs_embeds=joined).logits) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_changes_nothing_for_tokens_and_detaching_leaves_nothing(family: str, tmp_path: Path) -> None:
    base, ids = build(family), tokens()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    calls = list[int]()
    embedding.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    before = [dict(vars(module)) for module in (base, embedding, head)]
    logits, tied = base(ids).logits, head.weight is embedding.weight
    base.save_pretrained(tmp_path / "before")
    handle = filled(base).attach(base)
    assert torch.equal(base(ids).logits, logits) and calls == [7, 7]
    assert (head.weight is embedding.weight) == tied
    base.save_pretrained(tmp_path / "attached")
    names = [{path.name for path in (tmp_path / kind).iterdir()} for kind in ("before", "attached")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes()
    handle.detach()
    handle.detach()
    assert [{*vars(module)} for module in (base, embedding, head)] == [{*one} for one in before]
    assert torch.equal(base(ids).logits, logits)
    with pytest.raises(IndexError):
        base(torch.tensor([handle.bank.ids("a")]))


def test_added_ids_are_never_generated_by_sampling_or_beams(base: Any, bank: fp.PromptBank) -> None:
    torch.manual_seed(0)
    with bank.attach(base):
        ids = torch.tensor([[*bank.ids("a"), 5, 6], [*bank.ids("c"), 7, 8]])
        flat = {"do_sample": True, "temperature": 1e4, "top_k": 0, "eos_token_id": None}
        drawn = base.generate(ids, max_new_tokens=40, num_return_sequences=16, **flat)[:, 6:]
        beams = base.generate(ids, max_new_tokens=12, num_beams=5, num_return_sequences=5, do_sample=False)[:, 6:]
    assert drawn.unique().numel() > VOCAB * 0.9  # nearly uniform: an id that could be drawn would be
    assert drawn.max() < VOCAB and beams.max() < VOCAB


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"bad_words_ids": [[41], [10]]},
    {"sequence_bias": {(41,): -9.0}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "greedy"))
def test_generate_on_ids_gives_the_tokens_of_the_prompt_model(
    base: Any, bank: fp.PromptBank, options: dict[str, Any]
) -> None:
    ids, model = tokens(3, 5), fp.PromptModel(base, bank=bank).eval()
    common = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD, **options}
    right = model.generate(ids, adapter_names=["a", "b", "a"], **common)[:, 5:]
    rows = [[*bank.ids(name), *row.tolist()] for name, row in zip("aba", ids)]
    width = max(map(len, rows))
    wide = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    with bank.attach(base):
        found = base.generate(wide, attention_mask=(wide != PAD).long(), **common)[:, width:]
    assert torch.equal(found, right)


def test_continuous_batching_gives_the_tokens_of_the_prompt_model() -> None:
    """Four requests of two prompts of different lengths in one batch."""
    base, ids = build("Llama", attn_implementation="sdpa"), tokens(4, 5)
    bank = filled(base)
    names = ["a", "b", "a", "b"]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    sizes = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    with bank.attach(base):
        requests = [bank.ids(name) + row.tolist() for name, row in zip(names, ids)]
        found = base.generate_batch(requests, generation_config=config, continuous_batching_config=sizes)
    model = fp.PromptModel(base, bank=bank).eval()
    right = model.generate(ids, adapter_names=names, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert [one.generated_tokens for one in found.values()] == right[:, 5:].tolist()
    assert right[0, 5:].tolist() == greedy(bank, base, "a", ids[0])


def test_tokens_may_be_added_while_attached_up_to_the_banks_ids() -> None:
    base, ids = build("Llama"), tokens(1, 5)
    bank = filled(base)
    with bank.attach(base):
        wide = torch.tensor([bank.ids("a") + ids[0].tolist()])
        before = base(wide).logits
        base.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
        assert torch.equal(base(wide).logits[..., :VOCAB], before)
        assert base(torch.tensor([[VOCAB + 8]])).logits.shape == (1, 1, VOCAB + 9)
        base.resize_token_embeddings(bank.first_id + 1, mean_resizing=False)
        with pytest.raises(ValueError, match=f"at most {bank.first_id} tokens beside the bank's ids"):
            base(wide)
    assert torch.equal(base(ids).logits[..., :VOCAB], build("Llama")(ids).logits)


def test_an_attached_model_is_copied_with_its_bank_and_refuses_a_second_one(base: Any, bank: fp.PromptBank) -> None:
    ids = torch.tensor([[*bank.ids("b"), 5, 6, 7]])
    with bank.attach(base):
        right, clone = base(ids).logits, copy.deepcopy(base)
        with pytest.raises(ValueError, match="model: expected one without a bank"):
            bank.attach(base)
        for unknown in (VOCAB, bank.first_id - 1, 10**6):
            with pytest.raises(IndexError):
                base(torch.tensor([[unknown]]))
    assert torch.equal(clone(ids).logits, right)


def test_what_replaced_the_embedding_later_must_go_first() -> None:
    base = build("Llama")
    handle, embedding = filled(base).attach(base), base.get_input_embeddings()
    embedding.forward = lambda ids: handle(ids) * 1
    with pytest.raises(RuntimeError, match="detach: expected what came later"):
        handle.detach()
    embedding.__dict__["forward"] = handle
    handle.detach()
    assert "forward" not in vars(embedding)


def test_a_prompt_model_runs_on_an_attached_base_model(base: Any, bank: fp.PromptBank) -> None:
    model, ids = fp.PromptModel(base, bank=bank).eval(), tokens()
    right = model(input_ids=ids, adapter_names=["a", "b", "c"]).logits
    with bank.attach(base):
        torch.testing.assert_close(model(input_ids=ids, adapter_names=["a", "b", "c"]).logits, right)


def test_threads_share_an_attached_model_while_prompts_are_updated(base: Any) -> None:
    bank, wrong, done = filled(base, max_bytes=600), list[str](), threading.Event()
    texts, right = tokens(4, 5), dict[int, Tensor]()
    ids = [torch.tensor([bank.ids(name) + row.tolist()]) for name, row in zip("abca", texts)]
    handle = bank.attach(base)

    def read(index: int) -> None:
        while not done.is_set():
            with torch.no_grad():
                if not torch.allclose(base(ids[index]).logits, right[index], rtol=1e-4, atol=1e-4):
                    wrong.append(str(index))

    with torch.no_grad():
        right.update(enumerate(base(one).logits for one in ids))
    readers = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for reader in readers:
        reader.start()
    for turn in range(30):
        bank.add("abc"[turn % 3], torch.randn(3, WIDTH))
    done.set()
    for reader in readers:
        reader.join()
    handle.detach()
    assert wrong == []


def test_models_whose_layers_read_ids_are_refused(bank: fp.PromptBank) -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=WIDTH,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=None,
    )
    with pytest.raises(ValueError, match="model: expected layers that read embeddings alone, got Gemma3n"):
        bank.attach(transformers.Gemma3nForCausalLM(config))
