"""Models with a template against the base model itself, called on rows that are put together by hand, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fusedprompt
from fusedprompt import Template
from models import PAD, VOCAB, build, config_fields, ours, pad, task_inputs, tokens
from tolerance import examples, one_thread  # noqa: F401
from word_tokenizers import word_tokenizer

ROWS = 4
TEXT = '[prompt 2] [anchor "is"] [text] [prompt 1] [anchor 9 10] [prompt 1]'


def with_template(
    family: str, text: str, tokenizer: str | None = None, task: str = "CAUSAL_LM", method: str = "PROMPT"
) -> Any:
    template = Template.parse(text)
    if tokenizer is not None:
        template = template.bind(word_tokenizer(tokenizer))
    name, fields = config_fields(method, task, template.num_prompt_rows)
    base, config = build(family, task), getattr(fusedprompt, name)(**fields)
    torch.manual_seed(7)
    return fusedprompt.get_prompt_model(base, config, template=template).eval().double()


def row_of(model: Any, columns: list[tuple[str, int]]) -> Tensor:
    """(1, S, D): columns ("P", row) and ("t", id)."""
    prompt, table = model.prompt_rows(), model.get_input_embeddings().weight
    return torch.stack([prompt[value] if kind == "P" else table[value] for kind, value in columns]).unsqueeze(0)


def rows_p(first: int, count: int) -> list[tuple[str, int]]:
    return [("P", row) for row in range(first, first + count)]


def ids_t(*ids: int) -> list[tuple[str, int]]:
    return [("t", token) for token in ids]


SPECIALS = {"bert": ([3], [4]), "llama": ([3], []), "gpt2": ([], [])}


def sequence(text: list[int], family: str) -> list[tuple[str, int]]:
    """TEXT around the ids of a text, by hand."""
    anchor = word_tokenizer(family).convert_tokens_to_ids("is")
    before, after = SPECIALS[family]
    middle = [*rows_p(0, 2), *ids_t(anchor), *ids_t(*text), *rows_p(2, 1), *ids_t(9, 10), *rows_p(3, 1)]
    return [*ids_t(*before), *middle, *ids_t(*after)]


def padded(rows: list[list[int]], fill: int, side: str) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor(
        [[fill] * (width - len(r)) + r if side == "left" else r + [fill] * (width - len(r)) for r in rows]
    )


def assert_close(actual: Tensor, expected: Tensor, single: bool = False) -> None:
    """single: transformers computes a language model's loss in fp32, whatever the logits."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False} if single else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(actual, expected, **tolerance)  # type: ignore[arg-type]


def gradient(model: Any, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, model.prompt_encoder["default"].embedding.weight, retain_graph=True)
    return found


def inputs_of(
    model: Any, family: str, way: str, side: str, texts: list[list[int]], labels: list[list[int]]
) -> dict[str, Any]:
    """The same batch as the tokenizer's ids, as ids per field, or rendered."""
    if way == "rendered":
        return dict(model.templates["default"].render(texts, padding_side=side, labels={"text": labels}))
    before, after = SPECIALS[family] if way == "ids" else ([], [])
    ids = padded([[*before, *text, *after] for text in texts], PAD, side)
    mask = padded([[1] * (len(before) + len(text) + len(after)) for text in texts], 0, side)
    targets = padded([[-100] * len(before) + own + [-100] * len(after) for own in labels], -100, side)
    if way == "ids":
        return {"input_ids": ids, "attention_mask": mask, "labels": targets}
    return {"fields": {"text": (ids, mask)}, "labels": {"text": targets}}


MODELS = {
    ("Llama", "llama"): with_template("Llama", TEXT, "llama"),
    ("GPT2", "gpt2"): with_template("GPT2", TEXT, "gpt2"),
    ("Bert", "bert"): with_template("Bert", TEXT, "bert", "TOKEN_CLS"),
}
drawn_texts = st.lists(st.lists(st.integers(6, VOCAB - 1), min_size=1, max_size=4), min_size=1, max_size=3)
sides = st.sampled_from(("left", "right"))


