"""What is found out about a base model when it is first used, where its class does not tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fusedprompt
from by_hand import LENGTH, ROWS, alone, batch, llama, prompt_model, relative, text_of, why
from families.tiny import build


def check_rows(model: Any, given: dict[str, Tensor], **options: Any) -> None:
    logits = model(**given, logits="text", **options).logits
    for row in range(len(logits)):
        real = slice(None) if "attention_mask" not in given else given["attention_mask"][row] > 0
        assert relative(logits[row, real], alone(model, text_of(given, row))) < 2e-4


# Distances that count columns of the cache, and positions that the base model counts itself


@pytest.mark.parametrize("name", ["MptForCausalLM", "RoFormerForCausalLM"])
@torch.no_grad()
def test_padding_that_would_be_counted_is_spliced(name: str) -> None:
    model = prompt_model(build(name))
    assert why(model, **batch("none")) == "route shared"
    assert why(model, **batch("right")) == "route shared"
    assert "counts padding" in why(model, **batch("left"))
    with pytest.raises(fusedprompt.BackendUnavailable, match="counts padding"):
        model(**batch("left"), route="shared")
    for side in ("none", "right", "left"):
        check_rows(model, batch(side))


@torch.no_grad()
def test_mixed_prompts_of_such_a_model_are_spliced_where_they_are_padded() -> None:
    model = prompt_model(build("MptForCausalLM"))
    model.add_adapter("short", fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=11))
    model.eval()
    given = batch("none")
    names = ["default", "short", "default", "short"]
    assert "counts padding" in why(model, **given, adapter_names=names)
    logits = model(**given, adapter_names=names, logits="text").logits
    model.set_adapter("short")
    assert relative(logits[1], alone(model, given["input_ids"][1])) < 2e-4


@torch.no_grad()
def test_a_window_of_columns_that_no_cached_layer_knows_of() -> None:
    model = prompt_model(build("GPTNeoForCausalLM"))
    model.base_model.config.window_size = 20
    fresh = prompt_model(model.base_model)
    assert "window of 20" in why(fresh, **batch("none"))


@pytest.mark.parametrize("name", ["BartForCausalLM", "PegasusForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM"])
@pytest.mark.parametrize("route", ["auto", "splice"])
@torch.no_grad()
def test_decoders_that_count_positions_by_themselves_are_told_them(name: str, route: str) -> None:
    model = prompt_model(build(name))
    assert model.facts.causal and model.facts.tells_position_ids
    for side in ("none", "right", "left"):
        check_rows(model, batch(side), route=route)
    positions = torch.arange(7, 7 + LENGTH).unsqueeze(0)
    moved = model(**batch("none"), position_ids=positions, route=route, logits="text").logits
    plain = model(**batch("none"), route=route, logits="text").logits
    assert moved.shape == plain.shape


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
@pytest.mark.parametrize("route", ["auto", "splice"])
def test_their_generation_does_not_count_padding(options: dict[str, Any], route: str) -> None:
    base = build("BlenderbotSmallForCausalLM")
    for name in ("eos_token_id", "forced_eos_token_id"):
        setattr(base.generation_config, name, None)
    model, given = prompt_model(base), batch("left")
    found = model.generate(**given, max_new_tokens=4, do_sample=False, route=route, **options)[:, LENGTH:]
    copies = options.get("num_return_sequences", 1)
    for row in range(ROWS):
        ids = text_of(given, row).unsqueeze(0)
        right = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, route="splice", **options)
        assert torch.equal(found[row * copies : (row + 1) * copies], right[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["RobertaForCausalLM", "CamembertForCausalLM", "Data2VecTextForCausalLM"])
@torch.no_grad()
def test_positions_are_not_counted_from_pad_ids(name: str) -> None:
    base = build(name)
    model, given = prompt_model(base), batch("none")
    given["input_ids"][:, 3] = base.config.pad_token_id
    assert why(model, **given) == "route shared"
    check_rows(model, given)
    embeds = base.get_input_embeddings()(given["input_ids"])
    one, other = (model(inputs_embeds=embeds, labels=given["input_ids"], route=r).loss for r in ("auto", "splice"))
    assert one.item() == pytest.approx(other.item(), rel=1e-5)


@pytest.mark.parametrize("route", ["auto", "splice"])
@torch.no_grad()
def test_their_generation_begins_behind_the_padding_index(route: str) -> None:
    base = build("RobertaForCausalLM")
    base.generation_config.eos_token_id = None
    model, given = prompt_model(base), batch("left")
    found = model.generate(**given, max_new_tokens=3, do_sample=False, route=route)[:, LENGTH:]
    for row in range(ROWS):
        ids = text_of(given, row)
        for step in range(3):
            assert found[row, step] == alone(model, ids)[-1].argmax()
            ids = torch.cat((ids, found[row, step : step + 1]))


@torch.no_grad()
def test_numbers_that_a_model_keeps_from_two_on() -> None:
    model = prompt_model(build("MraForSequenceClassification"), "SEQ_CLS")
    assert model.facts.first_position == 2


@pytest.mark.parametrize("name", ["RwkvForCausalLM", "CpmAntForCausalLM"])
@torch.no_grad()
def test_padding_stands_where_the_base_model_does_not_see_it(name: str) -> None:
    model = prompt_model(build(name), rows=5)
    for side in ("left", "right"):
        given = batch(side)
        logits = model(**given, logits="text").logits[1]
        right = model(input_ids=text_of(given, 1).unsqueeze(0), logits="text").logits[0]
        assert relative(logits[given["attention_mask"][1] > 0], right) < 2e-4


@pytest.mark.parametrize("name", ["MobileBertForTokenClassification", "MPNetForTokenClassification"])
@torch.no_grad()
def test_encoders_that_count_columns_get_their_padding_last(name: str) -> None:
    model, given = prompt_model(build(name), "TOKEN_CLS"), batch("left")
    logits = model(**given).logits
    for row in range(ROWS):
        assert relative(logits[row, given["attention_mask"][row] > 0], alone(model, text_of(given, row))) < 2e-4


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_classifier_that_reads_the_last_column_of_an_encoder(side: str) -> None:
    model, given = prompt_model(build("XLNetForSequenceClassification"), "SEQ_CLS"), batch(side)
    model.add_adapter("short", fusedprompt.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=11))
    model.eval()
    right = model(input_ids=text_of(given, 1).unsqueeze(0)).logits[0]
    assert relative(model(**given).logits[1], right) < 2e-4
    mixed = model(**given, adapter_names=["short", "default", "short", "__base__"]).logits
    assert relative(mixed[1], right) < 2e-4


# Causality


@torch.no_grad()
def test_attention_to_the_right_by_configuration_or_argument() -> None:
    given = batch("none")
    model = prompt_model(llama(is_causal=False))
    assert not model.facts.causal
    check_rows(model, given)
    model = prompt_model(llama())
    assert why(model, **given) == "route shared"
    assert "is_causal" in why(model, **given, is_causal=False)
    assert why(model, **given, is_causal=None) == "route shared"
    one, other = (model(**given, is_causal=False, route=route).logits for route in ("auto", "splice"))
    assert torch.equal(one, other)
    assert "is_causal" in model.explain("generate", **given, is_causal=False)
    model.base_model.config.is_causal = False
    assert "is_causal=False" in why(model, **given)


@pytest.mark.parametrize("value", [False, 0, (), ""])
def test_falsy_arguments_are_judged_like_others(value: Any) -> None:
    model = prompt_model(llama())
    assert "unheard_of" in why(model, **batch("none"), unheard_of=value)
    assert why(model, **batch("none"), output_attentions=False) == "route shared"


def test_a_bidirectional_gemma_is_not_shared() -> None:
    base = build("Gemma3ForCausalLM")
    base.config.use_bidirectional_attention = True
    assert not prompt_model(base).facts.causal


# Losses, caches, memory


class Scaled(transformers.LlamaForCausalLM):
    """A loss that is made by the function, and then changed."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        given |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        output = super().forward(input_ids, **given, **kwargs)
        if labels is not None:
            output.loss = 0.5 * self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def test_a_loss_that_is_scaled_is_the_base_models_own() -> None:
    base = llama()
    base.__class__ = Scaled
    model, given = prompt_model(base), batch("none")
    assert why(model, **given) == "route shared"
    assert "makes its loss" in why(model, **given, labels=given["input_ids"])
    one, other = (model(**given, labels=given["input_ids"], route=route).loss for route in ("auto", "splice"))
    assert torch.equal(one, other)


