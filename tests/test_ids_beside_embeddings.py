"""Families that read ids beside embeddings, or in their place; and `generate` of those that take no embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3nTextConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nPreTrainedModel

import by_hand
import fusedprompt
from by_hand import LENGTH, PROMPT, ROWS, prompt_model, relative, text_of
from families.tiny import build

LAYERED = ["Gemma3nForCausalLM", "Gemma4ForCausalLM"]


class Gemma3nForSequenceClassification(GenericForSequenceClassification, Gemma3nPreTrainedModel):  # type: ignore[misc]
    config: Gemma3nTextConfig


def batch() -> dict[str, Tensor]:
    """Padded by token 7: the padding token's embedding is zero, where Gemma 3n's own gradients are no numbers."""
    return by_hand.batch("left", 7)


def joined_output(base: Any, rows: Tensor, ids: Tensor, **others: Any) -> Any:
    """The output of one row: embeddings and layer inputs, joined; token 0 stands in for the prompt's."""
    text = next(part for part in base.modules() if hasattr(part, "get_per_layer_inputs"))
    wide = torch.cat((torch.zeros(len(rows), dtype=torch.int64), ids)).unsqueeze(0)
    embeds = torch.cat((rows, base.get_input_embeddings()(ids))).unsqueeze(0)
    return base(inputs_embeds=embeds, per_layer_inputs=text.get_per_layer_inputs(wide), **others)


@pytest.mark.parametrize("name", LAYERED)
def test_text_keeps_the_inputs_of_its_layers(name: str) -> None:
    model, given = prompt_model(build(name)), batch()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    gradients = {}
    for route in ("auto", "splice"):
        model.zero_grad()
        output = model(**given, labels=labels, route=route)
        output.loss.backward()
        gradients[route] = output.loss.detach(), model.prompt_encoder["default"].embedding.weight.grad.clone()
        logits = model(**given, route=route, logits="text").logits
        for row in range(ROWS):
            ids = text_of(given, row)
            right = joined_output(model.base_model, model.prompt_rows(), ids).logits[0, PROMPT:]
            assert relative(logits[row, -len(ids) :], right) < 2e-4
    assert gradients["auto"][0].item() == pytest.approx(gradients["splice"][0].item(), rel=1e-5)
    assert relative(gradients["auto"][1], gradients["splice"][1]) < 2e-3


def test_a_family_of_that_kind_is_shared() -> None:
    model, given = prompt_model(build("Gemma3nForCausalLM")), batch()
    assert model.explain(**given).splitlines()[0] == "route shared"


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_it_generates(name: str, options: dict[str, Any]) -> None:
    base = build(name)
    base.generation_config.eos_token_id = None
    model, given = prompt_model(base), batch()
    found = model.generate(**given, max_new_tokens=3, do_sample=False, **options)
    assert torch.equal(found[:, :LENGTH], given["input_ids"])
    again = model.generate(**given, max_new_tokens=3, do_sample=False, route="splice", **options)
    assert torch.equal(found, again)
    if options:
        return
    with torch.no_grad():
        for row in range(ROWS):
            ids = text_of(given, row)
            for step in range(3):
                token = joined_output(base, model.prompt_rows(), ids).logits[0, -1].argmax()
                assert found[row, LENGTH + step] == token
                ids = torch.cat((ids, token.view(1)))


def test_it_classifies() -> None:
    config = copy.deepcopy(build("Gemma3nForCausalLM").config)
    config.num_labels, config.pad_token_id = 3, 7
    base = Gemma3nForSequenceClassification(config).eval()
    model, given = prompt_model(base, "SEQ_CLS"), batch()
    for route in ("auto", "splice"):
        logits = model(**given, route=route, labels=torch.tensor([0, 1, 2, 0])).logits
        for row in range(ROWS):
            ids = text_of(given, row)
            right = joined_output(base, model.prompt_rows(), ids).logits[0]
            assert relative(logits[row], right) < 2e-4


