"""Forward passes and gradients of prompt models, with PEFT as the oracle where PEFT is right."""

from __future__ import annotations

import pytest
import torch

import fusedprompt
from models import DECODERS, ENCODER_DECODERS, ENCODERS, WIDTH, build, ours, pad, pair, task_inputs, tokens

CAUSAL = [(family, "CAUSAL_LM", method) for family in DECODERS for method in ("PROMPT", "MLP", "LSTM", "CPT")]
OTHERS = [
    (family, task, method)
    for families, tasks in (
        (ENCODER_DECODERS, ("SEQ_2_SEQ_LM",)),
        (ENCODERS, ("SEQ_CLS", "FEATURE_EXTRACTION")),
        (("GPT2", "Llama"), ("SEQ_CLS", "FEATURE_EXTRACTION")),
        (("T5",), ("FEATURE_EXTRACTION",)),
    )
    for family in families
    for task in tasks
    for method in ("PROMPT", "MLP", "LSTM")
    if not (family == "T5" and task == "FEATURE_EXTRACTION")
]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding. Most models here run in fp64, where rounding cannot hide a difference."""
    exact = actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-9 if exact else 1e-5, atol=1e-11 if exact else 1e-5)


@pytest.mark.parametrize(("family", "task", "method"), CAUSAL + OTHERS)
def test_outputs_loss_and_gradients_equal_peft(family: str, task: str, method: str) -> None:
    theirs, mine = (model.double() for model in pair(family, task, method))
    inputs = task_inputs(task, tokens())
    # Asked for by name it is PEFT's own arithmetic; `auto` makes no logits and computes the loss in fp64.
    expected, actual = theirs(**inputs), mine(**inputs, route="splice")
    name = "last_hidden_state" if task == "FEATURE_EXTRACTION" else "logits"
    assert_close(actual[name], expected[name])
    loss, reference = (
        (actual.loss, expected.loss) if expected.get("loss") is not None else (actual[name], expected[name])
    )
    weight = torch.linspace(-1, 1, loss.numel()).view_as(loss)
    (loss * weight).sum().backward()
    (reference * weight).sum().backward()
    wanted = {key: value.grad for key, value in theirs.named_parameters() if value.requires_grad}
    found = {key: value.grad for key, value in mine.named_parameters() if value.requires_grad}
    assert set(found) == set(wanted)
    for key, gradient in wanted.items():
        assert_close(found[key], gradient)


@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_five_optimizer_steps_follow_peft(method: str) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", method)
    inputs = task_inputs("CAUSAL_LM", tokens())
    losses = []
    for model in (theirs, mine):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        track = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            track.append(loss.item())
        losses.append(track)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]


PADDED = [
    (family, task)
    for family in DECODERS
    for task in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    if (family, task) not in (("Gemma", "QUESTION_ANS"), ("OPT", "TOKEN_CLS"))  # transformers has no such models
]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(("family", "task"), PADDED)
def test_padding_changes_nothing_for_decoders(family: str, task: str, side: str) -> None:
    _check_padding(family, task, side)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("family", ENCODERS)
def test_padding_changes_nothing_for_encoders(family: str, task: str, side: str) -> None:
    _check_padding(family, task, side)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_padding_changes_nothing_for_encoder_decoders(family: str, side: str) -> None:
    _check_padding(family, "SEQ_2_SEQ_LM", side)


def _check_padding(family: str, task: str, side: str) -> None:
    """Rows of different lengths in one batch give, row by row, what each gives alone."""
    model = ours(family, task, "MLP").double()
    lengths, total = (7, 4, 6), 9
    rows, masks = [], []
    for row, length in enumerate(lengths):
        left = {"left": total - length, "right": 0, "both": (total - length) // 2}[side]
        padded, mask = pad(tokens(1, length, seed=row), left, total - length - left)
        rows.append(padded)
        masks.append(mask)
    ids, mask = torch.cat(rows), torch.cat(masks)
    inputs = task_inputs(task, ids, mask)
    starts = mask.argmax(1)
    per_token = ("start_positions", "end_positions")
    for name in per_token:
        if name in inputs:
            inputs[name] = starts + torch.tensor(lengths) // 2
    together = model(**inputs)
    losses, counts = [], []
    for row, length in enumerate(lengths):
        text = slice(int(starts[row]), int(starts[row]) + length)
        single = {}
        for name, value in inputs.items():
            value = value[row : row + 1]
            if name in per_token:
                value = value - starts[row]
            elif value.dim() == 2 and value.shape[1] == total:
                value = value[:, text]
            single[name] = value
        alone = model(**single)
        for name in ("logits", "start_logits", "end_logits"):
            if alone.get(name) is None:
                continue
            found, wanted = together[name][row], alone[name][0]
            if task in ("TOKEN_CLS", "QUESTION_ANS"):
                found = found[text]
            elif task == "CAUSAL_LM":
                prompt = 4
                # The last `length` positions of the text; padding at the right comes after them.
                stop = prompt + int(starts[row]) + length
                found, wanted = found[stop - length : stop], wanted[prompt:]
            assert_close(found, wanted)
        if task in ("CAUSAL_LM", "TOKEN_CLS"):
            losses.append(alone.loss)
            counts.append(length)
    if losses:
        # The prompt's last row predicts the first token, so every token of the text is counted.
        weights = torch.tensor(counts, dtype=torch.float32)
        assert_close(together.loss, (torch.stack(losses) * weights).sum() / weights.sum())


@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
def test_position_ids_move_behind_the_prompt(family: str) -> None:
    model = ours(family)
    ids = tokens()
    plain = model(input_ids=ids).logits
    given = model(input_ids=ids, position_ids=torch.arange(7).unsqueeze(0)).logits
    assert_close(given, plain)
    shifted = model(input_ids=ids, position_ids=torch.arange(7).flip(0).unsqueeze(0)).logits
    assert (shifted - plain).abs().max() > 1e-3


def test_position_ids_that_the_model_does_not_take_are_refused() -> None:
    model = ours("T5", "SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="position_ids: expected None"):
        model(input_ids=tokens(), labels=tokens(3, 5), position_ids=torch.arange(7).unsqueeze(0))


def test_restarting_position_ids_differ_from_running_on() -> None:
    """Packed sequences: PEFT ignores the ids (huggingface/peft D21)."""
    model = ours("Llama")
    ids = tokens(1, 8)
    packed = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])).logits
    assert (packed - model(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*DECODERS, "T5", "Bert"])
def test_inputs_embeds_equal_input_ids(family: str) -> None:
    task = {"T5": "SEQ_2_SEQ_LM", "Bert": "SEQ_CLS"}.get(family, "CAUSAL_LM")
    model = ours(family, task)
    inputs = task_inputs(task, tokens())
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_close(model(inputs_embeds=embeds, **inputs).logits, expected.logits)


def test_inputs_embeds_get_gradients() -> None:
    model = ours("Llama")
    embeds = torch.randn(2, 5, WIDTH, requires_grad=True)
    model(inputs_embeds=embeds, labels=tokens(2, 5)).loss.backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_half_precision_base_keeps_a_float_prompt_and_gives_half_logits() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        base = build("Llama").to(dtype)
        model = fusedprompt.get_prompt_model(
            base, fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
        weight = model.prompt_encoder["default"].embedding.weight
        assert weight.dtype == torch.float32
        output = model(input_ids=tokens(), labels=tokens())
        assert output.logits.dtype == dtype
        output.loss.backward()
        assert weight.grad.dtype == torch.float32 and torch.isfinite(weight.grad).all()


def test_moving_the_model_moves_the_prompt() -> None:
    model = ours("Llama", method="LSTM").to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(input_ids=tokens()).logits.dtype == torch.float64


def test_autocast_gives_the_output_of_peft_under_autocast() -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", "MLP")
    inputs = task_inputs("CAUSAL_LM", tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = theirs(**inputs), mine(**inputs)
    assert_close(actual.loss, expected.loss)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ours("Llama", method="MLP").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**task_inputs("CAUSAL_LM", tokens())).loss.backward()
        gradients.append(model.prompt_encoder["default"].embedding.weight.grad)
    assert_close(gradients[1], gradients[0])


def test_base_model_is_frozen_and_trainable_base_parameters_still_get_gradients() -> None:
    model = ours("Llama")
    assert not any(p.requires_grad for p in model.base_model.parameters())
    table = model.get_input_embeddings().weight.requires_grad_(True)
    model(**task_inputs("CAUSAL_LM", tokens())).loss.backward()
    rows = table.grad.abs().sum(1)
    assert rows[tokens()[:, :-1].unique()].min() > 0  # the last token of a row predicts nothing


def test_train_and_eval_reach_encoder_and_base() -> None:
    model = ours("Llama", method="MLP")
    model.train()
    assert model.base_model.training and model.prompt_encoder["default"].training
    model.eval()
    assert not model.base_model.training and not model.prompt_encoder["default"].training


def test_compiled_model_gives_the_same_loss_and_gradients() -> None:
    eager, compiled = ours("Llama", method="LSTM"), ours("Llama", method="LSTM")
    inputs = task_inputs("CAUSAL_LM", tokens())
    expected = eager(**inputs)
    expected.loss.backward()
    actual = torch.compile(compiled, backend="aot_eager")(**inputs)
    actual.loss.backward()
    assert_close(actual.logits, expected.logits)
    for wanted, found in zip(eager.prompt_encoder.parameters(), compiled.prompt_encoder.parameters()):
        assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("given", [{}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(3, 7, WIDTH)}])
def test_exactly_one_kind_of_tokens_is_required(given: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        ours("Llama")(**given)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, T\) = \(3, 7\), got \(3, 11\)"):
        ours("Llama")(input_ids=tokens(), attention_mask=torch.ones(3, 11))
