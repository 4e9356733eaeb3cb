"""CPT's projection and weighted loss against the fp64 oracle, and against PEFT where PEFT is right."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import oracle
from fusedprompt import ops
from tolerance import (
    Function,
    Tensors,
    assert_as_accurate,
    dtypes,
    each_backend,
    evaluate,
    examples,
    generator,
    normal,
    one_thread,  # noqa: F401
    require,
)

SHAPES = [(1, 1), (7, 33), (33, 97), (20, 64)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-D{}".format(*s))


def make(shape: tuple[int, int], dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensors, Tensor, Tensor]:
    """embedding and delta; epsilon (P,), shorter than about half of the changes; and type codes (P,)."""
    rows, width = shape
    source = generator(0)
    tensors = {name: normal(shape, dtype, source, layout) for name in ("embedding", "delta")}
    epsilon = (torch.rand(rows, generator=source, device="cpu") + 0.5) * width**0.5
    tensors["delta"][1::5] = 0.0
    return tensors, epsilon, torch.arange(rows) % 9


def peft(embedding: Tensor, delta: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """`CPTEmbedding.get_projection`, in the tensors' dtype."""
    bound = epsilon.to(delta.dtype)
    projected = delta * (bound / delta.norm(dim=1).clamp(min=bound)).unsqueeze(1)
    return embedding + projected, projected


def result(function: Any, index: int, *constants: Any, **options: Any) -> Function:
    """One of the two results, without gradients."""
    return lambda inputs: function(inputs["embedding"], inputs["delta"], *constants, **options)[index].detach()