@torch.no_grad()
def test_embeddings_alone_need_the_inputs_of_the_layers() -> None:
    model, given = prompt_model(build("Gemma4ForCausalLM")), batch()
    ids = given.pop("input_ids")
    embeds = model.word_embeddings(ids)
    with pytest.raises(ValueError, match="inputs_embeds: expected per_layer_inputs"):
        model(inputs_embeds=embeds, **given)
    own = model.base_model.model.get_per_layer_inputs(ids)
    found = model(inputs_embeds=embeds, per_layer_inputs=own, **given, logits="text").logits
    right = model(input_ids=ids, **given, logits="text").logits
    assert relative(found[0], right[0]) < 2e-4 and relative(found[1, 6:], right[1, 6:]) < 2e-4


@pytest.mark.parametrize("name", LAYERED)
def test_apply_serves_what_peft_degrades_or_refuses(name: str) -> None:
    peft = pytest.importorskip("peft")
    base = build(name)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    theirs, given = peft.get_peft_model(base, config).eval(), batch()
    try:
        expected = theirs(**given).logits.detach()
    except RuntimeError as error:
        assert "inputs_embeds" in str(error) and name == "Gemma4ForCausalLM"
        expected = None
    rows = theirs.get_prompt(1)[0].detach()
    for fix in (False, True):
        with fusedprompt.apply(theirs, fix=fix):
            found = theirs(**given).logits.detach()
        if expected is not None and not fix:
            assert relative(found, expected) < 2e-4  # embeddings alone, as PEFT gives them
        else:
            right = joined_output(base, rows, given["input_ids"][0]).logits[0]
            assert relative(found[0], right) < 2e-4


# Ids in place of embeddings


@torch.no_grad()
def test_a_bart_classifier_reads_the_prompt_as_ids_of_its_own() -> None:
    base = build("BartForSequenceClassification")
    model, given = prompt_model(base, "SEQ_CLS"), batch()
    eos, rows = base.config.eos_token_id, model.prompt_rows()
    given["input_ids"][given["input_ids"] == eos] = 5
    given["input_ids"][:, -1] = eos
    # By hand: a vocabulary with the prompt's rows behind it.
    larger = copy.deepcopy(base)
    tied = larger.model.shared.weight
    size = len(tied)
    table = nn.Parameter(torch.cat((tied, rows)))
    for part in larger.modules():
        if isinstance(part, nn.Embedding) and part.weight.shape == tied.shape:
            part.weight = table
    found = model(**given).logits
    for row in range(ROWS):
        ids = torch.cat((torch.arange(size, size + PROMPT), text_of(given, row))).unsqueeze(0)
        assert relative(found[row], larger(input_ids=ids).logits[0]) < 2e-4
    with pytest.raises(ValueError, match="inputs_embeds: expected input_ids, because BartForSequenceClassification"):
        model(inputs_embeds=model.word_embeddings(given["input_ids"]))


def test_a_bart_classifier_trains() -> None:
    base = build("BartForSequenceClassification")
    model, given = prompt_model(base, "SEQ_CLS"), batch()
    given["input_ids"][given["input_ids"] == base.config.eos_token_id] = 5
    given["input_ids"][:, -1] = base.config.eos_token_id
    labels, weight = torch.tensor([0, 1, 0, 1]), model.prompt_encoder["default"].embedding.weight
    model(**given, labels=labels).loss.backward()
    step = 1e-2 * torch.randn_like(weight)
    with torch.no_grad():
        expected = (weight.grad * step).sum()
        weight += step
        more = model(**given, labels=labels).loss
        weight -= 2 * step
        less = model(**given, labels=labels).loss
    assert float((more - less) / 2) == pytest.approx(float(expected), rel=0.05)


@torch.no_grad()
def test_a_questions_answers_of_an_encoder_decoder() -> None:
    model, given = prompt_model(build("BartForQuestionAnswering"), "QUESTION_ANS"), batch()
    output = model(**given)
    assert output.start_logits.shape == (ROWS, LENGTH)
    one = model(input_ids=text_of(given, 1).unsqueeze(0)).start_logits[0]
    assert relative(output.start_logits[1, 6:], one) < 2e-4