@torch.no_grad()
def test_a_cache_that_cannot_be_given_is_found_out_before_the_call() -> None:
    model, given = prompt_model(build("ProphetNetForCausalLM")), batch("none")
    assert "AssertionError" in why(model, **given)
    assert torch.equal(model(**given).logits, model(**given, route="splice").logits)


@torch.no_grad()
def test_the_length_of_a_cache_is_read_from_a_layer_that_has_one() -> None:
    model, ids = prompt_model(build("MiniMaxForCausalLM"), rows=6), torch.randint(3, 80, (2, 9))
    cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    mask = torch.ones_like(ids)
    found = model(input_ids=ids[:, 6:], past_key_values=cache, attention_mask=mask).logits
    assert found.shape[1] == 3
    assert relative(found, model(input_ids=ids, logits="text").logits[:, 6:]) < 2e-4


def test_embeddings_that_a_base_model_would_write_into_are_copied() -> None:
    model = prompt_model(build("CTRLLMHeadModel"))
    embeds = model.word_embeddings(batch("none")["input_ids"]).detach().requires_grad_(True)
    before = embeds.detach().clone()
    assert why(model, inputs_embeds=embeds) == "route shared"
    model(inputs_embeds=embeds, labels=torch.zeros(ROWS, LENGTH, dtype=torch.int64)).loss.backward()
    assert torch.equal(embeds, before) and embeds.grad is not None
    rows = model.prompt_rows().clone()
    with torch.no_grad():
        for _ in range(3):
            model(**batch("none"))
    assert torch.equal(model.prompt_rows(), rows)