@examples(30)
@given(
    texts=drawn_texts,
    key=st.sampled_from(sorted(MODELS)),
    side=sides,
    way=st.sampled_from(("ids", "fields", "rendered")),
)
def test_ids_fields_and_rendered_batches_give_loss_and_gradients_of_rows_by_hand(
    texts: list[list[int]], key: tuple[str, str], side: str, way: str
) -> None:
    model, is_encoder = MODELS[key], key[0] == "Bert"
    labels = [[token % 3 if is_encoder else token for token in text] for text in texts]
    output = model(**inputs_of(model, key[1], way, side, texts, labels))
    logits, targets = [], []
    for text, own in zip(texts, labels):
        columns = sequence(text, key[1])
        alone = model.base_model(inputs_embeds=row_of(model, columns)).logits[0]
        first = columns.index(("P", 1)) + 2 - (not is_encoder)  # a word is predicted by the column before it
        logits.append(alone[first : first + len(text)])
        targets.append(torch.tensor(own))
    expected = F.cross_entropy(torch.cat(logits), torch.cat(targets))
    assert_close(output.loss, expected, single=not is_encoder)
    assert_close(gradient(model, output.loss), gradient(model, expected), single=not is_encoder)


@examples(15)
@given(texts=drawn_texts, key=st.sampled_from(sorted(MODELS)), side=sides)
def test_logits_are_those_of_rows_by_hand(texts: list[list[int]], key: tuple[str, str], side: str) -> None:
    model, (before, after) = MODELS[key], SPECIALS[key[1]]
    inputs = inputs_of(model, key[1], "ids", side, texts, [[0] * len(text) for text in texts])
    del inputs["labels"]
    own = model(**inputs, **({} if key[0] == "Bert" else {"logits": "text"})).logits
    assert own.shape[:2] == inputs["input_ids"].shape
    embedded = model(
        inputs_embeds=model.get_input_embeddings()(inputs.pop("input_ids")),
        **inputs,
        **({} if key[0] == "Bert" else {"logits": "text"}),
    ).logits
    assert_close(embedded, own)
    for b, text in enumerate(texts):
        columns = sequence(text, key[1])
        alone = model.base_model(inputs_embeds=row_of(model, columns)).logits[0]
        first = columns.index(("P", 1)) + 2
        start = int(inputs["attention_mask"][b].argmax())
        # Special tokens at the ends of the row, the text between prompt rows.
        at = [*range(len(before)), *range(first, first + len(text)), *range(len(columns) - len(after), len(columns))]
        assert_close(own[b, start : start + len(at)], alone[at])


@pytest.mark.parametrize("family", ["Llama", "Bert", "GPT2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_pools_where_it_pools_without_a_prompt(family: str, side: str) -> None:
    """A decoder the last column, a prompt row here; BERT its [CLS], which stays in front of the prompt."""
    kind = {"Llama": "llama", "Bert": "bert", "GPT2": "gpt2"}[family]
    model, texts = with_template(family, TEXT, kind, "SEQ_CLS"), [[20, 21, 22], [23]]
    inputs = inputs_of(model, kind, "ids", side, texts, [[0, 0, 0], [0]])
    labels = torch.tensor([2, 1])
    output = model(**{**inputs, "labels": labels})
    alone = [model.base_model(inputs_embeds=row_of(model, sequence(text, kind))).logits for text in texts]
    assert_close(output.logits, torch.cat(alone))
    assert_close(output.loss, F.cross_entropy(torch.cat(alone), labels))
    batch = model.templates["default"].render(
        texts, padding_side=side, labels=[2, 1], pool="first" if family == "Bert" else "last"
    )
    assert_close(model(**batch).logits, torch.cat(alone))


def test_token_types_of_a_pair_are_the_tokenizers_and_prompts_have_those_of_their_sentence() -> None:
    model = with_template("Bert", "[prompt 1] [a] [prompt 2] [sep] [prompt 1] [b]", "bert", "SEQ_CLS")
    a, b = [20, 21], [22]
    columns = [*ids_t(3), *rows_p(0, 1), *ids_t(*a), *rows_p(1, 2), *ids_t(4), *rows_p(3, 1), *ids_t(*b), *ids_t(4)]
    types = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])
    expected = model.base_model(inputs_embeds=row_of(model, columns), token_type_ids=types).logits
    assert_close(model(fields={"a": torch.tensor([a]), "b": torch.tensor([b])}).logits, expected)
    assert_close(model(**model.templates["default"].render({"a": [a], "b": [b]})).logits, expected)
    plain = with_template("Bert", "[text] [prompt 4]", "bert", "SEQ_CLS")
    ids, own = torch.tensor([[3, 20, 4, 21, 4]]), torch.tensor([[0, 0, 0, 1, 1]])
    columns = [*ids_t(3, 20, 4, 21), *rows_p(0, 4), *ids_t(4)]
    types = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 1]])
    expected = plain.base_model(inputs_embeds=row_of(plain, columns), token_type_ids=types).logits
    assert_close(plain(input_ids=ids, token_type_ids=own).logits, expected)


