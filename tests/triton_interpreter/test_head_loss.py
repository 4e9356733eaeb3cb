"""The loss's Triton kernel, run by Triton's interpreter on a CPU, against formulas in fp64 and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fusedprompt import ops

pytest.importorskip("triton")
from fusedprompt.ops import _triton

if not _triton.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1, set before triton is imported", allow_module_level=True)

from fusedprompt.ops.head_loss import _configs, _op, reference, triton
from fusedprompt.ops.head_loss._op import Scaling
from tolerance import Tensors, assert_as_accurate, evaluate, generator, largest, normal

PLAIN = Scaling(0.0, 1.0)
SCALINGS = {"plain": PLAIN, "soft cap": Scaling(3.0, 1.0), "scale": Scaling(0.0, 0.25), "both": Scaling(2.0, -1.5)}
SCALINGS["negative scale"] = Scaling(0.0, -0.5)
scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
# One block of the kernel; more than two with a last one that is not full; whole ones.
VOCABULARIES = (1, 67, 1040, 2500)


def losses_of(logits: Tensor, labels: Tensor, factors: Tensor | None, scaling: Scaling) -> Tensor:
    """What PyTorch makes of (R, V) logits, in their dtype."""
    values = logits * scaling.scale
    if scaling.soft_cap:
        values = torch.tanh(values / scaling.soft_cap) * scaling.soft_cap
    losses = cross_entropy(values, labels, reduction="none")
    return (losses if factors is None else losses * factors.to(losses.dtype)).sum()


def some_labels(rows: int, vocabulary: int) -> Tensor:
    """With ignored ones among them, and both ends."""
    labels = torch.randint(0, vocabulary, (rows,), generator=generator(rows), device="cpu")
    labels[1::3] = -100
    labels[0], labels[-1] = 0, vocabulary - 1
    return labels


def in_place(logits: Tensor, labels: Tensor, factors: Tensor | None = None, scaling: Scaling = PLAIN) -> Tensors:
    """Loss and gradient, both from the kernel, in memory with a wall of NaN on either side that must stand."""
    guarded = torch.full((logits.shape[0] + 2, *logits.shape[1:]), torch.nan, dtype=logits.dtype)
    guarded[1:-1] = logits
    loss = triton.IMPLEMENTATION.loss_in_place(guarded[1:-1], labels, factors, True, scaling)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    return {"output": loss, "d_logits": guarded[1:-1]}


# Every size and dtype without options and with both; no option looks at these.
RUNS = [(name, size, kind) for name in ("plain", "both") for size in VOCABULARIES for kind in [torch.float32]]
RUNS += [(name, 1040, torch.float32) for name in ("soft cap", "scale", "negative scale")]
RUNS += [(name, 2500, kind) for name in ("plain", "both") for kind in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("scaling", "vocabulary", "dtype"), [(SCALINGS[name], *rest) for name, *rest in RUNS], ids=str)
def test_loss_and_gradient_of_logits_are_as_accurate_as_pytorchs(
    dtype: torch.dtype, vocabulary: int, scaling: Scaling
) -> None:
    labels, factors = some_labels(7, vocabulary), torch.rand(7, generator=generator(7), device="cpu")
    inputs = {"logits": 3 * normal((7, vocabulary), dtype, generator(vocabulary))}

    def plain(x: Tensors) -> Tensor:
        logits = x["logits"]
        return losses_of(logits if logits.dtype == torch.float64 else logits.float(), labels, factors, scaling)

    found = in_place(inputs["logits"], labels, factors, scaling)
    # The interpreter truncates to 16 bits where it should round; its exp and PyTorch's differ in the last place.
    assert_as_accurate(found, plain, plain, inputs, torch.ones(()), ulps=2)
    assert not found["d_logits"][labels == -100].any()


@pytest.mark.parametrize(
    ("scaling", "bias", "few", "dtype"),
    [
        *((scaling, True, False, torch.float32) for scaling in SCALINGS.values()),
        (PLAIN, False, True, torch.float32),
        (SCALINGS["both"], False, False, torch.bfloat16),
        (SCALINGS["both"], True, True, torch.bfloat16),
        (SCALINGS["soft cap"], True, False, torch.float16),
    ],
    ids=str,
)
def test_head_loss_and_its_gradient_are_as_accurate_as_pytorchs(
    dtype: torch.dtype, few: bool, bias: bool, scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part, and in parts of 4 rows."""
    if not few:
        monkeypatch.setattr(_op, "_PART_ON_CPU", 1)
        monkeypatch.setattr(_op, "_FEWEST_ROWS", 4)
    source, labels = generator(3), some_labels(9, 67)
    weight, shift = normal((67, 24), dtype, source), normal((67,), dtype, source) if bias else None
    factors = torch.rand(9, generator=source, dtype=torch.float64, device="cpu")
    inputs = {"hidden": normal((9, 24), dtype, source)}

    def plain(x: Tensors) -> Tensor:
        kind = x["hidden"].dtype
        logits = linear(x["hidden"], weight.to(kind), None if shift is None else shift.to(kind))
        return losses_of(logits if kind == torch.float64 else logits.float(), labels, factors, scaling)

    def fused(x: Tensors) -> Tensor:
        options: dict[str, Any] = {"soft_cap": scaling.soft_cap or None, "scale": scaling.scale, "backend": "triton"}
        return ops.head_loss(x["hidden"], weight, labels, bias=shift, factors=factors, **options)

    d_out = torch.tensor(0.37)
    with _triton.recorded_launches() as launches:
        found = evaluate(fused, inputs, d_out)
    assert launches == ["loss_in_place"] * (1 if few else 3)
    assert_as_accurate(found, plain, plain, inputs, d_out, ulps=2)
    assert not found["d_hidden"][labels == -100].any()


