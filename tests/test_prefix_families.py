"""Prefixes on base models whose layers differ in their keys, share them, see a window, or count columns; by the text in
context, the row alone, and PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch

import fusedprompt
from families.tiny import build
from mixtures import assert_close
from models import PAD, pad, task_inputs, tokens
from models import build as plain
from test_prefix import step
from test_prefix_files import Words

MIXED = ["sliding_attention", "full_attention"] * 3
SHARED = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": MIXED}
GROUPED = {**SHARED, "num_key_value_heads": 4, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
# With the sizes of the adapter that is made: heads, and the width of all of them.
UNEVEN: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("Gemma4ForCausalLM", {}, (2, 1024)),  # layers of width 8 and 512
    ("Gemma4ForCausalLM", SHARED, (2, 1024)),  # and two that read earlier layers' keys
    ("Gemma4ForCausalLM", GROUPED, (4, 2048)),  # and of 4 and of 2 heads
    ("Gemma4UnifiedForCausalLM", SHARED, (2, 1024)),
    ("Gemma3nForCausalLM", SHARED, (2, 16)),
    ("MiMoV2FlashForCausalLM", {}, (4, 32)),  # layers of 2 and of 4 heads
    ("DeepseekV3ForCausalLM", {"kv_lora_rank": 24}, (1, 24)),  # keys of width 24, values of 8
    ("DeepseekV2ForCausalLM", {"kv_lora_rank": 24}, (1, 24)),
    ("FalconForCausalLM", {}, (1, 8)),  # one head for all
    ("MllamaForCausalLM", {}, (2, 16)),  # its table has more rows than its vocabulary
]


@pytest.mark.parametrize("kind", [fusedprompt.PrefixTuningConfig, fusedprompt.CartridgeConfig])
@pytest.mark.parametrize(("name", "fields", "sizes"), UNEVEN)
@torch.no_grad()
def test_a_texts_keys_are_the_text_in_context_where_layers_differ(
    name: str, fields: dict[str, Any], sizes: tuple[int, int], kind: Any
) -> None:
    base = build(name, **fields)
    model = fusedprompt.get_prompt_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    config = model.peft_config["default"]
    assert (config.num_attention_heads, config.token_dim) == sizes
    text, more = tokens(1, 6, seed=9), tokens(3, 7)
    cache = base(input_ids=text, use_cache=True).past_key_values
    fusedprompt.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    right = base(input_ids=torch.cat((text.expand(3, -1), more), 1)).logits[:, 6:]
    assert_close({"logits": model(input_ids=more).logits}, {"logits": right}, 1e-5)
    ids, mask = pad(more, 2, 1)
    assert_close({"logits": model(input_ids=ids, attention_mask=mask).logits[:, 2:-1]}, {"logits": right}, 1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    new = model.generate(input_ids=more, **options)
    for _ in range(4):
        more = torch.cat((more, model(input_ids=more).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(new, more)


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, fields, _ in UNEVEN[:4]])
def test_what_peft_gives_gemma_4_is_what_it_gives_patched(name: str, fields: dict[str, Any]) -> None:
    def made(count: int = 5) -> Any:
        torch.manual_seed(7)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)
        return peft.get_peft_model(build(name, **fields), config).eval()

    models, inputs = [made(), made()], task_inputs("CAUSAL_LM", tokens())
    fusedprompt.apply(models[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT names the layers that it leaves without a prefix
        found, expected = step(models[1], **inputs), step(models[0], **inputs)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "num_beams": 2}
        new = [model.generate(input_ids=tokens(), **options) for model in models]
    assert_close(found, expected)
    assert torch.equal(*new)


def test_a_prefix_that_peft_gives_some_layers_alone_is_refused(tmp_path: Any) -> None:
    theirs = peft.get_peft_model(
        build("Gemma4ForCausalLM", **GROUPED), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base model's keys, 4 heads of width 8, 2 heads of width 512, got 1024 for 2"):
        fusedprompt.PromptModel.from_pretrained(build("Gemma4ForCausalLM", **GROUPED), tmp_path)


@pytest.mark.parametrize(("family", "window"), [("Gemma2", 8), ("Mistral", 8), ("Mistral", 64)])
@pytest.mark.parametrize("rows", [5, 12])
@torch.no_grad()
def test_a_prefix_from_a_text_longer_than_a_window_is_its_beginning(family: str, window: int, rows: int) -> None:
    base = plain(family, sliding_window=window)
    config = fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows)
    model = fusedprompt.get_prompt_model(base, config).eval()
    text = " ".join("a" * (1 + 7 * index % 20) for index in range(20))
    tokenizer: Any = Words(template=False)
    fusedprompt.initialize_kv_prefix_from_text(model, tokenizer, text=text)
    begin, more = torch.tensor([[2 + len(word) for word in text.split()]])[:, :rows], tokens(3, 9)
    right = base(input_ids=torch.cat((begin.expand(3, -1), more), 1)).logits[:, rows:]
    assert_close({"logits": model(input_ids=more).logits}, {"logits": right})
    cache = base(input_ids=tokens(1, 20), use_cache=True).past_key_values  # of the last positions alone
    if window == 8:
        with pytest.raises(ValueError, match=rf"the first {rows} positions, got layer \d with a window, which holds"):
            fusedprompt.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    model.add_adapter("rows", fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rows))
    if rows > window:
        with pytest.raises(ValueError, match="12 positions do not fit into the base model's window of 8"):
            fusedprompt.initialize_kv_prefix_from_adapter(model, source="rows")
        assert model.sharing.objection is None  # of shorter prompts


# Refused before a base model runs into a shape


@pytest.mark.parametrize(
    ("name", "task", "reason"),
    [
        ("BltForCausalLM", "CAUSAL_LM", "does not say how many layers a cache of it has"),
        ("CpmAntForCausalLM", "CAUSAL_LM", "reads ids alone, and puts a prompt of its own in front of them"),
        ("DeepseekV4ForCausalLM", "CAUSAL_LM", "keeps a state that is not a key/value cache"),
        ("EsmcForTokenClassification", "TOKEN_CLS", "the base model does not fill the cache that it is given"),
        ("ProphetNetForConditionalGeneration", "SEQ_2_SEQ_LM", "ProphetNetModel says AssertionError"),
        ("FSMTForConditionalGeneration", "SEQ_2_SEQ_LM", "text behind its decoder's cache is not what it is without"),
    ],
)
def test_a_base_model_that_cannot_read_a_prefix_is_refused_when_it_gets_one(name: str, task: str, reason: str) -> None:
    fields = {"task_type": task, "num_virtual_tokens": 4, "num_attention_heads": 4, "num_layers": 2}
    with pytest.raises(ValueError, match=f"base_model: expected one .*{reason}"):
        fusedprompt.get_prompt_model(build(name), fusedprompt.PrefixTuningConfig(**fields))


def test_patched_with_corrections_it_is_refused_in_the_same_words() -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = peft.get_peft_model(build("EuroBertForSequenceClassification"), config)
    fusedprompt.apply(model, fix=True)
    with pytest.raises(ValueError, match="expected one that reads a prefix of PREFIX_TUNING, but"):
        model(input_ids=tokens())


# Padding, and rows whose prefixes differ in length


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BartForSequenceClassification", "SEQ_CLS"),
        ("T5ForSequenceClassification", "SEQ_CLS"),
        ("BartForConditionalGeneration", "SEQ_2_SEQ_LM"),  # its encoder has positions of columns
        ("SwitchTransformersForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ],
)
@torch.no_grad()
def test_padding_of_an_encoder_before_a_decoder_does_not_count(name: str, task: str) -> None:
    base = build(name)
    model = fusedprompt.get_prompt_model(base, fusedprompt.PrefixTuningConfig(task_type=task, num_virtual_tokens=4))
    ids = tokens(3, 7).masked_fill(torch.arange(7) == 6, 2)  # the classifiers read the end-of-text token
    given = {"labels": tokens(3, 5)} if task == "SEQ_2_SEQ_LM" else {}
    right = model.eval()(input_ids=ids, **given).logits
    for left in (3, 0):
        padded, mask = pad(ids, left, 3 - left)
        assert_close({"logits": model(input_ids=padded, attention_mask=mask, **given).logits}, {"logits": right})
        if task == "SEQ_2_SEQ_LM":
            new = [model.generate(input_ids=one, pad_token_id=PAD) for one in (ids, padded)]
            assert torch.equal(*new)


@pytest.mark.parametrize(
    ("name", "task", "refused"),
    [
        ("T5ForSequenceClassification", "SEQ_CLS", False),
        ("T5GemmaForSequenceClassification", "SEQ_CLS", True),
        ("PegasusXForConditionalGeneration", "SEQ_2_SEQ_LM", True),
        ("NllbMoeForConditionalGeneration", "SEQ_2_SEQ_LM", True),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", False),
        ("RoFormerForSequenceClassification", "SEQ_CLS", True),
        ("GPTNeoForQuestionAnswering", "QUESTION_ANS", True),  # its window of 20 is shorter than 9 + 14
    ],
)
@torch.no_grad()
def test_prefixes_of_two_lengths_are_served_unless_columns_count(name: str, task: str, refused: bool) -> None:
    fields = {"task_type": task, "num_attention_heads": None}
    model = fusedprompt.get_prompt_model(build(name), fusedprompt.PrefixTuningConfig(**fields, num_virtual_tokens=4))
    model.add_adapter("long", fusedprompt.CartridgeConfig(**fields, num_virtual_tokens=9))
    model.eval()
    ids, labels = tokens(2, 14).masked_fill(torch.arange(14) == 13, 2), tokens(2, 5)
    given = {"labels": labels} if task == "SEQ_2_SEQ_LM" else {}
    if refused:
        with pytest.raises(ValueError, match=r"(adapter_names|attention_mask): expected"):
            model(input_ids=ids, adapter_names=["default", "long"], **given)
        return
    mixed = model(input_ids=ids, adapter_names=["default", "long"], **given).logits
    for row, adapter in enumerate(("default", "long")):
        own = {key: value[row : row + 1] for key, value in {"input_ids": ids, **given}.items()}
        right = model(**own, adapter_names=[adapter]).logits
        assert_close({"logits": mixed[row : row + 1]}, {"logits": right})


@pytest.mark.parametrize("name", ["XLMRobertaXLForTokenClassification", "BioGptForTokenClassification"])
def test_a_loss_that_takes_labels_by_the_mask_is_that_of_the_tokens(name: str) -> None:
    config = fusedprompt.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4)
    model, ids = fusedprompt.get_prompt_model(build(name), config).eval(), tokens(3, 7)
    labels = ids % 2
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    right = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, right)
    padded, mask = pad(ids, 2, 2)
    wide = torch.nn.functional.pad(labels, (2, 2))
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask, labels=wide).loss, right)
    output.loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.any()


def test_peft_computes_that_loss_and_patched_it_stays_pefts() -> None:
    def made() -> Any:
        torch.manual_seed(7)
        config = peft.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4)
        return peft.get_peft_model(build("XLMRobertaXLForTokenClassification"), config).eval()

    theirs, model, inputs = made(), made(), task_inputs("TOKEN_CLS", tokens())
    inputs["labels"] %= 2
    fusedprompt.apply(model)
    assert_close(step(model, **inputs), step(theirs, **inputs))


# generate


@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_reading_a_text_in_chunks_is_refused_with_a_prompt(method: str) -> None:
    kind = getattr(fusedprompt, method)
    for name in ("LlamaForCausalLM", "BartForCausalLM"):  # transformers: a shape's error, and other tokens
        model = fusedprompt.get_prompt_model(build(name), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
        with pytest.raises(ValueError, match=r"prefill_chunk_size: expected None with a prompt, .* got 4"):
            model.generate(input_ids=tokens(), prefill_chunk_size=4, max_new_tokens=2)
        cache = model.generate(input_ids=tokens(), max_new_tokens=2, return_dict_in_generate=True)
        assert cache.past_key_values is not None


def test_assisted_decoding_behind_a_decoders_prefix_is_refused() -> None:
    config = fusedprompt.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(plain("T5", "SEQ_2_SEQ_LM"), config)
    with pytest.raises(fusedprompt.RouteUnavailable, match="in assisted decoding transformers cuts a decoder's mask"):
        model.generate(input_ids=tokens(1), prompt_lookup_num_tokens=2)


def test_a_table_that_peft_does_not_find_is_no_matter_for_a_prefix() -> None:
    def made() -> Any:
        torch.manual_seed(7)
        base = plain("Llama")
        base.resize_token_embeddings(80)
        base.config.vocab_size = 67
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        return peft.get_peft_model(base, config).eval()

    theirs, model = made(), made()
    assert model.word_embeddings is None
    patch = fusedprompt.apply(model)
    with torch.no_grad():
        assert_close({"logits": model(input_ids=tokens()).logits}, {"logits": theirs(input_ids=tokens()).logits})
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
        assert torch.equal(
            model.generate(input_ids=tokens(), **options), theirs.generate(input_ids=tokens(), **options)
        )
    assert "calls that went to PEFT" not in patch.report()


def test_a_longer_prefix_than_a_decoders_positions_is_named() -> None:
    config = fusedprompt.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=94)
    model = fusedprompt.get_prompt_model(plain("Bart", "SEQ_2_SEQ_LM"), config)
    with pytest.raises(ValueError, match=r"expected at most the base model's 96 positions, got 94 \+ 5 = 99"):
        model(**task_inputs("SEQ_2_SEQ_LM", tokens()))