@pytest.mark.parametrize("way", ["ids", "fields", "rendered"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_mask_tokens_may_be_given_alone(way: str, side: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **sizes))
    template = Template.parse("[prompt 2] [mask] [text] [prompt 2] [mask]").bind(word_tokenizer("bert"))
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(base, config, template=template).eval().double()
    texts, answers = [[20, 21, 22], [23]], [[30, 31], [32, 33]]
    if way == "rendered":
        inputs: dict[str, Any] = dict(template.render(texts, padding_side=side, mask_labels=answers))
    else:
        inputs = inputs_of(model, "bert", way, side, texts, texts)
        inputs["labels"] = torch.tensor(answers)
    output, rows = model(**inputs), []
    for text in texts:
        columns = [*ids_t(3), *rows_p(0, 2), *ids_t(5, *text), *rows_p(2, 2), *ids_t(5, 4)]
        logits = model.base_model(inputs_embeds=row_of(model, columns)).logits[0]
        rows.append(logits[[3, len(columns) - 2]])
    expected = F.cross_entropy(torch.cat(rows), torch.tensor(answers).flatten())
    assert_close(output.loss, expected)
    assert_close(gradient(model, output.loss), gradient(model, expected))
    if way == "ids":
        with pytest.raises(ValueError, match=r"labels: expected shape \(B, T\) = .*, or \(2, 2\) for the mask tokens"):
            model(**{**inputs, "labels": torch.tensor([1, 2])})


def test_answers_to_questions_count_the_callers_tokens() -> None:
    model = with_template("Bert", TEXT, "bert", "QUESTION_ANS")
    ids = torch.tensor([[3, 20, 21, 22, 4]])
    output = model(input_ids=ids, start_positions=torch.tensor([2]), end_positions=torch.tensor([3]))
    columns = sequence([20, 21, 22], "bert")
    first = columns.index(("P", 1)) + 2
    alone = model.base_model(inputs_embeds=row_of(model, columns))
    places = [0, first, first + 1, first + 2, len(columns) - 1]  # of the caller's tokens
    pairs = ((alone.start_logits, 2), (alone.end_logits, 3))
    losses = [F.cross_entropy(logits[:, places], torch.tensor([answer])) for logits, answer in pairs]
    assert_close(output.loss, (losses[0] + losses[1]) / 2)
    assert_close(output.start_logits[0, 1:4], alone.start_logits[0, first : first + 3])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_generation_goes_on_behind_the_last_prompt_row(family: str, options: dict[str, Any]) -> None:
    model, kind = MODELS[family, family.lower()], family.lower()
    texts = [[20, 21, 22], [23]] if options in ({}, {"num_beams": 2}) else [[20, 21, 22]]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": PAD}
    results = []
    for way, side in (("ids", "left"), ("ids", "right"), ("fields", "left"), ("rendered", "left")):
        inputs = inputs_of(model, kind, way, side, texts, texts)
        del inputs["labels"]
        torch.manual_seed(3)
        found = model.generate(**inputs, **settings, **options)
        given = inputs.get("input_ids", inputs["fields"]["text"][0] if way == "fields" else None)
        assert torch.equal(found[:, : given.shape[1]], given)
        results.append(found[:, given.shape[1] :])
    assert all(torch.equal(result, results[0]) for result in results)
    options = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
    for b, text in enumerate(texts):
        torch.manual_seed(3)
        embeds = row_of(model, sequence(text, kind))
        assert torch.equal(results[0][b], model.base_model.generate(inputs_embeds=embeds, **settings, **options)[0])


def test_an_encoder_decoder_takes_a_template_in_its_encoder() -> None:
    model = with_template("T5", "[prompt 2] [text] [prompt 2]", None, "SEQ_2_SEQ_LM")
    ids, labels = tokens(2, 3), tokens(2, 4, seed=5)
    columns = [[*rows_p(0, 2), *ids_t(*row), *rows_p(2, 2)] for row in ids.tolist()]
    embeds = torch.cat([row_of(model, row) for row in columns])
    expected = model.base_model(inputs_embeds=embeds, labels=labels)
    output = model(input_ids=ids, labels=labels)
    assert_close(output.loss, expected.loss, single=True)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    alone = model.base_model.generate(inputs_embeds=embeds, **settings)
    assert torch.equal(model.generate(input_ids=ids, **settings), alone)


def test_a_scaled_embedding_scales_anchors_too() -> None:
    model = with_template("Gemma", "[prompt 2] [text] [anchor 9 10] [prompt 1]")
    ids, embed = tokens(1, 3), model.get_input_embeddings()
    prompt = model.prompt_rows().unsqueeze(0)
    embeds = torch.cat((prompt[:, :2], embed(ids), embed(torch.tensor([[9, 10]])), prompt[:, 2:]), 1)
    assert_close(model(input_ids=ids).logits, model.base_model(inputs_embeds=embeds).logits)


@pytest.mark.parametrize("method", ["MLP", "LSTM", "CPT"])
def test_every_method_trains_through_a_template(method: str) -> None:
    rows = 8 if method == "CPT" else 4
    model = with_template("Llama", f"[prompt 3] [text] [anchor 9] [prompt {rows - 3}]", None, method=method)
    inputs = task_inputs("CAUSAL_LM", *pad(tokens(2, 3), 2, 0))
    model(**inputs).loss.backward()
    gradients = [p.grad for p in model.prompt_encoder.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients)
    assert any(bool(g.any()) for g in gradients)


def test_the_plain_prefix_is_what_a_model_without_a_template_does() -> None:
    plain, none = with_template("Llama", "[prompt 4] [text]"), ours("Llama", rows=4).double()
    inputs = task_inputs("CAUSAL_LM", *pad(tokens(3, 5), 2, 1))
    for route in ("shared", "splice"):
        actual, expected = (model(**inputs, route=route) for model in (plain, none))
        assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)


