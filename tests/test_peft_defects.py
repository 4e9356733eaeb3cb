"""What PEFT 0.21 gets wrong and this package gets right, one test each, named after the behaviour."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import fusedprompt
from models import CPT_FIELDS, WIDTH, build, ours, pad, task_inputs, tokens


def logits(model: Any, ids: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **given).logits


@pytest.mark.parametrize("family", ["Bert", "Roberta", "GPT2", "Llama"])
def test_token_classification_trains_on_the_tokens_and_returns_their_logits(family: str) -> None:
    model = ours(family, "TOKEN_CLS")
    inputs = task_inputs("TOKEN_CLS", tokens())
    output = model(**inputs)
    assert output.logits.shape == (3, 7, 3)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits.flatten(0, 1), inputs["labels"].flatten()))
    output.loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["Bert", "Roberta", "GPT2", "Llama"])
def test_question_answering_trains_on_the_answer_and_returns_the_tokens_logits(family: str) -> None:
    model = ours(family, "QUESTION_ANS")
    inputs = task_inputs("QUESTION_ANS", tokens())
    output = model(**inputs)
    assert output.start_logits.shape == output.end_logits.shape == (3, 7)
    # The answer is one of the tokens: the model's own logits at these, and no virtual token's, are the oracle.
    spliced = {"inputs_embeds": torch.cat((model.prompt_rows().expand(3, -1, -1), model.word_embeddings(tokens())), 1)}
    whole = model.base_model(**spliced, attention_mask=torch.ones(3, 11))
    expected = (
        cross_entropy(whole.start_logits[:, 4:], inputs["start_positions"])
        + cross_entropy(whole.end_logits[:, 4:], inputs["end_positions"])
    ) / 2
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.start_logits, whole.start_logits[:, 4:])


def test_question_answering_ignores_answers_outside_the_text() -> None:
    model = ours("Bert", "QUESTION_ANS")
    inputs = task_inputs("QUESTION_ANS", tokens())
    inputs["start_positions"] = torch.tensor([1, 7, 99])
    inputs["end_positions"] = torch.tensor([2, 7, 99])
    alone = {name: value[:1] for name, value in inputs.items()}
    torch.testing.assert_close(model(**inputs).loss, model(**alone).loss)


def test_question_answering_passes_token_types_and_positions_on() -> None:
    model = ours("Bert", "QUESTION_ANS")
    ids = tokens()
    plain = model(input_ids=ids).start_logits
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(3, -1)
    assert (model(input_ids=ids, token_type_ids=types).start_logits - plain).abs().max() > 1e-4
    positions = torch.arange(7).flip(0).expand(3, -1)
    assert (model(input_ids=ids, position_ids=positions).start_logits - plain).abs().max() > 1e-4


def test_left_padded_text_is_scored_as_alone() -> None:
    for family in ("GPT2", "Llama", "OPT"):
        model = ours(family).double()
        ids, mask = pad(tokens(), 3, 0)
        torch.testing.assert_close(logits(model, ids, attention_mask=mask)[:, -7:], logits(model)[:, -7:])


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_adapters_loaded_for_inference_are_frozen(method: str, tmp_path: Path) -> None:
    ours("Llama", method=method).save_pretrained(tmp_path)
    model = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    assert logits(model).grad_fn is None and not model(input_ids=tokens()).logits.requires_grad


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_loading_into_a_live_training_model_gives_the_saved_outputs(
    method: str, trainable: bool, tmp_path: Path
) -> None:
    model = ours("Llama", method=method)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    _train(model, 3)
    assert not torch.allclose(logits(model), expected)
    model.load_adapter(tmp_path, "default", is_trainable=trainable)
    torch.testing.assert_close(logits(model), expected)
    assert model.active_adapter == "default"
    assert any(p.requires_grad for p in model.parameters()) == trainable


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_training_resumes_exactly_where_it_stopped(method: str, tmp_path: Path) -> None:
    model = ours("Llama", method=method)
    optimizer = _train(model, 2)
    model.save_pretrained(tmp_path)
    resumed = fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path, is_trainable=True)
    second = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, 3, optimizer)
    _train(resumed, 3, second)
    assert torch.equal(logits(resumed), logits(model))


def _train(model: Any, steps: int, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**task_inputs("CAUSAL_LM", tokens())).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_the_saved_prompt_has_no_dropout_in_it(encoder: str, tmp_path: Path) -> None:
    config = fusedprompt.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_reparameterization_type=encoder, encoder_dropout=0.5
    )
    model = fusedprompt.get_prompt_model(build("Llama"), config).train()
    model.save_pretrained(tmp_path)
    assert model.prompt_encoder["default"].training
    assert not torch.equal(model.prompt_rows(), model.prompt_rows())  # in training dropout does act
    expected = logits(model.eval())
    assert torch.equal(logits(fusedprompt.PromptModel.from_pretrained(build("Llama"), tmp_path)), expected)


def test_cpt_works_under_any_adapter_name_and_several_use_their_own_settings() -> None:
    config = fusedprompt.CPTConfig(task_type="CAUSAL_LM", **CPT_FIELDS)
    model = fusedprompt.get_prompt_model(build("Llama"), config, adapter_name="first")
    ids = tokens()
    types = torch.tensor([[4, 4, 0, 8, 8, 0, 12]]).expand(3, -1)
    given = {"input_ids": ids, "labels": ids, "input_type_mask": types}
    plain = model(**given).loss
    decayed = fusedprompt.CPTConfig(
        task_type="CAUSAL_LM", **CPT_FIELDS, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5
    )
    model.add_adapter("second", decayed)
    model.set_adapter("second")
    assert model(**given).loss < plain
    model.set_adapter("first")
    torch.testing.assert_close(model(**given).loss, plain)


def test_cpt_leaves_the_callers_type_mask_alone() -> None:
    model = ours("Llama", method="CPT")
    types = torch.full((3, 7), 4)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens(), input_type_mask=types)
    assert types.eq(4).all()


def test_cpt_with_default_types_has_a_finite_loss_over_the_inputs_labels() -> None:
    config = fusedprompt.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7])
    model = fusedprompt.get_prompt_model(build("Llama"), config)
    output = model(input_ids=tokens(), labels=tokens())
    expected = cross_entropy(output.logits[:, 2:-1].flatten(0, 1), tokens().flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.prompt_encoder["default"].delta_embedding.weight.grad.abs().sum() > 0


def test_cpt_with_no_label_left_has_zero_loss_and_gradients() -> None:
    config = fusedprompt.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7])
    model = fusedprompt.get_prompt_model(build("Llama"), config)
    loss = model(input_ids=tokens(), labels=torch.full((3, 7), -100)).loss
    loss.backward()
    assert loss.item() == 0.0 and not model.prompt_encoder["default"].delta_embedding.weight.grad.any()


def test_cpt_projects_in_place_and_compiles_without_graph_breaks() -> None:
    model = ours("Llama", method="CPT")
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.delta_embedding.weight.fill_(1.0)
    pointer = encoder.delta_embedding.weight.data_ptr()
    expected = encoder.encode()
    assert encoder.delta_embedding.weight.data_ptr() == pointer
    assert encoder.delta_embedding.weight.norm(dim=1).max() < 0.1
    compiled = torch.compile(encoder.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected)


def test_cpt_computes_the_loss_of_a_half_precision_model_in_fp32() -> None:
    config = fusedprompt.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7])
    model = fusedprompt.get_prompt_model(build("Llama").to(torch.bfloat16), config)
    output = model(input_ids=tokens(), labels=tokens())
    assert output.loss.dtype == torch.float32
    expected = cross_entropy(output.logits[:, 2:-1].flatten(0, 1).float(), tokens().flatten())
    torch.testing.assert_close(output.loss, expected)


def test_a_second_forward_from_a_cache_does_not_inject_the_prompt_again() -> None:
    for family in ("GPT2", "Llama", "OPT"):
        model = ours(family).double()
        ids, mask = pad(tokens(), 2, 0)
        whole = logits(model, ids, attention_mask=mask)
        first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4 + 6
        rest = model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits, whole[:, -3:])
        assert rest.past_key_values.get_seq_length() == 4 + 9


def test_an_empty_cache_gets_the_prompt() -> None:
    import transformers

    model = ours("Llama")
    cache = transformers.DynamicCache(config=model.config)
    assert torch.equal(logits(model, past_key_values=cache), logits(model))
    assert cache.get_seq_length() == 4 + 7


@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
def test_sequence_classification_on_decoders_pools_the_last_token_and_not_padding(family: str) -> None:
    model = ours(family, "SEQ_CLS")
    ids, mask = pad(tokens(), 0, 3)
    torch.testing.assert_close(logits(model, ids, attention_mask=mask), logits(model))


@pytest.mark.parametrize(
    ("family", "task"),
    [("Bert", "SEQ_CLS"), ("Bert", "QUESTION_ANS"), ("Bert", "FEATURE_EXTRACTION"), ("Bert", "TOKEN_CLS")],
)
def test_disabling_works_for_models_that_do_not_generate(family: str, task: str) -> None:
    model = ours(family, task)
    name = {"QUESTION_ANS": "start_logits", "FEATURE_EXTRACTION": "last_hidden_state"}.get(task, "logits")
    before = set(vars(model.base_model))
    with model.disable_adapter():
        found = model(input_ids=tokens())[name]
    torch.testing.assert_close(found, build(family, task)(input_ids=tokens())[name])
    assert set(vars(model.base_model)) == before  # no `forward` or other method is left on the instance


def test_disabling_an_encoder_decoder_generates_without_the_prompt() -> None:
    model = ours("T5", "SEQ_2_SEQ_LM")
    options = {"input_ids": tokens(), "max_new_tokens": 5, "do_sample": False}
    with model.disable_adapter():
        assert torch.equal(model.generate(**options), build("T5", "SEQ_2_SEQ_LM").generate(**options))


def test_generating_with_an_encoder_decoder_leaves_its_methods_alone() -> None:
    model = ours("T5", "SEQ_2_SEQ_LM")
    method = model.base_model.prepare_inputs_for_generation
    model.generate(input_ids=tokens(), max_new_tokens=3)
    assert model.base_model.prepare_inputs_for_generation == method


def test_word_embeddings_are_found_whatever_the_size_of_their_table() -> None:
    base = build("Llama")
    base.resize_token_embeddings(96)
    base.config.vocab_size = 67  # a padded table: more rows than the vocabulary
    model = fusedprompt.get_prompt_model(
        base, fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert logits(model).shape[:2] == (3, 10)


def test_mlp_depth_and_dropout_are_what_the_configuration_says() -> None:
    for depth in (1, 2, 3):
        config = fusedprompt.PromptEncoderConfig(
            num_virtual_tokens=3,
            token_dim=WIDTH,
            encoder_num_layers=depth,
            encoder_dropout=0.5,
            encoder_reparameterization_type="MLP",
        )
        encoder = fusedprompt.PromptEncoder(config)
        assert sum(isinstance(layer, torch.nn.Linear) for layer in encoder.mlp_head) == depth + 1
        assert not torch.equal(encoder.encode(), encoder.encode())
        assert torch.equal(encoder.eval().encode(), encoder.encode())


@pytest.mark.parametrize(("family", "limit"), [("GPT2", 96), ("OPT", 96), ("Bert", 96), ("Roberta", 95), ("Bart", 96)])
def test_a_prompt_that_does_not_fit_the_positions_is_an_error_that_says_so(family: str, limit: int) -> None:
    task = {"Bert": "SEQ_CLS", "Roberta": "SEQ_CLS", "Bart": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    model = ours(family, task)
    extra = {"labels": tokens(1, 3)} if family == "Bart" else {}
    model(input_ids=tokens(1, limit - 4), **extra)
    message = rf"expected at most the base model's {limit} positions, got 4 \+ {limit - 3} = {limit + 1}"
    with pytest.raises(ValueError, match=message):
        model(input_ids=tokens(1, limit - 3), **extra)


def test_hooked_and_scaled_word_embeddings_are_called_and_not_read() -> None:
    model = ours("Llama")
    plain = logits(model)
    handle = model.word_embeddings.register_forward_hook(lambda module, args, output: output * 2)
    assert (logits(model) - plain).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(logits(model), plain)


def test_generation_gives_no_warning_per_step() -> None:
    model = ours("Llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(input_ids=tokens(), max_new_tokens=6, do_sample=False)
    assert [str(w.message) for w in caught if "fusedprompt" in w.filename or "position" in str(w.message).lower()] == []


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_one_adapter_per_row_is_not_ignored(call: str) -> None:
    model, ids = ours("Llama"), tokens()
    names = ["default", "__base__", "default"]
    options = {"max_new_tokens": 8, "do_sample": False} if call == "generate" else {}
    found = getattr(model, call)(input_ids=ids, adapter_names=names, **options)
    with model.disable_adapter():
        plain = getattr(model, call)(input_ids=ids, **options)
    if call == "forward":
        found, plain = found.logits[:, -ids.shape[1] :], plain.logits
    assert not torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], plain[1])


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_an_encoder_pools_its_cls_token_when_the_prompt_starts_behind_it(family: str, tmp_path: Path) -> None:
    """PEFT puts virtual token 0 where the pooler looks. Its adapters are trained so, and keep their place here."""
    base = build(family, "SEQ_CLS")
    config = fusedprompt.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(base, config, prompt_start=1).eval()
    ids = tokens()
    words = model.word_embeddings(ids)
    rows = model.prompt_rows().expand(3, -1, -1)
    expected = model.base_model(inputs_embeds=torch.cat((words[:, :1], rows, words[:, 1:]), 1)).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    padded, mask = pad(ids, 2, 2)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = fusedprompt.PromptModel.from_pretrained(build(family, "SEQ_CLS"), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    import peft

    with pytest.warns(UserWarning, match="fusedprompt_prompt_start"):
        peft.PeftModel.from_pretrained(build(family, "SEQ_CLS"), str(tmp_path))


def test_a_prompt_behind_the_first_token_generates_alike_with_and_without_padding() -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(build("Llama"), config, prompt_start=1).double()
    ids, mask = pad(tokens(), 3, 0)
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(input_ids=tokens(), **options)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options)[:, 3:], plain)
    assert (logits(model)[:, 0] - logits(ours("Llama").double())[:, 0]).abs().max() > 1e-3
    first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, logits(model, ids, attention_mask=mask)[:, -2:])


@pytest.mark.parametrize(
    ("start", "given", "message"),
    [
        (-1, {}, "prompt_start: expected an int >= 0, got -1"),
        (9, {}, "input_ids: expected at least prompt_start = 9 tokens, got 7"),
        (1, {"position_ids": torch.arange(7).unsqueeze(0)}, "position_ids: expected None with prompt_start = 1"),
    ],
)
def test_bad_prompt_starts_are_named(start: int, given: dict[str, Any], message: str) -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=message):
        fusedprompt.get_prompt_model(build("Llama"), config, prompt_start=start)(input_ids=tokens(), **given)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_row_shorter_than_prompt_start_has_the_prompt_behind_it(mixed: bool) -> None:
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = fusedprompt.get_prompt_model(build("Llama"), config, prompt_start=2).eval()
    model.add_adapter("one", config, prompt_start=1)
    model.prompt_encoder["one"].load_state_dict(model.prompt_encoder["default"].state_dict())
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :-1] = 0
    names = {"adapter_names": ["default"] * len(ids)} if mixed else {}
    found = model(input_ids=ids, attention_mask=mask, **names).logits[1, -4:]
    model.set_adapter("one")
    torch.testing.assert_close(found, model(input_ids=ids[1:2, -1:]).logits[0], rtol=1e-4, atol=1e-5)
