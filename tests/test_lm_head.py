"""Training steps whose head is held back: the numbers of splice and PEFT, without logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedprompt
from fusedprompt.routes.head import waiting_head, withheld
from models import CPT_FIELDS, VOCAB, WIDTH, Largest, build, ours, pad, task_inputs, tokens
from tolerance import largest, one_thread

__all__ = ["one_thread"]
ROWS = 20


def model_of(family: str = "Llama", **overrides: Any) -> Any:
    return ours(family, method="PROMPT", rows=ROWS, **overrides)


def step(model: Any, read: bool = False, **overrides: Any) -> tuple[Any, int]:
    """A training step's output, and how many products it made with the head's weight."""
    inputs = {**task_inputs("CAUSAL_LM", tokens(6, 10)), "route": "shared", **overrides}
    model.zero_grad()
    with Largest() as counted:
        output = model(**inputs)
        output.loss.backward()
        if read:
            assert output.logits.shape == (6, ROWS + 10, VOCAB)
    return output, counted.head_products


def test_logits_wait_if_those_of_the_last_step_were_not_read() -> None:
    """Of the prompt one row's product and its gradient's, and two of the text; where the logits were read last time,
    the head runs as it does in the base model, over all of both, and nothing twice."""
    model = model_of()
    step(model_of(), read=False)  # first use asks for a loss, once for all models of a kind
    expected = model(**task_inputs("CAUSAL_LM", tokens(6, 10)), route="splice").logits
    counts = []
    for read in (False, False, True, True, False, False):
        output, products = step(model, read)
        counts.append(products)
        if read:
            torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)
    # The first call is watched: there the head runs too. Reading costs a product for the text and one for the prompt.
    assert counts == [5, 4, 6, 4, 4, 4]
    assert "forward" not in vars(model.base_model.lm_head) and not model.base_model.lm_head._forward_hooks


def test_loss_and_gradients_are_those_of_splice_at_every_step() -> None:
    model = model_of()
    results = []
    for route in ("shared", "shared", "splice"):
        model.zero_grad()
        loss = model(**task_inputs("CAUSAL_LM", tokens(6, 10)), route=route).loss
        loss.backward()
        (gradient,) = (parameter.grad for parameter in model.prompt_encoder.parameters())
        results.append((loss.item(), gradient))
    for loss, gradient in results[:2]:
        assert loss == pytest.approx(results[2][0], rel=1e-6)
        assert largest(gradient - results[2][1]) <= 1e-5 * largest(results[2][1])


def test_a_loss_of_ones_own_beside_the_outputs_adds_its_gradient() -> None:
    model = model_of()
    step(model)
    results = []
    for route in ("shared", "splice"):
        model.zero_grad()
        output = model(**task_inputs("CAUSAL_LM", tokens(6, 10)), route=route)
        (output.loss + output.logits.square().mean()).backward()
        (gradient,) = (parameter.grad for parameter in model.prompt_encoder.parameters())
        results.append(gradient)
    assert largest(results[0] - results[1]) <= 1e-5 * largest(results[1])


@pytest.mark.parametrize("family", ["Gemma2", "Cohere"])
def test_logits_that_are_more_than_the_heads_are_not_left_out(family: str) -> None:
    """Gemma 2 caps them, Cohere scales them."""
    scale = {"final_logit_softcapping": 0.01} if family == "Gemma2" else {"logit_scale": 0.25}
    model = model_of(family, **scale)
    inputs = task_inputs("CAUSAL_LM", tokens(6, 10))
    spliced = model(**inputs, route="splice")
    for _ in range(2):
        output = model(**inputs, route="shared")
        torch.testing.assert_close(output.loss, spliced.loss)
        torch.testing.assert_close(output.logits, spliced.logits, rtol=1e-5, atol=1e-6)


def test_a_scale_that_appears_later_is_noticed() -> None:
    model = model_of("Gemma2", final_logit_softcapping=None)
    inputs = task_inputs("CAUSAL_LM", tokens(6, 10))
    step(model)
    model.base_model.config.final_logit_softcapping = 0.01
    spliced = model(**inputs, route="splice")
    output, _ = step(model)
    torch.testing.assert_close(output.loss, spliced.loss)
    torch.testing.assert_close(output.logits, spliced.logits, rtol=1e-5, atol=1e-6)


def test_the_head_of_another_thread_runs() -> None:
    from threading import Thread

    head = nn.Linear(4, 6)
    hidden, found = torch.randn(3, 4), []
    with withheld(head) as kept:
        other = Thread(target=lambda: found.append(head(hidden)))
        other.start()
        other.join()
        assert kept.hidden is None
        assert head(hidden) is kept.stand_in and kept.hidden is hidden and kept.stand_in.shape == (3, 6)
    assert torch.equal(found[0], head(hidden)) and "forward" not in vars(head)


def test_the_head_comes_back_after_an_error() -> None:
    model = model_of()
    step(model)
    handle = model.base_model.lm_head.register_forward_hook(lambda *_: None)  # a hooked head is called
    assert waiting_head(model.base_model) is None
    handle.remove()
    model.base_model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model)
    assert "forward" not in vars(model.base_model.lm_head)


def test_the_heads_products_are_of_matrices() -> None:
    """A batched one, which PyTorch makes of a slice (1, 1, D), copies the whole weight first in bf16."""
    model, products = model_of(), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(isinstance(value, Tensor) and {VOCAB, WIDTH} <= set(value.shape) for value in args):
                products.append(func.name())
            return func(*args, **(kwargs or {}))

    with Products():
        nn.functional.linear(torch.zeros(1, ROWS, WIDTH)[:, -1:], model.base_model.lm_head.weight)
    assert "aten::bmm" in products
    products.clear()
    for _ in range(2):
        with Products():
            model(**task_inputs("CAUSAL_LM", tokens(6, 10)), route="shared").loss.backward()
    assert products.count("aten::mm") >= 3 and "aten::bmm" not in products


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_heads_that_are_no_plain_frozen_product_are_called() -> None:
    base = build("Llama").requires_grad_(False)
    assert waiting_head(base) is base.lm_head
    base.lm_head.weight.requires_grad_()
    assert waiting_head(base) is None
    base.lm_head.weight.requires_grad_(False)
    base.lm_head.register_forward_pre_hook(lambda *_: None)
    assert waiting_head(base) is None
    base.lm_head = Doubled(base.config.hidden_size, VOCAB, bias=False).requires_grad_(False)
    assert waiting_head(base) is None
    base = build("Llama").requires_grad_(False)
    base.compile(backend="eager")
    assert waiting_head(base) is None
    assert waiting_head(nn.Linear(2, 3)) is None


def gradient_of(model: Any, **inputs: Any) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    (gradient,) = (parameter.grad for parameter in model.prompt_encoder.parameters())
    assert gradient is not None
    return loss.item(), gradient


def assert_step_is_splices(model: Any, **inputs: Any) -> None:
    """Twice: the first step of a model watches its head."""
    loss, gradient = gradient_of(model, **inputs, route="splice")
    for _ in range(2):
        own_loss, own_gradient = gradient_of(model, **inputs)
        assert own_loss == pytest.approx(loss, rel=2e-6)
        assert largest(own_gradient - gradient) <= 2e-5 * largest(gradient)


FAMILIES = ("GPT2", "Llama", "Qwen2", "Gemma2", "Cohere", "OPT", "Phi", "Bloom")  # with bias, caps, scales, tied heads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_single_row_is_spliced_without_logits(family: str, padded: bool) -> None:
    ids, mask = pad(tokens(1, 6), 2, 1) if padded else (tokens(1, 6), None)
    model = model_of(family)
    assert_step_is_splices(model, **task_inputs("CAUSAL_LM", ids, mask))
    inputs = task_inputs("CAUSAL_LM", ids, mask)
    expected = model(**inputs, route="splice").logits
    with Largest() as counted:
        output = model(**inputs)
        output.loss.backward()
    assert counted.head_products == 2
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)


def test_splice_by_name_is_the_base_models_own_loss_to_the_bit() -> None:
    model = model_of()
    inputs = task_inputs("CAUSAL_LM", tokens(1, 10))
    rows = model.prompt_encoder["default"].embedding.weight
    embeds = torch.cat((rows, model.get_input_embeddings()(inputs["input_ids"][0]))).unsqueeze(0)
    labels = nn.functional.pad(inputs["labels"], (ROWS, 0), value=-100)
    assert torch.equal(model(**inputs, route="splice").loss, model.base_model(inputs_embeds=embeds, labels=labels).loss)


@pytest.mark.parametrize("number", [7, torch.tensor(7), None])
def test_accumulated_steps_divide_by_the_number_of_items(number: Any) -> None:
    for batch in (tokens(1, 10), tokens(6, 10)):
        inputs = task_inputs("CAUSAL_LM", batch)
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] % 3 == 0, -100)
        assert_step_is_splices(model_of(), **inputs, num_items_in_batch=number)


def test_gradient_checkpointing_leaves_the_logits_out_too() -> None:
    model = model_of().train()
    model.base_model.gradient_checkpointing_enable()
    assert_step_is_splices(model, **task_inputs("CAUSAL_LM", tokens(6, 10)))
    assert step(model, route="auto")[1] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_and_autocast_stay_within_rounding(dtype: torch.dtype) -> None:
    for rows in (1, 6):
        inputs = task_inputs("CAUSAL_LM", tokens(rows, 10))
        exact = gradient_of(model_of().double(), **inputs, route="splice")
        narrow, wide = model_of(), model_of()
        narrow.base_model.to(dtype)
        for model in (narrow, wide):
            errors = {}
            for route in ("splice", "auto", "auto"):
                with torch.autocast("cpu", dtype, enabled=model is wide):
                    loss, gradient = gradient_of(model, **inputs, route=route)
                errors[route] = largest(gradient.double() - exact[1])
                assert loss == pytest.approx(exact[0], rel=2e-2)
            assert errors["auto"] <= 2 * errors["splice"]


def test_bart_computes_a_loss_of_its_own() -> None:
    """Its labels are not moved by one, though it has the property `loss_function`."""
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": WIDTH, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    base = BartForCausalLM(BartConfig(vocab_size=VOCAB, is_encoder_decoder=False, dropout=0.0, **sizes)).eval()
    model = fusedprompt.get_prompt_model(base, fusedprompt.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4))
    assert_step_is_splices(model, **task_inputs("CAUSAL_LM", tokens(3, 10)))


@pytest.mark.parametrize("route", ["shared", "splice"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_cpt_steps_without_logits_are_those_with_them(route: str, decay: float) -> None:
    """The first waits after the head was watched, the second from the start, the third makes the logits at once."""
    weighted = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay} if decay != 1.0 else {}
    config = fusedprompt.CPTConfig(task_type="CAUSAL_LM", **CPT_FIELDS, **weighted)
    model = fusedprompt.get_prompt_model(build("Llama"), config).eval()
    (delta,) = (parameter for parameter in model.prompt_encoder.parameters() if parameter.requires_grad)
    torch.nn.init.normal_(delta, std=0.1)
    ids = tokens(6, 12)
    kinds = torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 8]).repeat(6, 1)
    kinds[1, :6] = 0
    results = []
    for read in (False, True, False):
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, input_type_mask=kinds, route=route)
        output.loss.backward()
        assert delta.grad is not None
        results.append((output.loss.item(), delta.grad.clone()))
        if read:
            logits = output.logits
    assert model.text_head.read is False
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-6)
    for loss, gradient in results[:2]:
        assert loss == pytest.approx(results[2][0], rel=1e-6)
        assert largest(gradient - results[2][1]) <= 1e-5 * largest(results[2][1])


def test_only_labelled_rows_of_a_cpt_batch_go_through_the_head() -> None:
    model = ours("Llama", method="CPT")
    ids = tokens(6, 12)
    kinds = torch.tensor([1, 2, 3, 4] * 3).repeat(6, 1)
    model(input_ids=ids, labels=ids, input_type_mask=kinds, route="splice").loss.backward()
    hidden = []
    original = torch.ops.fusedprompt.head_loss.default
    labels_of_context = sum(code % 4 == 0 and code > 0 for code in model.active_config.cpt_tokens_type_mask[1:])

    class Rows(Largest):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                hidden.append(int((args[3] != -100).sum()))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Rows() as rows:
        model(input_ids=ids, labels=ids, input_type_mask=kinds, route="splice").loss.backward()
    assert hidden == [6 * (3 + labels_of_context)]
    assert rows.head_products == 2


def test_reports_say_whether_the_loss_is_made_with_the_head() -> None:
    import peft

    model = model_of()
    assert model.explain().endswith("splice: reference, head_loss: reference")
    model.route = "splice"
    assert model.explain().endswith("splice: reference")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS)
    inputs = task_inputs("CAUSAL_LM", tokens(1, 10))
    capped = "loss: made of logits, because the base model's head is not a plain nn.Linear that comes last in it"
    for family, runs in (("Llama", True), ("Gemma2", False)):
        theirs = peft.get_peft_model(build(family, **({} if runs else {"final_logit_softcapping": 0.01})), config)
        expected = theirs(**inputs)
        with fusedprompt.apply(theirs) as patch:
            output = theirs(**inputs)
            torch.testing.assert_close(output.loss, expected.loss)
            torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)
            assert ("head_loss: reference" in str(patch)) is runs
            assert (capped in str(patch)) is not runs
        with fusedprompt.apply(theirs, route="splice") as patch:
            assert "head_loss" not in str(patch)
            assert torch.equal(theirs(**inputs).loss, expected.loss)
    theirs = peft.get_peft_model(build("Llama"), config)
    theirs.base_model.lm_head.weight.requires_grad_()
    assert "loss: made of logits, because a part of the base model is trained" in str(fusedprompt.apply(theirs))