def test_the_template_changes_with_the_adapter() -> None:
    model = with_template("Llama", "[text] [prompt 2]")
    name, fields = config_fields("PROMPT")
    model.add_adapter("plain", getattr(fusedprompt, name)(**fields))
    model.add_adapter("other", getattr(fusedprompt, name)(**fields), template="[prompt 1] [text] [prompt 3]")
    model.double()
    ids = tokens(2, 3)
    for adapter, before in (("default", 0), ("plain", 4), ("other", 1)):
        model.set_adapter(adapter)
        prompt = model.prompt_rows().expand(2, -1, -1)
        embeds = torch.cat((prompt[:, :before], model.get_input_embeddings()(ids), prompt[:, before:]), 1)
        assert_close(model(input_ids=ids).logits, model.base_model(inputs_embeds=embeds).logits)
    model.delete_adapter("other")
    assert set(model.templates) == {"default"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "[prompt 3] [text]"}, r"template part 0 '\[prompt 3\]': is the last of 3 prompt rows"),
        ({"template": "[prompt 4] [text] [anchor 67]"}, r"template part 2 '\[anchor 67\]': expected ids in \[0, 67\)"),
        ({"template": '[prompt 4] [anchor "is"]'}, r"template part 1 '.*': needs a tokenizer"),
        ({"template": "[prompt 4] [text]", "prompt_start": 1}, "prompt_start: expected 0 with a template"),
        ({"template": "[prompt four]"}, "template: expected a part such as"),
    ],
)
def test_a_template_that_fits_no_adapter_is_refused_and_adds_none(given: dict[str, Any], message: str) -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=message):
        fusedprompt.get_prompt_model(build("Llama"), config, **given)
    long = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=97)
    with pytest.raises(ValueError, match=r"template part 1 '\[prompt 97\]': .* 97 positions .* has 96"):
        fusedprompt.get_prompt_model(build("GPT2"), long, template="[text] [prompt 97]")
    with pytest.raises(TypeError, match=r"template: expected a fusedprompt.Template or a string, got int"):
        fusedprompt.get_prompt_model(build("Llama"), config, template=3)  # type: ignore[arg-type]