@each_backend("cpt")
@pytest.mark.parametrize("index", [0, 1], ids=["rows", "projected"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@dtypes
@shapes
def test_cpt_matches_fp64_oracle(
    shape: tuple[int, int], dtype: torch.dtype, layout: str, index: int, backend: str
) -> None:
    inputs, epsilon, types = make(shape, dtype, layout)
    require("cpt", backend, *inputs.values(), epsilon, types % 4 != 0)
    actual = evaluate(result(ops.cpt, index, epsilon, types % 4 != 0, backend=backend), inputs, torch.empty(0))
    plain, exact = result(peft, index, epsilon), result(oracle.cpt, index, epsilon)
    assert_as_accurate(actual, plain, exact, inputs, torch.empty(0))


@each_backend("cpt")
def test_cpt_keeps_short_changes_bit_by_bit_and_bounds_long_ones(backend: str) -> None:
    inputs, epsilon, types = make((33, 97), torch.float32)
    require("cpt", backend, *inputs.values(), epsilon, types % 4 != 0)
    _, projected = ops.cpt(*inputs.values(), epsilon, types % 4 != 0, backend=backend)
    short = inputs["delta"].double().norm(dim=1) <= epsilon
    assert 5 < int(short.sum()) < 28
    assert torch.equal(projected[short], inputs["delta"][short])
    bound = epsilon[~short].double() * (1 + 4 * torch.finfo(torch.float32).eps)
    assert bool((projected[~short].double().norm(dim=1) <= bound).all())


@each_backend("cpt")
@pytest.mark.parametrize("scale", [1.0, 3e3], ids=["ordinary", "norm-beyond-fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpt_projects_in_fp32_and_rounds_each_value_once(dtype: torch.dtype, scale: float, backend: str) -> None:
    inputs, epsilon, types = make((7, 1000), dtype)
    delta = inputs["delta"] * scale
    require("cpt", backend, inputs["embedding"], delta, epsilon, types % 4 != 0)
    _, projected = ops.cpt(inputs["embedding"], delta, epsilon, types % 4 != 0, backend=backend)
    _, truth = oracle.cpt(inputs["embedding"], delta, epsilon)
    info = torch.finfo(dtype)  # one unit in the last place of each value
    assert bool(((projected.double() - truth).abs() <= info.eps * truth.abs().clamp(min=info.tiny)).all())


@each_backend("cpt")
@pytest.mark.parametrize("epsilon", [0.0, 1e-10])
def test_cpt_with_no_room_to_move_returns_the_embedding_without_nan(epsilon: float, backend: str) -> None:
    inputs, _, _ = make((6, 5), torch.float32)
    bound, trainable = torch.full((6,), epsilon), torch.ones(6, dtype=torch.bool)
    require("cpt", backend, *inputs.values(), bound, trainable)
    rows, projected = ops.cpt(*inputs.values(), bound, trainable, backend=backend)
    assert float(projected.abs().max()) <= epsilon
    assert torch.equal(rows, inputs["embedding"] + projected)
    assert torch.equal(projected[1], torch.zeros(5))  # delta is 0 there


@each_backend("cpt")
@dtypes
@shapes
def test_cpt_gradient_is_that_of_the_rows_where_trainable_and_embedding_has_none(
    shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    inputs, epsilon, types = make(shape, dtype)
    require("cpt", backend, *inputs.values(), epsilon, types % 4 != 0)
    embedding, delta = (value.requires_grad_() for value in inputs.values())
    rows, projected = ops.cpt(embedding, delta, epsilon, types % 4 != 0, backend=backend)
    assert rows.requires_grad and not projected.requires_grad
    d_rows = normal(shape, dtype, generator(9))
    rows.backward(d_rows)
    assert embedding.grad is None
    assert delta.grad.dtype == dtype
    assert torch.equal(delta.grad.double(), oracle.cpt_gradient(d_rows, types.tolist()))


@each_backend("cpt")
def test_cpt_of_no_rows_gives_no_rows(backend: str) -> None:
    arguments = (torch.zeros(0, 5), torch.zeros(0, 5).requires_grad_(), torch.zeros(0), torch.zeros(0).bool())
    require("cpt", backend, *arguments)
    rows, projected = ops.cpt(*arguments, backend=backend)
    assert rows.shape == projected.shape == (0, 5)
    rows.sum().backward()
    assert arguments[1].grad.shape == (0, 5)


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "embedding": torch.zeros(2, 3),
        "delta": torch.zeros(2, 3),
        "epsilon": torch.zeros(2),
        "trainable": torch.zeros(2, dtype=torch.bool),
        **changes,
    }
    options = {"backend": arguments.pop("backend")} if "backend" in arguments else {}
    return ops.cpt(*arguments.values(), **options)


META = torch.device("meta")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embedding": [[0.0]]}, TypeError, r"embedding: expected a tensor of shape \(P, D\), got list"),
        ({"embedding": torch.zeros(3)}, ValueError, r"embedding: expected shape \(P, D\), got \(3,\)"),
        ({"embedding": torch.zeros(2, 3).int()}, TypeError, r"embedding: .*floating.*torch.int32"),
        ({"delta": None}, TypeError, r"delta: expected a tensor of shape \(P, D\), got NoneType"),
        ({"delta": torch.zeros(2)}, ValueError, r"delta: expected shape \(P, D\), got \(2,\)"),
        ({"delta": torch.zeros(2, 4)}, ValueError, r"delta: .*\(P, D\) = \(2, 3\), got \(2, 4\)"),
        ({"delta": torch.zeros(2, 3).half()}, TypeError, r"delta: .*embedding, torch.float32, got torch.float16"),
        ({"delta": torch.zeros(2, 3, device=META)}, ValueError, r"delta: .*device of embedding, cpu, got meta"),
        ({"epsilon": 0.1}, TypeError, r"epsilon: expected a tensor of shape \(P,\), got float"),
        ({"epsilon": torch.zeros(3)}, ValueError, r"epsilon: .*\(P,\) = \(2,\), got \(3,\)"),
        ({"epsilon": torch.zeros(2, device=META)}, ValueError, r"epsilon: .*device of embedding, cpu, got meta"),
        ({"trainable": torch.zeros(2)}, TypeError, r"trainable: expected torch.bool, got torch.float32"),
        ({"trainable": torch.zeros(1).bool()}, ValueError, r"trainable: .*\(P,\) = \(2,\), got \(1,\)"),
        ({"trainable": torch.zeros(2, 1).bool()}, ValueError, r"trainable: expected shape \(P,\), got \(2, 1\)"),
        ({"backend": "native"}, ValueError, r"backend: expected one of .*'reference'.*for op 'cpt', got 'native'"),
    ],
)
def test_cpt_refuses_a_wrong_argument_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_cpt_accepts_the_arguments_that_the_refusals_start_from() -> None:
    assert [value.shape for value in call()] == [(2, 3), (2, 3)]


# Rows of type codes: one example, several, several in one row with gaps in the numbering, none, and -100 among labels.
TYPES = torch.tensor(
    [
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 4, 4, 4, 0, 6, 8, 8, 16, 16],
        [0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 4, 4],
        [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48],
    ]
)


def loss_inputs(dtype: torch.dtype, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    """Logits (B, S, V) and labels (B, S) at the label codes, one of them -100."""
    logits = 3 * normal((*TYPES.shape, vocabulary), dtype, generator(0))
    labels = torch.randint(0, vocabulary, TYPES.shape, generator=generator(1), device="cpu")
    labels[(TYPES == 0) | (TYPES % 4 != 0)] = -100
    labels[1, 4] = -100
    return logits, labels


def loss_of(labels: Tensor, decay: float, types: Tensor = TYPES) -> Function:
    return lambda inputs: ops.cpt_loss(inputs["logits"], labels, types, decay=decay)


def true_loss_of(labels: Tensor, decay: float, types: Tensor = TYPES) -> Function:
    return lambda inputs: oracle.cpt_loss(inputs["logits"], labels, types, decay)


def peft_loss(labels: Tensor, types: Tensor, decay: float, kind: str) -> Function:
    """PEFT's own loss, on fp32 copies of the logits."""
    from peft.tuners.cpt.model import CPTEmbedding

    config = SimpleNamespace(opt_weighted_loss_type=kind, opt_loss_decay_factor=decay)

    def run(inputs: Tensors) -> Tensor:
        output = SimpleNamespace(logits=inputs["logits"].float(), loss=None)
        return CPTEmbedding.calculate_loss(output, labels, types, config).loss

    return run


decays = pytest.mark.parametrize(("kind", "decay"), [("none", 1.0), ("decay", 0.5), ("decay", 0.95), ("decay", 0.0)])


@dtypes
@decays
def test_cpt_loss_and_its_gradient_match_fp64_oracle_as_well_as_peft_in_fp32(
    kind: str, decay: float, dtype: torch.dtype
) -> None:
    logits, labels = loss_inputs(dtype)
    inputs, d_out = {"logits": logits}, torch.tensor(1.25)
    actual = evaluate(loss_of(labels, decay), inputs, d_out)
    assert actual["output"].dtype == torch.float32 and actual["d_logits"].dtype == dtype
    assert_as_accurate(actual, peft_loss(labels, TYPES, decay, kind), true_loss_of(labels, decay), inputs, d_out)


def test_cpt_loss_of_fp64_logits_matches_fp64_oracle_as_well_as_fp64_cross_entropy() -> None:
    logits, labels = loss_inputs(torch.float64)
    inputs, targets = {"logits": logits}, labels[:, 1:]
    weights = torch.zeros(targets.shape, dtype=torch.float64)
    for row, codes in enumerate(TYPES[:, 1:].tolist()):
        examples = sorted({code for code in codes if code and code % 4 == 0}, reverse=True)
        values = [0.9 ** examples.index(code) if code in examples else 1.0 for code in codes]
        weights[row] = torch.tensor(values, dtype=torch.float64)

    def plain(values: Tensors) -> Tensor:
        losses = F.cross_entropy(values["logits"][:, :-1].transpose(1, 2), targets, reduction="none")
        return (losses * weights).sum() / (targets != -100).sum()

    actual = evaluate(loss_of(labels, 0.9), inputs, torch.tensor(1.0))
    assert_as_accurate(actual, plain, true_loss_of(labels, 0.9), inputs, torch.tensor(1.0))


def test_cpt_loss_of_bf16_logits_is_that_of_the_same_logits_in_fp32() -> None:
    logits, labels = loss_inputs(torch.bfloat16, 997)
    assert torch.equal(
        ops.cpt_loss(logits, labels, TYPES, decay=0.9), ops.cpt_loss(logits.float(), labels, TYPES, decay=0.9)
    )


@examples(40)
@given(data=st.data())
def test_cpt_loss_of_any_types_and_labels_matches_fp64_oracle(data: st.DataObject) -> None:
    batch, length, vocabulary = (data.draw(st.integers(1, high)) for high in (3, 7, 4))
    cells = st.lists(st.lists(st.integers(0, 17), min_size=length, max_size=length), min_size=batch, max_size=batch)
    types = torch.tensor(data.draw(cells))
    labels = torch.randint(0, vocabulary, (batch, length), generator=generator(2), device="cpu")
    labels[(types % 4 != 0) | (types == 0)] = -100
    labels[torch.rand(batch, length, generator=generator(3), device="cpu") < 0.2] = -100
    decay = data.draw(st.sampled_from((1.0, 0.5, 0.9)))
    inputs = {"logits": normal((batch, length, vocabulary), torch.float32, generator(data.draw(st.integers(0, 99))))}
    kind = "none" if decay == 1.0 else "decay"
    actual = evaluate(loss_of(labels, decay, types), inputs, torch.tensor(1.0))
    if bool((labels[:, 1:] == -100).all()):
        assert not actual["output"].any() and not actual["d_logits"].any()
    else:
        plain = peft_loss(labels, types, decay, kind)
        assert_as_accurate(actual, plain, true_loss_of(labels, decay, types), inputs, torch.tensor(1.0))


@decays
def test_cpt_loss_of_labels_without_a_label_code_weighs_them_1_as_peft_does(kind: str, decay: float) -> None:
    logits, _ = loss_inputs(torch.float32)
    labels = torch.randint(0, 11, TYPES.shape, generator=generator(4), device="cpu")
    inputs = {"logits": logits}
    actual = evaluate(loss_of(labels, decay), inputs, torch.tensor(1.0))
    plain, exact = peft_loss(labels, TYPES, decay, kind), true_loss_of(labels, decay)
    assert_as_accurate(actual, plain, exact, inputs, torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (2, 0), (0, 5)])
def test_cpt_loss_without_any_label_is_0_with_zero_gradient(shape: tuple[int, int]) -> None:
    logits = torch.randn(*shape, 7, requires_grad=True)
    labels = torch.full(shape, -100)
    if shape[1] == 5 and shape[0]:
        labels[:, 0] = 3  # nothing predicts the first position
    loss = ops.cpt_loss(logits, labels, torch.full(shape, 4), decay=0.5)
    assert loss.dtype == torch.float32 and not loss.any()
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_cpt_loss_ignores_the_logits_of_unlabelled_positions_even_where_they_are_infinite() -> None:
    logits, labels = loss_inputs(torch.float32)
    expected = ops.cpt_loss(logits, labels, TYPES, decay=0.5)
    ignored = torch.cat((labels[:, 1:] == -100, torch.ones(len(labels), 1, dtype=torch.bool)), dim=1)
    logits[ignored] = math.inf
    assert torch.equal(ops.cpt_loss(logits, labels, TYPES, decay=0.5), expected)


def test_cpt_loss_leaves_its_arguments_alone() -> None:
    logits, labels = loss_inputs(torch.float32)
    types, before = TYPES.clone(), labels.clone()
    ops.cpt_loss(logits, labels, types, decay=0.5)
    assert torch.equal(types, TYPES) and torch.equal(labels, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, r"logits: expected a tensor of shape \(B, S, V\), got list"),
        ({"logits": torch.zeros(3, 5)}, ValueError, r"logits: expected shape \(B, S, V\), got \(3, 5\)"),
        ({"logits": torch.zeros(2, 3, 5).long()}, TypeError, r"logits: .*floating.*torch.int64"),
        ({"labels": None}, TypeError, r"labels: expected a tensor of shape \(B, S\), got NoneType"),
        ({"labels": torch.zeros(2, 4).long()}, ValueError, r"labels: .*\(B, S\) = \(2, 3\), got \(2, 4\)"),
        ({"labels": torch.zeros(2, 3)}, TypeError, r"labels: .*got torch.float32"),
        ({"token_types": torch.zeros(3).long()}, ValueError, r"token_types: expected shape \(B, S\), got \(3,\)"),
        ({"token_types": torch.zeros(1, 3).long()}, ValueError, r"token_types: .*\(B, S\) = \(2, 3\), got \(1, 3\)"),
        ({"token_types": torch.zeros(2, 3)}, TypeError, r"token_types: .*got torch.float32"),
    ],
)
def test_cpt_loss_refuses_a_wrong_argument_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {
        "logits": torch.zeros(2, 3, 5),
        "labels": torch.zeros(2, 3).long(),
        "token_types": torch.ones(2, 3).long(),
    }
    assert ops.cpt_loss(**arguments).shape == ()
    with pytest.raises(error, match=message):
        ops.cpt_loss(**{**arguments, **changes})