BY_IDS = ["BambaForCausalLM", "CTRLLMHeadModel", "OpenAIGPTLMHeadModel", "FalconH1ForCausalLM", "NemotronHForCausalLM"]


@pytest.mark.parametrize("name", BY_IDS)
@torch.no_grad()
def test_generate_of_families_that_take_no_embeddings_there(name: str) -> None:
    base = build(name)
    base.generation_config.eos_token_id = None
    model, given = prompt_model(base), batch()
    found = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert torch.equal(found[:, :LENGTH], given["input_ids"])
    embed, rows = base.get_input_embeddings(), model.prompt_rows()
    for row in range(ROWS):
        ids = text_of(given, row)
        for step in range(3):
            token = base(inputs_embeds=torch.cat((rows, embed(ids))).unsqueeze(0)).logits[0, -1].argmax()
            assert found[row, LENGTH + step] == token
            ids = torch.cat((ids, token.view(1)))
    scored = model.generate(
        **given, max_new_tokens=3, num_beams=2, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    )
    assert scored.sequences.shape == (2 * ROWS, LENGTH + 3) and len(scored.scores) == 3


@torch.no_grad()
def test_mixed_prompts_generate_by_ids() -> None:
    base = build("CTRLLMHeadModel")
    base.generation_config.eos_token_id = None
    model, given = prompt_model(base), batch()
    model.add_adapter("short", fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=11))
    model.eval()
    names = ["default", "short", "__base__", "short"]
    found = model.generate(**given, adapter_names=names, max_new_tokens=3, do_sample=False)
    for row, name in enumerate(names):
        ids = text_of(given, row).unsqueeze(0)
        if name == "__base__":
            right = base.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        else:
            model.set_adapter(name)
            right = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(found[row, LENGTH:], right[0, ids.shape[1] :])


def test_a_streamer_is_not_shown_the_prompts_columns() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append("end")

    model, streamer = prompt_model(build("BambaForCausalLM")), Streamer()
    ids = batch()["input_ids"][:1]
    found = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert streamer.seen == [*found[0].tolist(), "end"]


# Errors of a base model, with their reason


