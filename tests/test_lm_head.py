"""The head run with the loss, a part at a time: against fp64, and against logits that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from fusedprompt import lm_head
from fusedprompt.lm_head import summed_head_loss, waiting_head, withheld
from models import VOCAB, build, ours, task_inputs, tokens
from tolerance import Tensors, assert_as_accurate, dtypes, evaluate, generator, largest, normal, one_thread

__all__ = ["one_thread"]
SMALL_PARTS = {"one part": (1 << 24, 256), "parts of 4 rows": (1, 4), "one row each": (1, 1)}


@pytest.mark.parametrize("parts", SMALL_PARTS.values(), ids=SMALL_PARTS)
@pytest.mark.parametrize(("rows", "vocabulary", "bias"), [(1, 1, False), (9, 33, True), (13, 40, False)])
@dtypes
def test_loss_and_gradient_are_as_accurate_as_pytorchs(
    parts: tuple[int, int], rows: int, vocabulary: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "_PART_ON_CPU", parts[0])
    monkeypatch.setattr(lm_head, "_FEWEST_ROWS", parts[1])
    source = generator(rows)
    labels = torch.randint(0, vocabulary, (rows,), generator=source)
    labels[1::3] = -100
    labels[-1] = vocabulary - 1
    weight, shift = normal((vocabulary, 24), dtype, source), normal((vocabulary,), dtype, source) if bias else None
    inputs = {"hidden": normal((rows, 24), dtype, source)}

    def plain(x: Tensors) -> Tensor:
        kind = x["hidden"].dtype
        logits = linear(x["hidden"], weight.to(kind), None if shift is None else shift.to(kind))
        return cross_entropy(logits if kind == torch.float64 else logits.float(), labels, reduction="sum")

    d_out = torch.tensor(0.37)
    found = evaluate(lambda x: summed_head_loss(x["hidden"], weight, shift, labels), inputs, d_out)
    assert_as_accurate(found, plain, plain, inputs, d_out)
    assert not found["d_hidden"][labels == -100].any()


def test_a_label_out_of_the_softmaxs_reach_has_a_finite_loss() -> None:
    """exp(-200) is 0 in fp32; the loss is 200 all the same."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[100.0, 0.0], [-100.0, 1.0]])
    loss = summed_head_loss(hidden, weight, None, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 200.0
    torch.testing.assert_close(hidden.grad, torch.tensor([[200.0, -1.0]]))


@pytest.mark.parametrize("rows", [0, 5])
def test_no_labels_give_no_loss_and_no_gradient(rows: int) -> None:
    hidden = torch.randn(rows, 8, requires_grad=True)
    loss = summed_head_loss(hidden, torch.randn(11, 8), None, torch.full((rows,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_the_gradient_of_the_gradient_is_refused() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    loss = summed_head_loss(hidden, torch.randn(11, 8), None, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_rounds_as_it_does_for_the_head(bias: bool) -> None:
    head = nn.Linear(32, 50, bias=bias).requires_grad_(False)
    labels = torch.randint(0, 50, (20,))
    gradients, losses = [], []
    for fused in (True, False):
        hidden = torch.linspace(-2, 2, 640).view(20, 32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                loss = summed_head_loss(hidden, head.weight, head.bias, labels)
            else:
                loss = cross_entropy(head(hidden).float(), labels, reduction="sum")
        losses.append(loss)
        gradients += torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert largest(gradients[0] - gradients[1]) <= 0.01 * largest(gradients[1])


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returned, and how many products had V columns or rows."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.head_products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t.data_ptr() for t in args if isinstance(t, Tensor)]
        if isinstance(result, Tensor) and all(result.stride()) and result.data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear)
        if func.overloadpacket in products and any(VOCAB in t.shape for t in args if isinstance(t, Tensor)):
            self.head_products += 1
        return result


@pytest.mark.parametrize("trains", [True, False])
def test_no_more_logits_exist_at_a_time_than_a_part(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_PART_ON_CPU", 1)
    monkeypatch.setattr(lm_head, "_FEWEST_ROWS", 8)
    hidden, weight = torch.randn(80, 16, requires_grad=trains), torch.randn(500, 16)
    with Largest() as largest_result:
        loss = summed_head_loss(hidden, weight, None, torch.zeros(80, dtype=torch.int64))
        if trains:
            loss.backward()
    assert largest_result.elements == 8 * 500


def test_rows_without_labels_do_not_go_through_the_head() -> None:
    hidden, weight, labels = torch.randn(40, 8), torch.randn(500, 8), torch.full((40,), -100)
    labels[7] = 3
    with Largest() as largest_result:
        summed_head_loss(hidden, weight, None, labels)
    assert largest_result.elements == 500


# Models

ROWS = 20


def model_of(family: str = "Llama", **overrides: Any) -> Any:
    return ours(family, method="PROMPT", rows=ROWS, **overrides)


def step(model: Any, read: bool = False, **overrides: Any) -> tuple[Any, int]:
    """A training step's output, and how many products it made with the head's weight."""
    inputs = {**task_inputs("CAUSAL_LM", tokens(6, 10)), **overrides}
    model.zero_grad()
    with Largest() as counted:
        output = model(**inputs, route="shared")
        output.loss.backward()
        if read:
            assert output.logits.shape == (6, ROWS + 10, VOCAB)
    return output, counted.head_products


def test_logits_wait_if_those_of_the_last_step_were_not_read() -> None:
    """Of the prompt one row's product and its gradient's, and two of the text; where the logits were read last time,
    the head runs as it does in the base model, over all of both, and nothing twice."""
    model = model_of()
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
