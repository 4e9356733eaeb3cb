"""`generate` with a prompt: every way of generating, with PEFT and the unpadded call as oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from models import DECODERS, ENCODER_DECODERS, EOS, PAD, VOCAB, WIDTH, build, ours, pad, pair, tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_sequences_equal_peft(family: str, method: str) -> None:
    theirs, mine = pair(family, "CAUSAL_LM", method)
    ids = tokens()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = theirs.generate(**given, **GREEDY)
    actual = mine.generate(**given, **GREEDY)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[:, :7], ids)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beam_sequences_equal_peft(options: dict[str, int]) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", "MLP")
    given = {"input_ids": tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long), **GREEDY, **options}
    assert torch.equal(mine.generate(**given), theirs.generate(**given))


def test_samples_equal_peft_for_the_same_seed() -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", "MLP")
    given = {"input_ids": tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    sequences = []
    for model in (theirs, mine):
        torch.manual_seed(3)
        sequences.append(model.generate(**given, max_new_tokens=8, do_sample=True, top_k=20))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_encoder_decoder_sequences_equal_peft(family: str, options: dict[str, int]) -> None:
    theirs, mine = pair(family, "SEQ_2_SEQ_LM", "MLP")
    given = {"input_ids": tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long), **GREEDY, **options}
    assert torch.equal(mine.generate(**given), theirs.generate(**given))


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_does_not_change_what_is_generated(family: str) -> None:
    model = ours(family, method="MLP").double()
    rows = [tokens(1, length, seed=length) for length in (7, 4)]
    alone = [
        model.generate(input_ids=row, attention_mask=torch.ones_like(row), **GREEDY)[:, row.shape[1] :] for row in rows
    ]
    padded = [pad(row, 7 - row.shape[1], 0) for row in rows]
    ids, mask = (torch.cat(parts) for parts in zip(*padded))
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, 7:]
    for row, expected in enumerate(alone):
        length = expected.shape[1]  # a row may have ended early, and is padded in the batch
        assert torch.equal(together[row : row + 1, :length], expected)


def test_left_padding_is_found_by_the_pad_token_when_no_mask_is_given() -> None:
    model = ours("Llama")
    ids, mask = pad(tokens(2, 5), 3, 0)
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(input_ids=ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mistral", "Gemma"])
def test_static_cache_generates_what_a_dynamic_cache_does(family: str, left: int) -> None:
    model = ours(family)
    ids, mask = pad(tokens(), left, 0)
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY, "disable_compile": True}
    assert torch.equal(model.generate(**given, cache_implementation="static"), model.generate(**given))


def test_without_a_cache_the_same_is_generated_with_a_warning() -> None:
    model = ours("Llama")
    with pytest.warns(UserWarning, match="use_cache=False is ignored"):
        uncached = model.generate(input_ids=tokens(), use_cache=False, **GREEDY)
    assert torch.equal(uncached, model.generate(input_ids=tokens(), **GREEDY))


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_assisted_decoding_generates_what_greedy_decoding_does(family: str, kind: str, left: int) -> None:
    model = ours(family, method="MLP")
    ids, mask = pad(tokens(1).repeat(1, 2), left, 0)
    options = {"prompt_lookup_num_tokens": 2} if kind == "prompt lookup" else {"assistant_model": build(family, seed=4)}
    plain = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **options), plain)
    output = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY, **options)
    assert torch.equal(output.sequences, plain)
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
def test_continuing_from_a_returned_cache_equals_starting_over(family: str, left: int) -> None:
    model = ours(family, method="MLP").double()
    ids, mask = pad(tokens(), left, 0)
    first = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY, eos_token_id=None
    )
    turn = tokens(3, 2, seed=9)
    conversation = torch.cat((first.sequences, turn), 1)
    whole = torch.cat((mask, torch.ones(3, conversation.shape[1] - mask.shape[1], dtype=torch.long)), 1)
    given = {"attention_mask": whole, **GREEDY}
    expected = model.generate(input_ids=conversation, **given)
    continued = model.generate(input_ids=conversation, past_key_values=first.past_key_values, **given)
    assert torch.equal(continued, expected)


def test_generating_from_embeddings_returns_the_new_tokens() -> None:
    model = ours("Llama")
    ids = tokens()
    expected = model.generate(input_ids=ids, **GREEDY)[:, 7:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY), expected)


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_max_length_counts_text_and_not_the_prompt(where: str) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", "PROMPT")
    options = {"max_length": 10, "min_length": 9, "do_sample": False}
    if where == "generation_config":
        options = {"generation_config": transformers.GenerationConfig(**options, pad_token_id=PAD, eos_token_id=EOS)}
    given = {"input_ids": tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    expected = theirs.generate(**given, **options)
    actual = mine.generate(**given, **options)
    assert actual.shape[1] <= 10
    assert torch.equal(actual, expected)
    if where == "generation_config":
        assert options["generation_config"].max_length == 10  # the caller's object is as it was


def test_processors_see_the_text_and_not_the_prompt() -> None:
    model = ours("Llama")
    seen = []

    def spy(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return scores

    ids = tokens()
    model.generate(input_ids=ids, logits_processor=transformers.LogitsProcessorList([spy]), **GREEDY)
    assert torch.equal(seen[0], ids)
    penalised = model.generate(input_ids=ids, no_repeat_ngram_size=1, eos_token_id=None, **GREEDY)
    assert all(row.unique().numel() == row.numel() for row in penalised[:, 7:])


def test_generating_from_nothing_starts_with_bos() -> None:
    model = ours("GPT2")
    assert model.generate(**GREEDY)[0, 0].item() == 2
    llama = ours("Llama", bos_token_id=None)
    with pytest.raises(ValueError, match="bos_token_id"):
        llama.generate(**GREEDY)


def test_generate_leaves_the_base_model_as_it_was() -> None:
    for family, task in (("Llama", "CAUSAL_LM"), ("T5", "SEQ_2_SEQ_LM")):
        model = ours(family, task)
        before = dict(vars(model.base_model))
        model.generate(input_ids=tokens(), **GREEDY)
        assert {k: v for k, v in vars(model.base_model).items() if k not in before} == {}
        assert "prepare_inputs_for_generation" not in vars(model.base_model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": tokens(), "input_ids": tokens()}, "inputs, input_ids"),
        ({"input_ids": tokens(), "max_length": 7}, "max_length: expected more than the 7 tokens"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(3, 9)}, "attention_mask: expected shape"),
        ({"input_ids": tokens(), "logits": "text"}, "logits: expected None in generate, got 'text'"),
        ({"input_ids": tokens(), "pool_index": torch.zeros(3)}, "pool_index: expected None in generate"),
        ({"input_ids": tokens()[0]}, r"input_ids: expected shape \(B, T\), got \(7,\)"),
        ({"input_ids": tokens().float()}, "input_ids: expected int64 or int32 ids, got torch.float32"),
        ({"input_ids": tokens() + VOCAB}, rf"input_ids: expected ids in \[0, {VOCAB}\), got"),
        ({"inputs_embeds": torch.zeros(3, 7)}, r"inputs_embeds: expected shape \(B, T, D\), got \(3, 7\)"),
        ({"inputs_embeds": torch.zeros(3, 7, 5)}, "inputs_embeds: expected shape"),
        ({"inputs_embeds": torch.zeros(3, 7, WIDTH).long()}, "inputs_embeds: expected a floating-point dtype"),
    ],
)
def test_bad_arguments_of_generate_are_named(given: dict[str, Any], message: str) -> None:
    for route in ("auto", "splice"):
        with pytest.raises((ValueError, TypeError, IndexError), match=message):
            ours("Llama", rows=20).generate(**given, route=route)
