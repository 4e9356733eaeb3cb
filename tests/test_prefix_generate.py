"""`generate` behind a prefix: PEFT's tokens, every mode that the base model has, and rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fusedprompt
from mixtures import BASE
from models import PAD, config_fields, ours, pad, pair, tokens

FAMILIES = ("Llama", "GPT2", "Mistral", "Gemma2", "OPT", "Bloom")


def generate(model: Any, **given: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": None}
    return model.generate(**{**options, **given})


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "PREFIX") for family in FAMILIES), ("Llama", "PROJECTED"), ("Llama", "CARTRIDGE"), ("T5", "PREFIX")],
)
def test_tokens_are_those_of_peft(family: str, method: str) -> None:
    task = "SEQ_2_SEQ_LM" if family == "T5" else "CAUSAL_LM"
    odd: dict[str, Any] = {"num_layers": 3, "num_decoder_layers": 3} if family == "T5" else {}
    theirs, mine = pair(family, task, method, **odd)
    for options in ({}, {"num_beams": 3}):
        given = {"input_ids": tokens(), "output_scores": True, "return_dict_in_generate": True, **options}
        found, expected = generate(mine, **given), generate(theirs, **given)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.scores, expected.scores)
        with mine.disable_adapter():
            assert not torch.allclose(found.scores[0], generate(mine, **given).scores[0], rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_gives_the_same_tokens(family: str) -> None:
    model, ids = ours(family, method="PREFIX"), tokens()
    expected = generate(model, input_ids=ids)
    modes: list[tuple[str, dict[str, Any]]] = [
        ("static", {"cache_implementation": "static"}),
        ("no cache", {"use_cache": False}),
        ("own cache", {"past_key_values": transformers.DynamicCache(config=model.base_model.config)}),
        ("hidden states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    ]
    for name, options in modes:
        found = generate(model, input_ids=ids, **options)
        found = found if isinstance(found, Tensor) else found.sequences
        assert torch.equal(found, expected), name
    padded, mask = pad(ids, 3, 0)
    assert torch.equal(generate(model, input_ids=padded, attention_mask=mask)[:, 3:], expected)
    embeds = model.base_model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, inputs_embeds=embeds), expected[:, 7:])
    looked_up = generate(model, input_ids=ids[:1], prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, expected[:1])
    begun = generate(model, input_ids=ids, max_new_tokens=3, return_dict_in_generate=True)
    cache = begun.past_key_values
    assert torch.equal(generate(model, input_ids=begun.sequences, past_key_values=cache, max_new_tokens=3), expected)


@pytest.mark.parametrize("family", ["Llama", "T5"])
def test_rows_of_several_prefixes_are_those_rows_alone(family: str) -> None:
    task = "SEQ_2_SEQ_LM" if family == "T5" else "CAUSAL_LM"
    model = ours(family, task, "PREFIX", rows=2)
    model.add_adapter("long", fusedprompt.PrefixTuningConfig(**config_fields("PROJECTED", task, 5)[1]))
    names, ids = ["long", "default", BASE], tokens()
    for options in ({}, {"num_beams": 2}):
        mixed = generate(model, input_ids=ids, adapter_names=names, **options)
        for row, name in enumerate(names):
            alone = generate(model, input_ids=ids[row : row + 1], adapter_names=[name], **options)
            assert torch.equal(mixed[row : row + 1], alone)


def test_encoder_decoders_go_on_from_what_is_there() -> None:
    model, ids = ours("Bart", "SEQ_2_SEQ_LM", "PREFIX"), tokens()
    expected = generate(model, input_ids=ids)
    encoded = model.base_model.get_encoder()(input_ids=ids, return_dict=True)
    assert torch.equal(generate(model, encoder_outputs=encoded), expected)
    padded, mask = pad(ids, 0, 3)
    assert torch.equal(generate(model, input_ids=padded, attention_mask=mask), expected)
    for options in ({"use_cache": False}, {"generation_config": transformers.GenerationConfig(use_cache=False)}):
        with pytest.warns(UserWarning, match="use_cache=False is ignored: a decoder's prefix stands in its cache"):
            found = generate(model, input_ids=ids, bos_token_id=None, decoder_start_token_id=PAD, **options)
        assert torch.equal(found, expected)
    begun = generate(model, input_ids=ids, decoder_input_ids=expected[:, :4], max_new_tokens=3)
    assert torch.equal(begun, expected)
    forced = model(input_ids=ids, decoder_input_ids=expected[:, :-1]).logits.argmax(-1)
    assert torch.equal(forced, expected[:, 1:])


def test_what_cannot_hold_a_prefix_is_refused_with_the_reason() -> None:
    model, ids = ours("Llama", method="PREFIX"), tokens()
    for options, reason in (
        ({"cache_implementation": "offloaded"}, "transformers makes the cache of kind 'offloaded' by itself"),
        ({"position_ids": torch.arange(7).unsqueeze(0)}, "transformers counts position_ids behind a prefix by itself"),
    ):
        with pytest.raises(fusedprompt.RouteUnavailable, match=f"route 'prefix' cannot run: {reason}"):
            generate(model, input_ids=ids, **options)
    with pytest.raises(
        fusedprompt.RouteUnavailable, match="route 'splice' cannot run: PREFIX_TUNING is keys and values"
    ):
        generate(model, input_ids=ids, route="splice")
    of_decoder = ours("Bart", "SEQ_2_SEQ_LM", "PREFIX")
    with pytest.raises(fusedprompt.RouteUnavailable, match="an encoder-decoder's prefix stands in a cache that grows"):
        generate(of_decoder, input_ids=ids, cache_implementation="static")
    windowed = ours("Mistral", method="PREFIX", sliding_window=8)
    generate(windowed, input_ids=ids[:, :3])  # beyond the window
    padded, mask = pad(ids[:, :3], 2, 0)
    with pytest.raises(ValueError, match=r"without padding at the left.*15 positions are more than its window of 8"):
        generate(windowed, input_ids=padded, attention_mask=mask)
    with pytest.raises(fusedprompt.RouteUnavailable, match="13 positions do not fit into the base model's window of 8"):
        generate(windowed, input_ids=ids[:, :3], cache_implementation="static")


def test_explain_names_the_route_and_shows_the_prefix_in_front() -> None:
    model = ours("Llama", method="CARTRIDGE")
    said = (
        "default, active: CARTRIDGE, 4 virtual tokens, route prefix: its keys and values stand in the cache, head_loss"
    )
    assert said in model.explain()
    ids, mask = pad(tokens(2, 3), 2, 0)
    for method in ("forward", "generate"):
        said = model.explain(method, input_ids=ids, attention_mask=mask)
        assert said == "route prefix\nrow 0: P P P P · · t t t"
    model.add_adapter("short", fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    said = model.explain(input_ids=tokens(3, 2), adapter_names=["short", "default", BASE])
    assert said.splitlines()[1:] == [
        "short, 1 row, row 0: · · P P t t",
        "default, 1 row, row 1: Q Q Q Q t t",
        "__base__, 1 row, row 2: · · · · t t",
    ]


def test_a_prefix_is_one_copy_until_attention_reads_it() -> None:
    model = ours("Llama", method="PROJECTED")
    runs: list[int] = []
    model.prompt_encoder["default"].register_forward_hook(lambda *_: runs.append(1))
    generate(model, input_ids=tokens(8))
    assert len(runs) == 1  # the hook watches it, so it is made for this call, and not for each of its six steps


def test_a_static_cache_whose_empty_columns_would_count_is_refused_by_that_name() -> None:
    base = transformers.MptForCausalLM(transformers.MptConfig(vocab_size=67, d_model=32, n_heads=4, n_layers=2)).eval()
    config = fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=4)
    model = fusedprompt.get_prompt_model(base, config).eval()
    assert generate(model, input_ids=tokens()).shape == (3, 13)
    with pytest.raises(ValueError, match=r"rows without .* a static cache's empty columns, because .* it counts"):
        generate(model, input_ids=tokens(), cache_implementation="static")