TWO = with_template("Llama", "[prompt 1] [a] [prompt 1] [b]")
IDS = {"a": tokens(2, 3), "b": tokens(2, 2)}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": tokens(2, 3)}, r"has the fields \('a', 'b'\); pass fields=\{...\} .*template.render"),
        ({"fields": {"a": IDS["a"]}}, r"fields: template part 3 '\[b\]': expected a value, got only \['a'\]"),
        ({"fields": {**IDS, "c": IDS["a"]}}, "fields: 'c' is no field of the template"),
        ({"fields": {**IDS, "b": tokens(3, 2)}}, "fields: field 'b': expected ids of shape"),
        ({"fields": IDS, "input_ids": IDS["a"]}, "fields: expected no input_ids"),
        ({"fields": IDS, "labels": {"c": IDS["a"]}}, "labels: 'c' is no field of the template"),
        ({"fields": IDS, "labels": tokens(2, 9)}, r"labels: expected shape \(B, T\) = \(2, 5\), got \(2, 9\)"),
        ({"fields": IDS, "position_ids": tokens(2, 5)}, "position_ids: expected None with a template"),
        ({"fields": IDS, "slots": tokens(2, 5)}, "fields: expected None with slots"),
    ],
)
def test_batches_that_do_not_fit_the_template_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TWO(**inputs)


def test_fields_without_a_template_and_a_template_behind_a_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="fields: expected None for an adapter without a template"):
        ours("Llama")(fields=IDS)
    with TWO.disable_adapter(), pytest.raises(ValueError, match="fields: expected None for a model without a prompt"):
        TWO(fields=IDS)
    model = MODELS["Llama", "llama"]
    cache = model(input_ids=tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="fields: expected None for tokens that follow a cache"):
        model(fields={"text": tokens(1, 1)}, input_ids=tokens(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: expected an empty cache with the template"):
        model.generate(input_ids=tokens(1, 1), past_key_values=cache)


def test_ids_without_the_special_tokens_that_the_tokenizer_puts_are_refused() -> None:
    with pytest.raises(ValueError, match="input_ids: expected a text with its 2 special tokens, got 1 tokens"):
        MODELS["Bert", "bert"](input_ids=torch.tensor([[20]]))


def test_tokens_after_a_cache_continue_a_template() -> None:
    model, more = MODELS["GPT2", "gpt2"], torch.tensor([[30, 31], [32, 33]])
    ids, mask = padded([[20, 21, 22], [23]], PAD, "left"), padded([[1] * 3, [1]], 0, "left")
    first = model(input_ids=ids, attention_mask=mask, use_cache=True)
    width = first.logits.shape[1]
    wide = torch.tensor([[1] * width, [0] * 2 + [1] * (width - 2)])
    positions = torch.tensor([[width, width + 1], [width - 2, width - 1]]) - model.prompt_rows_count()
    found = model(
        input_ids=more,
        past_key_values=first.past_key_values,
        attention_mask=F.pad(wide, (0, 2), value=1),
        position_ids=positions,
    ).logits
    for b, text in enumerate(([20, 21, 22], [23])):
        columns = [*sequence(text, "gpt2"), *ids_t(*more[b].tolist())]
        assert_close(found[b], model.base_model(inputs_embeds=row_of(model, columns)).logits[0, -2:])


def test_explain_shows_anchors() -> None:
    text = MODELS["Llama", "llama"].explain(
        input_ids=torch.tensor([[0, 3, 20, 21]]), attention_mask=torch.tensor([[0, 1, 1, 1]])
    )
    assert text.splitlines()[1] == "row 0: · t P P A t t P A A P"
    fields = MODELS["Bert", "bert"].explain(fields={"text": torch.tensor([[20, 21]])})
    assert fields.splitlines()[1] == "row 0: t P P A t t P A A P t"
    rendered = MODELS["Bert", "bert"].templates["default"].render([[20], [20, 21]])
    text = MODELS["Bert", "bert"].explain(**rendered)
    assert text.splitlines()[1] == f"row 0: {rendered.picture()}" == "row 0: t P P A t P A A P t ·"


def test_a_template_first_used_in_inference_mode_trains_later() -> None:
    model = with_template("Llama", "[prompt 1] [anchor 31 32 33] [text] [prompt 1]")
    inputs = task_inputs("CAUSAL_LM", tokens(2, 3))
    with torch.inference_mode():
        expected = model(**inputs).loss
    model.base_model.requires_grad_(True)  # then autograd keeps ids, too
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert model.get_input_embeddings().weight.grad[31:34].abs().sum(1).all()


def test_a_compiled_model_gives_the_same_loss() -> None:
    model = with_template("Llama", "[prompt 2] [text] [anchor 9 10] [prompt 1]").float()
    inputs = task_inputs("CAUSAL_LM", *pad(tokens(2, 4), 2, 0))
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss, rtol=1e-5, atol=1e-6)