@pytest.mark.parametrize("rows", [0, 5])
def test_no_labels_give_no_loss_and_no_gradient_whatever_the_logits(rows: int) -> None:
    logits = torch.full((rows, 67), torch.nan)
    found = in_place(logits, torch.full((rows,), -100))
    assert found["output"] == 0 and torch.equal(found["d_logits"], torch.zeros(rows, 67))


def test_loss_alone_leaves_the_logits_as_they_are() -> None:
    logits, labels = normal((5, 67), torch.float32, generator(0)), some_labels(5, 67)
    before = logits.clone()
    loss = triton.IMPLEMENTATION.loss_in_place(logits, labels, None, False, PLAIN)
    assert torch.equal(logits, before) and torch.equal(loss, in_place(logits, labels)["output"])


def special_rows() -> dict[str, Tensor]:
    usual = normal((67,), torch.float32, generator(1))
    rows = {"usual": usual}
    for name, values in {
        "minus infinity": {3: -torch.inf},
        "its own minus infinity": {0: -torch.inf},
        "nothing but minus infinity": dict.fromkeys(range(67), -torch.inf),
        "infinity": {3: torch.inf},
        "its own infinity": {0: torch.inf},
        "NaN": {3: torch.nan},
        "its own NaN": {0: torch.nan},
        "large": {0: -3e4, 3: 3e4},
        "its own large": {0: 3e4, 66: -3e4},
        "all large": {i: 3e38 - i * 1e36 for i in range(67)},
    }.items():
        rows[name] = usual.clone()
        for place, value in values.items():
            rows[name][place] = value
    return rows


