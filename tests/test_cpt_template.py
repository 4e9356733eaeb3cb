"""CPT from examples in words: ids, masks and type codes of contexts and batches; contexts with a mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fusedprompt as fp
from mixtures import ROUTES, assert_close, gradients
from models import build, tokens
from tolerance import largest, one_thread  # noqa: F401
from word_tokenizers import word_tokenizer

TEMPLATE = '[anchor "the capital of"] [country] [anchor "is"] [city]'
EXAMPLES = [{"country": "france", "city": "paris"}, {"country": "italy a", "city": "the rome"}]
BATCH = [{"country": "a big france", "city": "paris"}, {"country": "italy", "city": "rome city"}]


def words(tokenizer: Any, ids: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_a_context_has_the_words_and_codes_of_its_examples() -> None:
    tokenizer = word_tokenizer("llama")
    template = fp.CPTTemplate.parse(TEMPLATE, between="no")
    found = template.context(EXAMPLES, tokenizer)
    assert words(tokenizer, found["cpt_token_ids"]) == (
        "<s> the capital of france is paris no the capital of italy a is the rome no"
    )
    assert found["cpt_tokens_type_mask"] == [0, 1, 1, 1, 2, 3, 4, 0, 5, 5, 5, 6, 6, 7, 8, 8, 0]
    assert found["cpt_mask"] == [1] * 17
    config = template.config(EXAMPLES, tokenizer, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.9)
    assert {name: getattr(config, name) for name in found} == found and config.num_virtual_tokens == 17
    assert config.opt_loss_decay_factor == 0.9 and config.task_type == "CAUSAL_LM"
    theirs = peft.CPTConfig(**{name: value for name, value in config.to_dict().items() if name != "peft_type"})
    assert theirs.cpt_tokens_type_mask == found["cpt_tokens_type_mask"]


@pytest.mark.parametrize(
    ("text", "label", "codes"),
    [
        ("[country] [city]", None, [2, 4]),
        ("[city] [country]", "city", [4, 2]),
        ('[country] [anchor "is"] [sep] [anchor "a"] [city] [anchor "yes"]', None, [2, 1, 3, 4, 3]),
        ('[anchor 9 8] [city] [anchor "yes"] [country] [anchor "no"]', "city", [1, 1, 4, 1, 2, 3]),
    ],
)
def test_words_belong_to_the_side_on_which_they_stand(text: str, label: str | None, codes: list[int]) -> None:
    template = fp.CPTTemplate.parse(text, label, between="")
    tokenizer = word_tokenizer("gpt2")
    assert template.context(EXAMPLES[:1], tokenizer)["cpt_tokens_type_mask"] == codes
    assert fp.CPTTemplate.parse(str(template), label, between="") == template


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_codes_and_labels_for_its_answers(side: str) -> None:
    tokenizer = word_tokenizer("llama", padding_side=side)
    template = fp.CPTTemplate.parse(TEMPLATE)
    batch = template.render(BATCH, tokenizer)
    short = "the capital of italy is rome city"
    padded = f"<pad> {short}" if side == "left" else f"{short} <pad>"
    assert [words(tokenizer, row) for row in batch["input_ids"]] == ["the capital of a big france is paris", padded]
    codes = [0] * (side == "left") + [1, 1, 1, 2, 3, 4, 4] + [0] * (side == "right")
    assert batch["input_type_mask"].tolist() == [[1, 1, 1, 2, 2, 2, 3, 4], codes]
    assert batch["attention_mask"][1].tolist() == [int(code > 0) for code in codes]
    assert batch["labels"].tolist() == batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).tolist()
    questions = template.render([{"country": one["country"]} for one in BATCH], tokenizer, answers=False)
    assert questions.keys() == {"input_ids", "attention_mask"}
    assert words(tokenizer, questions["input_ids"][1]) == "<pad> <pad> the capital of italy is"


@pytest.mark.parametrize("route", ROUTES)
def test_a_step_from_words_equals_that_of_peft(route: str) -> None:
    tokenizer, template = word_tokenizer("llama"), fp.CPTTemplate.parse(TEMPLATE, between="no")
    config = template.config(EXAMPLES, tokenizer, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    mine = fp.get_prompt_model(build("Llama"), config).eval()
    theirs = peft.get_peft_model(build("Llama"), peft.CPTConfig(**{**config.to_dict(), "peft_type": None})).eval()
    batch = template.render(BATCH, tokenizer)
    results = []
    for model, options in ((mine, {"route": route}), (theirs, {})):
        with torch.no_grad():
            change = torch.randn(17, 32, generator=torch.Generator("cpu").manual_seed(2), device="cpu") * 0.01
            model.prompt_encoder["default"].delta_embedding.weight.copy_(change)
        loss = model(**{name: value.clone() for name, value in batch.items()}, **options).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert_close(*results)
    assert results[0]["loss"].isfinite() and len(results[0]) == 2


def test_answers_are_learned_and_generated() -> None:
    tokenizer, template = word_tokenizer("llama"), fp.CPTTemplate.parse(TEMPLATE, between="")
    config = template.config(EXAMPLES, tokenizer, opt_projection_epsilon=40.0, opt_projection_format_epsilon=40.0)
    model = fp.get_prompt_model(build("Llama"), config)
    batch = template.render([{"country": "france", "city": "cats"}], tokenizer)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    question = template.render([{"country": "france"}], tokenizer, answers=False)
    new = model.eval().generate(**question, max_new_tokens=1, do_sample=False, pad_token_id=0)[:, -1:]
    assert tokenizer.batch_decode(new) == ["cats"]


def test_what_does_not_fit_is_named() -> None:
    tokenizer, template = word_tokenizer("llama"), fp.CPTTemplate.parse(TEMPLATE)
    with pytest.raises(ValueError, match=r"examples\[1\]: expected a value for each of \['country', 'city'\], got"):
        template.context([EXAMPLES[0], {"country": "france"}], tokenizer)
    with pytest.raises(ValueError, match=r"examples\[0\]: expected a value for each of \['country'\], got \['city'\]"):
        template.render([{"city": "rome"}], tokenizer, answers=False)
    with pytest.raises(ValueError, match=r"examples\[0\]: expected a token of the label 'city', got ''"):
        template.context([{"country": "france", "city": ""}], tokenizer)
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        template.context([], tokenizer)
    with pytest.raises(ValueError, match="padding_side: expected 'left' or 'right', got 'top'"):
        template.render(BATCH, tokenizer, padding_side="top")
    with pytest.raises(TypeError, match=r"expected fields, .* for CPT, got \[prompt 3\]"):
        fp.CPTTemplate.parse("[prompt 3] [text] [label]")
    with pytest.raises(ValueError, match=r"expected \[text\] once"):
        fp.CPTTemplate.parse("[text] [text] [label]")
    with pytest.raises(ValueError, match=r"label: expected one of the fields \('text', 'answer'\), got 'label'"):
        fp.CPTTemplate.parse("[text] [answer]", "label")
    with pytest.raises(ValueError, match="template: expected a field"):
        fp.CPTTemplate.parse('[anchor "is"]')


# A context with a mask


FIELDS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12],
    "cpt_mask": [1, 0, 1, 1, 0, 0, 1, 1],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
}
SEEN = [0, 2, 3, 6, 7]


def masked(family: str = "Llama", **changes: Any) -> Any:
    model = fp.get_prompt_model(build(family), fp.CPTConfig(**FIELDS, use_cpt_mask=True, **changes)).eval()
    with torch.no_grad():
        change = torch.randn(8, 32, generator=torch.Generator("cpu").manual_seed(2), device="cpu") * 0.01
        model.prompt_encoder["default"].delta_embedding.weight.copy_(change)
    return model


def by_mask(model: Any, ids: Tensor) -> Tensor:
    """Logits of the text, of the base model on the whole context with cpt_mask as an attention mask."""
    context = model.prompt_encoder["default"]().expand(len(ids), -1, -1)
    embeds = torch.cat((context, model.get_input_embeddings()(ids)), 1)
    mask = torch.cat((torch.tensor(FIELDS["cpt_mask"]).expand(len(ids), -1), torch.ones_like(ids)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    return logits[:, 8:]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_context_with_a_mask_is_seen_as_with_an_attention_mask(family: str, route: str) -> None:
    model, ids = masked(family), tokens(3, 5)
    expected = by_mask(model, ids)
    torch.testing.assert_close(model(input_ids=ids, route=route).logits[:, -5:], expected, rtol=1e-4, atol=1e-4)
    plain = fp.get_prompt_model(build(family), fp.CPTConfig(**FIELDS)).eval()
    assert largest(plain(input_ids=ids).logits[:, -5:] - expected) > 1e-2
    loss = model(input_ids=ids, labels=ids, route=route).loss
    loss.backward()
    gradient = model.prompt_encoder["default"].delta_embedding.weight.grad
    trained = [index for index in SEEN if (index + 1) % 4]
    assert [index for index in range(8) if gradient[index].any()] == trained
    new = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, route=route)[:, -1]
    assert torch.equal(new, expected[:, -1].argmax(-1))


def test_a_mask_comes_back_from_files_and_peft_reads_them_with_a_warning(tmp_path: Path) -> None:
    model, ids = masked(), tokens(3, 5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fusedprompt_use_cpt_mask"] is True
    for trainable in (False, True):
        loaded = fp.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=trainable).eval()
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert "8 virtual tokens of which 5 are seen" in loaded.explain()
    with pytest.warns(UserWarning, match="fusedprompt_use_cpt_mask"):
        theirs = peft.PeftModel.from_pretrained(build("Llama"), str(tmp_path))
    prompt = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(prompt, model.get_prompt_embedding_to_save("default"))
    config = fp.CPTConfig(**FIELDS)
    assert "fusedprompt_use_cpt_mask" not in config.to_json() and config.kept is None
    assert fp.CPTConfig.from_dict({**config.to_dict(), "fusedprompt_use_cpt_mask": True}).kept == tuple(SEEN)
    with pytest.raises(ValueError, match=r"cpt_mask: expected a 1 with use_cpt_mask=True, got \[0, 0"):
        fp.CPTConfig(**{**FIELDS, "cpt_mask": [0] * 8}, use_cpt_mask=True)