@pytest.mark.parametrize(
    ("name", "task", "error", "said"),
    [
        ("DeepseekV4ForCausalLM", "CAUSAL_LM", ValueError, "DeepseekV4ForCausalLM does not: AttributeError"),
        ("LayoutLMv3ForSequenceClassification", "SEQ_CLS", ValueError, "LayoutLMv3ForSequenceClassification does not"),
        ("IBertForSequenceClassification", "SEQ_CLS", TypeError, "gives a tensor|give a tensor"),
        ("MusicgenForCausalLM", "CAUSAL_LM", TypeError, "adds up 4"),
        ("CanineForTokenClassification", "TOKEN_CLS", TypeError, "a model with input embeddings"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    name: str, task: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        prompt_model(build(name), task, 4)(**batch())


def test_an_error_of_the_call_stays_what_it_is() -> None:
    model, given = prompt_model(build("LlamaForCausalLM")), batch()
    with pytest.raises(IndexError):
        model(**given, labels=torch.full((ROWS, LENGTH), 1000))

    def fail(*_: Any) -> None:
        raise RuntimeError("a hook of the user's")

    model.base_model.lm_head.register_forward_hook(fail)
    for route in ("auto", "splice"):
        with pytest.raises(RuntimeError, match="a hook of the user's"):
            model(**given, route=route)


@torch.no_grad()
def test_global_attention_covers_no_virtual_token() -> None:
    model, given = prompt_model(build("LEDForConditionalGeneration"), "SEQ_2_SEQ_LM", 4), batch()
    one = torch.zeros_like(given["input_ids"])
    one[:, 0] = 1
    with_global = model(**given, labels=given["input_ids"], global_attention_mask=one).logits
    without = model(**given, labels=given["input_ids"]).logits
    assert with_global.shape == without.shape and not torch.equal(with_global, without)
    assert model.generate(**given, global_attention_mask=one, max_new_tokens=3).shape[0] == ROWS


def test_audio_is_no_place_for_a_prompt() -> None:
    model = prompt_model(build("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="input_ids: You have to provide either input_ids or inputs_embeds"):
        model(input_features=torch.zeros(2, 80, 10))


def test_weights_that_are_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    given, base = batch(), build("LlamaForCausalLM")
    expected = prompt_model(copy.deepcopy(base))
    accelerate.cpu_offload(base, execution_device="cpu")
    model = prompt_model(base)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(expected.prompt_rows())
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    for route in ("auto", "splice"):
        assert torch.allclose(model(**given, labels=labels, route=route).loss, expected(**given, labels=labels).loss)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), expected.generate(**given, **options))


@pytest.mark.parametrize("token", [80, 83, -1])
def test_ids_outside_the_vocabulary_are_no_prompt(token: int) -> None:
    given = batch()
    given["input_ids"][0, 3] = token
    base = build("BartForSequenceClassification")
    given["input_ids"][:, -1] = base.config.eos_token_id
    with pytest.raises(IndexError, match="input_ids: expected ids from 0 to 79"):
        prompt_model(base, "SEQ_CLS")(**given)
    with pytest.raises(IndexError, match="input_ids: expected ids from 0 to 79"):
        prompt_model(build("BambaForCausalLM")).generate(**given, max_new_tokens=2)


@pytest.mark.parametrize("name", ["CTRLLMHeadModel", "OpenAIGPTLMHeadModel"])
@torch.no_grad()
def test_n_grams_are_those_of_the_text(name: str) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    base = build(name)
    base.generation_config.eos_token_id = None
    model, ban = prompt_model(base), NoRepeatNGramLogitsProcessor(2)
    ids = torch.randint(3, 80, (1, 6))
    found = model.generate(ids, max_new_tokens=8, do_sample=False, no_repeat_ngram_size=2)
    text = ids
    for _ in range(8):
        joined = torch.cat((model.prompt_rows(), base.get_input_embeddings()(text[0]))).unsqueeze(0)
        token = ban(text, base(inputs_embeds=joined).logits[:, -1]).argmax(-1, keepdim=True)
        text = torch.cat((text, token), 1)
    assert torch.equal(found, text)
    forced = model.generate(ids, max_new_tokens=4, do_sample=False, forced_eos_token_id=7)
    assert forced[0, -1] == 7


@pytest.mark.parametrize("name", ["CTRLLMHeadModel", "Gemma3nForCausalLM"])
def test_without_a_cache_the_tokens_are_the_same(name: str) -> None:
    base = build(name)
    base.generation_config.eos_token_id = None
    model, given = prompt_model(base), batch()
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), model.generate(**given, **options, use_cache=False))


def test_errors_of_an_encoder_decoders_call_are_its_own() -> None:
    model, given = prompt_model(build("T5ForConditionalGeneration"), "SEQ_2_SEQ_LM", 4), batch()
    for call in (
        lambda: model(**given),
        lambda: model(**given, labels=given["input_ids"][:2]),
        lambda: model.generate(**given, unheard_of=1),
    ):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
            call()
        assert "prompt and text" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "error"), [([1, 2, 3, 4], TypeError), (torch.ones(ROWS), TypeError), (torch.ones(2).long(), ValueError)]
)
def test_answers_that_do_not_fit_are_named(value: Any, error: type[Exception]) -> None:
    model, given = prompt_model(build("BertForQuestionAnswering"), "QUESTION_ANS", 4), batch()
    with pytest.raises(error, match="start_positions"):
        model(**given, start_positions=value, end_positions=torch.ones(ROWS, dtype=torch.int64))


def test_caches_and_masks_of_another_type_are_named() -> None:
    model, given = prompt_model(build("LlamaForCausalLM")), batch()
    with pytest.raises(TypeError, match="past_key_values: expected a cache"):
        model(**given, past_key_values="abc")
    with pytest.raises(TypeError, match="attention_mask"):
        model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"].tolist())