@scalings
@pytest.mark.parametrize("row", special_rows().values(), ids=special_rows())
def test_numbers_at_the_ends_give_what_the_reference_gives(row: Tensor, scaling: Scaling) -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    logits = torch.stack((row, torch.zeros(67)))
    expected = logits.clone()
    loss = reference.IMPLEMENTATION.loss_in_place(expected, labels, None, True, scaling)
    found = in_place(logits, labels, None, scaling)
    torch.testing.assert_close(found["output"], loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found["d_logits"], expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("label", [67, 2**40, -1, -(2**40)])
def test_a_label_outside_of_the_row_gives_nan_and_no_other_row_does(label: int) -> None:
    found = in_place(torch.zeros(3, 67), torch.tensor([1, label, 2]))
    assert found["output"].isnan()
    assert found["d_logits"].isnan().all(1).tolist() == [False, True, False]
    assert found["d_logits"].isnan().any(1).tolist() == [False, True, False]


def test_factors_of_zero_and_twice_the_same_call() -> None:
    logits, labels = normal((5, 2500), torch.bfloat16, generator(0)), some_labels(5, 2500)
    factors = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0])
    first, again = (in_place(logits, labels, factors) for _ in range(2))
    assert not first["d_logits"][2].any()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_tanh_is_as_accurate_near_zero_as_far_from_it() -> None:
    """A soft cap above all logits must change next to nothing, relative to each: 1 - exp(-x) would."""
    logits = torch.logspace(-6, 1, 67, dtype=torch.float64).float().view(1, 67)
    labels = torch.zeros(1, dtype=torch.int64)
    found = in_place(logits, labels, None, Scaling(1e3, 1.0))
    exact = logits.double().requires_grad_()
    loss = losses_of(exact, labels, None, Scaling(1e3, 1.0))
    (truth,) = torch.autograd.grad(loss, exact)
    assert abs(found["output"].double() - loss) <= 1e-6 * loss
    assert largest(found["d_logits"].double() / truth - 1) <= 4e-6


def test_wide_rows_get_wide_programs_and_all_have_equal_bytes_in_flight() -> None:
    assert [_configs.config(v, 2)["num_warps"] for v in (1, 1000, 32000, 128256)] == [4, 4, 32, 32]
    for vocabulary in (1, 67, 5000, 50257, 262144):
        half, full = _configs.config(vocabulary, 2), _configs.config(vocabulary, 4)
        assert {16 * 32 * c["num_warps"] // (c["BLOCK"] * size) for c, size in ((half, 2), (full, 4))} == {1}


def test_op_passes_opcheck_and_compiles_with_the_bits_of_eager() -> None:
    hidden, weight = normal((4, 5), torch.float32, generator(0)), normal((11, 5), torch.float32, generator(1))
    labels, factors, bias = torch.tensor([3, -100, 0, 10]), torch.rand(4), normal((11,), torch.float32, generator(2))
    for arguments in (
        (hidden.clone().requires_grad_(), weight, None, labels, None, 0.0, 1.0, True),
        (hidden.clone().requires_grad_(), weight, bias, labels, factors, 2.0, 0.5, True),
        (hidden, weight, bias, labels, factors, 2.0, 0.5, False),
    ):
        torch.library.opcheck(torch.ops.fusedprompt.head_loss_triton.default, arguments)
    leaf = hidden.clone().requires_grad_()

    def run() -> Tensor:
        return 2 * ops.head_loss(leaf, weight, labels, soft_cap=2.0, backend="triton")

    results = [torch.autograd.grad(run_, leaf) for run_ in (run(), torch.compile(run, backend="aot_eager")())]
    assert torch.equal(results[0][0], results[1][0])


def test_fp64_is_left_to_the_reference_and_the_rest_is_not() -> None:
    hidden = torch.zeros(2, 3)
    assert ops.explain("head_loss", hidden) == {"triton": "runs", "reference": "runs"}
    reason = "needs float32, bfloat16 or float16, got torch.float64"
    assert ops.explain("head_loss", hidden.double())["triton"] == reason
    with _triton.recorded_launches() as launches:
        ops.head_loss(hidden.double(), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
        assert launches == []
        ops.head_loss(hidden, torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64))
    assert launches == ["loss_in_place"]
