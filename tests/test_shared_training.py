"""The shared route in training: the same numbers as splice and PEFT, from fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fusedprompt
from models import VOCAB, WIDTH, build, config_fields, ours, pad, pair, task_inputs, tokens
from tolerance import largest, one_thread, ulp

__all__ = ["one_thread"]
FAMILIES = ("GPT2", "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "OPT", "GPTNeoX", "Phi", "Falcon", "Bloom")
ROWS = 4


def model_of(family: str, task: str = "CAUSAL_LM", method: str = "MLP", **overrides: Any) -> Any:
    """In eval mode, so without dropout; its prompt is trained all the same."""
    alibi = {"alibi": True} if family == "Falcon" else {}
    return ours(family, task, method, **{**alibi, **overrides})


def padded_batch(task: str = "CAUSAL_LM") -> dict[str, Tensor]:
    """Rows of 7, 4 and 5 tokens in 9 columns, padded at the left, at the right and at both ends."""
    rows = [pad(tokens(1, length, seed=length), left, 9 - length - left) for length, left in ((7, 2), (4, 0), (5, 2))]
    ids, mask = (torch.cat(parts) for parts in zip(*rows))
    return task_inputs(task, ids, mask)


def text_positions(mask: Tensor) -> Tensor:
    """Where the output of P + T positions holds text, (B, P + T)."""
    return nn.functional.pad(mask, (ROWS, 0)).bool()


def compared(model: Any, route: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Text logits, hidden states, and the gradients of a loss computed here, in the model's precision, from the logits.

    transformers computes its loss in fp32, which would hide differences in fp64.
    """
    model.zero_grad()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "labels")}
    output = model(inputs_embeds=embeds, **given, route=route, output_hidden_states=True)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    # Every row's first token is predicted by the prompt's last row, which stands right before it.
    labels = nn.functional.pad(inputs["labels"], (ROWS, 0), value=-100)
    cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    states = {f"hidden state {i}": state[text_positions(mask)] for i, state in enumerate(output.hidden_states)}
    return {"logits": output.logits[text_positions(mask)], **states, **gradients(model), "inputs_embeds": embeds.grad}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = largest(found[name] - value)
        assert error <= tolerance * max(largest(value), 1e-3), f"{name}: error {error:.3g} of {largest(value):.3g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_splice_in_fp64(family: str) -> None:
    model = model_of(family).double()
    inputs = task_inputs("CAUSAL_LM", tokens())
    del inputs["attention_mask"]
    assert_close(compared(model, "shared", inputs), compared(model, "splice", inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_equals_splice(family: str) -> None:
    # In fp64 splice's own left padding is NaN where attention is eager: a row that sees nothing is -inf everywhere.
    model = model_of(family)
    inputs = padded_batch()
    assert_close(compared(model, "shared", inputs), compared(model, "splice", inputs), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_as_accurate_as_splice(family: str, dtype: torch.dtype) -> None:
    """The error against the same weights in fp64 is at most twice splice's, and one unit in the last place."""
    model = model_of(family, method="PROMPT")
    model.base_model.to(dtype)
    inputs = task_inputs("CAUSAL_LM", tokens(4, 12))
    found, plain = compared(model, "shared", inputs), compared(model, "splice", inputs)
    truth = compared(model.double(), "splice", inputs)
    for name, value in truth.items():
        allowed = 2 * largest(plain[name] - value) + ulp(largest(value), dtype)
        assert largest(found[name] - value) <= allowed, name
        assert found[name].dtype == plain[name].dtype


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["PROMPT", "MLP", "LSTM", "CPT"])
def test_loss_logits_and_gradients_equal_peft(method: str, attention: str) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", method, attn_implementation=attention)
    mine.route = "shared"
    inputs = task_inputs("CAUSAL_LM", tokens())
    expected, found = theirs(**inputs), mine(**inputs)
    expected.loss.backward()
    found.loss.backward()
    assert found.logits.shape == expected.logits.shape
    assert_close(
        {"loss": found.loss, "logits": found.logits, **gradients(mine)},
        {"loss": expected.loss, "logits": expected.logits, **gradients(theirs)},
        1e-5,
    )


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    return tuple(model(**inputs, **options, route=route).loss for route in ("shared", "splice"))  # type: ignore[return-value]


@pytest.mark.parametrize("inputs", [task_inputs("CAUSAL_LM", tokens()), padded_batch()], ids=["whole", "padded"])
@pytest.mark.parametrize("number", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_the_loss_equals_splices_over_the_same_number_of_items(inputs: dict[str, Tensor], number: Any) -> None:
    model = model_of("Llama")
    options = {} if number is None else {"num_items_in_batch": number}
    shared, spliced = losses(model, inputs, **options)
    torch.testing.assert_close(shared, spliced, rtol=1e-6, atol=1e-6)


def test_unlabelled_tokens_count_nothing_and_unlabelled_batches_have_no_mean() -> None:
    model = model_of("Llama")
    inputs = task_inputs("CAUSAL_LM", tokens())
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, :3] = -100  # the prompt's last row predicts nothing then
    inputs["labels"][1] = -100
    torch.testing.assert_close(*losses(model, inputs), rtol=1e-6, atol=1e-6)
    inputs["labels"][:] = -100
    shared, spliced = losses(model, inputs)
    assert shared.isnan() and spliced.isnan()


def test_the_prompts_last_row_predicts_the_first_token() -> None:
    model = model_of("Llama")
    ids = tokens()
    first = torch.full_like(ids, -100)
    first[:, 0] = ids[:, 0]
    output = model(input_ids=ids, labels=first, route="shared")
    torch.testing.assert_close(output.loss, cross_entropy(output.logits[:, ROWS - 1], ids[:, 0]))


@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT"])
def test_position_ids_equal_splices(family: str) -> None:
    model = model_of(family).double()
    inputs = {**task_inputs("CAUSAL_LM", tokens()), "position_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2]])}
    assert_close(compared(model, "shared", inputs), compared(model, "splice", inputs))


def test_autocast_equals_splice_under_autocast() -> None:
    model = model_of("Llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared, spliced = losses(model, task_inputs("CAUSAL_LM", tokens()))
    torch.testing.assert_close(shared, spliced, rtol=1e-2, atol=1e-2)
    assert shared.dtype == torch.float32


def test_trainable_base_parameters_get_splices_gradients() -> None:
    """A base that is trained with the prompt, in part by LoRA: both the prompt's pass and the text's count."""
    from peft import LoraConfig, inject_adapter_in_model

    model = model_of("Llama").double()
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model.base_model
    )
    model.double()
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad_("lora" in name or "layers.0.mlp" in name or "norm" in name or "lm_head" in name)
    inputs = task_inputs("CAUSAL_LM", tokens())
    found = compared(model, "shared", inputs)
    assert sum("lora" in name for name in found) == 8
    assert_close(found, compared(model, "splice", inputs))


@pytest.mark.parametrize("inputs", [task_inputs("SEQ_CLS", tokens()), padded_batch("SEQ_CLS")], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Falcon"])
def test_sequence_classification_equals_splice(family: str, inputs: dict[str, Tensor]) -> None:
    model = model_of(family, "SEQ_CLS")
    results = {}
    for route in ("shared", "splice"):
        model.zero_grad()
        output = model(**inputs, route=route, output_hidden_states=True)
        output.loss.backward()
        last = output.hidden_states[-1]
        assert last.shape == (3, ROWS + inputs["input_ids"].shape[1], WIDTH)
        results[route] = {"loss": output.loss, "logits": output.logits, "last": last[:, -1], **gradients(model)}
    assert any("score" in name for name in results["shared"])
    assert_close(results["shared"], results["splice"], 2e-5)


def test_experts_are_shared_too_unless_the_routers_loss_is_wanted() -> None:
    model = model_of("Mixtral")
    inputs = task_inputs("CAUSAL_LM", tokens())
    torch.testing.assert_close(*losses(model, inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(fusedprompt.BackendUnavailable, match="output_router_logits"):
        model(**inputs, output_router_logits=True, route="shared")


def test_a_loss_function_of_the_base_models_own_gets_what_splice_gives_it() -> None:
    model = model_of("Llama")
    seen = []

    def loss_function(logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
        seen.append((logits.shape, labels, vocab_size, given["num_items_in_batch"]))
        return logits[labels != -100].pow(2).mean()

    model.base_model.loss_function = loss_function
    shared, spliced = losses(model, padded_batch(), num_items_in_batch=3)
    torch.testing.assert_close(shared, spliced)
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1]) and seen[0][2:] == seen[1][2:]


# What is computed


class Seen:
    """Shapes of the inputs of a base model's layers, and of its head."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self.head: list[tuple[int, ...]] = []
        for layer in model.base_model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: self.tokens.append(args[0].shape[:2].numel()))
        model.base_model.lm_head.register_forward_pre_hook(lambda _, args: self.head.append(tuple(args[0].shape)))


@pytest.mark.parametrize("logits", ["full", "text"])
def test_a_step_computes_each_virtual_token_once(logits: str) -> None:
    """P + B·T tokens in each layer and not B·(P + T), and the head on one of the virtual ones."""
    model = ours("Llama", rows=20).train()
    seen = Seen(model)
    output = model(**task_inputs("CAUSAL_LM", tokens(6, 10)), logits=logits)
    output.loss.backward()
    assert seen.tokens == [20, 20, 60, 60]  # two layers, twice
    assert seen.head == [(1, 1, WIDTH), (6, 10, WIDTH)]
    assert output.logits.shape == (6, 30 if logits == "full" else 10, 67)
    assert seen.head[2:] == ([(1, 20, WIDTH)] if logits == "full" else [])  # when they are read, and once


def test_without_a_loss_the_head_runs_on_all_virtual_tokens_at_once() -> None:
    model = ours("Llama", rows=20)
    seen = Seen(model)
    assert model(input_ids=tokens(6, 10)).logits.shape == (6, 30, 67)
    assert seen.head == [(1, 20, WIDTH), (6, 10, WIDTH)]


@pytest.mark.parametrize("method", ["PROMPT", "MLP"])
def test_logits_that_are_read_late_are_those_of_their_step(method: str) -> None:
    """After an update in place, in another mode, outside of autocast: the values are those of the forward pass."""
    model = ours("GPT2", method=method, rows=20)
    inputs = task_inputs("CAUSAL_LM", tokens(6, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, late = (model(**inputs, route=route) for route in ("splice", "shared"))
    late.loss.backward()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(-3)
    model.train()  # with GPT-2's dropout
    assert largest(late.logits - expected.logits) < 0.05 * largest(expected.logits)
    assert late.logits.dtype == expected.logits.dtype
    model.eval()
    assert largest(model(**inputs, route="splice").logits - expected.logits) > 0.1 * largest(expected.logits)


def test_logits_are_not_read_from_a_base_model_that_has_changed() -> None:
    model = ours("Llama", rows=20)
    output = model(**task_inputs("CAUSAL_LM", tokens(6, 10)))
    with torch.no_grad():
        model.base_model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="logits: expected to be read before the base model's weights change"):
        output.logits  # noqa: B018
    trained = ours("Llama", rows=20)
    weight = trained.base_model.lm_head.weight.requires_grad_()
    output = trained(**task_inputs("CAUSAL_LM", tokens(6, 10)))
    with torch.no_grad():
        weight.mul_(2)
    assert output.logits.isfinite().all()  # where it is trained, nothing waits


def test_keys_and_values_reach_the_text_as_views() -> None:
    model = ours("Llama", rows=20)
    caches = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: caches.append(given.get("past_key_values")) or None, with_kwargs=True
    )
    strides = []
    layer = model.base_model.model.layers[0]
    layer.register_forward_pre_hook(
        lambda _, args, given: strides.append(
            given["past_key_values"].layers[0].keys.stride(0) if given["past_key_values"].get_seq_length() else None
        ),
        with_kwargs=True,
    )
    model(**task_inputs("CAUSAL_LM", tokens(6, 10)))
    assert caches[0] is None and strides == [None, 0]


@pytest.mark.parametrize("route", ["shared", "splice"])
@pytest.mark.parametrize("method", ["MLP", "CPT"])
def test_text_logits_are_the_full_ones_at_the_text(route: str, method: str) -> None:
    model = model_of("Llama", method=method)
    for inputs in (task_inputs("CAUSAL_LM", tokens()), padded_batch()):
        full = model(**inputs, route=route)
        text = model(**inputs, route=route, logits="text")
        real = inputs["attention_mask"].bool()
        assert text.logits.shape == (*real.shape, 67)
        assert_close({"logits": text.logits[real]}, {"logits": full.logits[:, -real.shape[1] :][real]}, 1e-5)
        torch.testing.assert_close(text.loss, full.loss)


def test_outputs_can_be_tuples_and_leave_out_the_cache() -> None:
    model = model_of("Llama")
    inputs = task_inputs("CAUSAL_LM", tokens())
    shared, spliced = (model(**inputs, route=route, return_dict=False) for route in ("shared", "splice"))
    assert [type(part) for part in shared] == [type(part) for part in spliced]
    torch.testing.assert_close(shared[:2], spliced[:2], rtol=1e-5, atol=1e-5)
    assert model(**inputs, route="shared").past_key_values.get_seq_length() == ROWS + 7
    assert model(**inputs, route="shared", use_cache=False).past_key_values is None


def test_full_logits_have_gradients_of_their_own() -> None:
    model = model_of("Llama")
    inputs = task_inputs("CAUSAL_LM", tokens())
    results = []
    for route in ("shared", "splice"):
        model.zero_grad()
        logits = model(**inputs, route=route).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append(gradients(model))
    assert_close(*results, 2e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_base_is_not_compiled_again_at_the_same_shapes(backend: str) -> None:
    torch._dynamo.reset()
    expected = model_of("Llama", method="PROMPT")
    base = build("Llama")
    name, fields = config_fields("PROMPT")
    torch.manual_seed(7)
    model = fusedprompt.get_prompt_model(base, getattr(fusedprompt, name)(**fields), route="shared").eval()
    base.compile(backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    base.compile(backend=counter)
    inputs = task_inputs("CAUSAL_LM", tokens())
    frames = []
    for _ in range(4):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        frames.append(counter.frame_count)
    assert frames[1] == frames[3] and frames[0] > 0
    torch.testing.assert_close(loss, expected(**inputs, route="splice").loss, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_the_whole_model_compiles_on_the_shared_route() -> None:
    torch._dynamo.reset()
    model = model_of("Llama", method="PROMPT")
    inputs = task_inputs("CAUSAL_LM", tokens())
    expected = model(**inputs, route="shared")
    found = torch.compile(model, backend="aot_eager")(**inputs, route="shared")
    found.loss.backward()
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_reports_splices_losses_and_never_joins_logits(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It divides by the number of labels in all batches that it accumulates, and reads nothing but the loss."""
    from transformers import Trainer, TrainingArguments

    from fusedprompt.routes.states import PromptStates

    joined: list[int] = []
    join = PromptStates.joined
    monkeypatch.setattr(PromptStates, "joined", lambda *given: joined.append(1) or join(*given))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(32, 10)]
    histories = []
    for route in ("auto", "splice"):
        model = ours("Llama", rows=20)
        model.route = route
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5) and len(histories[0]) == 3
    assert not joined


def test_a_base_model_that_writes_into_its_embeddings_leaves_the_prompt_alone() -> None:
    """CTRL scales `inputs_embeds` in place: three evaluations multiplied a prompt by 181."""
    config = transformers.CTRLConfig(vocab_size=VOCAB, n_embd=WIDTH, dff=8, n_layer=2, n_head=4, n_positions=64)
    base = transformers.CTRLLMHeadModel(config).eval()
    model = fusedprompt.get_prompt_model(base, fusedprompt.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=20))
    rows, ids = model.prompt_rows().detach().clone(), tokens(8, 9)
    spliced = model(input_ids=ids, labels=ids, route="splice").loss
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            loss = model(input_ids=ids, labels=ids, route="shared").loss
        torch.testing.assert_close(loss, spliced)
    loss.backward()
    assert torch.equal(model.prompt_rows(), rows)
