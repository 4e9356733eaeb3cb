"""The ops as torch sees them: schemas, fakes and gradients by opcheck; torch.compile without graph breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import fusedprompt as fp
import oracle
from fusedprompt import Layout, ops
from fusedprompt.ops.splice._op import POSITIONS
from tolerance import (
    Tensors,
    assert_as_accurate,
    assert_identical,
    generator,
    normal,
    one_thread,  # noqa: F401
)

Arguments = tuple[Any, ...]


def rand(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    return normal(shape, dtype, generator(sum(shape)), layout)


def grad(*shape: int, **options: Any) -> Tensor:
    return rand(*shape, **options).requires_grad_()


def mlp_samples() -> Iterator[Arguments]:
    for layout in ("contiguous", "transposed"):
        weights = [grad(5, 3, layout=layout), grad(4, 5, layout=layout)]
        yield grad(7, 3, layout=layout), weights, [grad(5), grad(4)], []
    yield grad(2, 3), [grad(5, 3), grad(4, 5)], [grad(5), grad(4)], [torch.ones(2, 5)]
    yield grad(2, 3), [grad(5, 3), grad(4, 5)], [grad(5), grad(4)], [], "tanh"
    yield rand(2, 3, dtype=torch.bfloat16), [rand(5, 3, dtype=torch.bfloat16)], [rand(5, dtype=torch.bfloat16)], []


def lstm_weights(make: Callable[..., Tensor], num_layers: int, bidirectional: bool, **options: Any) -> list[Tensor]:
    """For D = 3 and H = 4."""
    directions = 2 if bidirectional else 1
    weights = []
    for layer in range(num_layers):
        for _ in range(directions):
            width = 3 if layer == 0 else 4 * directions
            weights += [make(16, width, **options), make(16, 4, **options), make(16), make(16)]
    return weights


def lstm_samples(make: Callable[..., Tensor] = grad) -> Iterator[Arguments]:
    yield make(1, 5, 3), lstm_weights(make, 2, True), [], True
    yield make(2, 5, 3), lstm_weights(make, 1, False), [], False
    yield make(2, 3, 3), lstm_weights(make, 2, True), [torch.ones(3, 2, 8)], True
    yield make(2, 3, 3, layout="transposed"), lstm_weights(make, 1, True, layout="transposed"), [], True


def lstm_forward_samples() -> Iterator[Arguments]:
    yield from lstm_samples(rand)
    half = {"dtype": torch.bfloat16}
    weights = [weight.bfloat16() for weight in lstm_weights(rand, 2, True)]
    yield rand(2, 5, 3, **half), weights, [], True


def lstm_backward_samples() -> Iterator[Arguments]:
    for x, weights, masks, bidirectional in lstm_forward_samples():
        output, saved = torch.ops.fusedprompt.lstm_forward(x, weights, masks, bidirectional)
        yield torch.ones_like(output), x, weights, masks, bidirectional, output, saved


def slots() -> Tensor:
    """For B = 2, T = 4 and R = 3: a row used twice, one never."""
    return torch.tensor([[0, -1, -3, 1, 2, 3, -1], [-3, 3, 3, 2, -1, 0, -3]])


def splice_samples() -> Iterator[Arguments]:
    ids = torch.tensor([[1, 2, 0, 5], [5, 5, 4, 3]])
    mask, labels = torch.ones_like(ids), ids.clone()
    for where in (None, slots()):
        for prompt, table in ((grad(3, 8), rand(6, 8)), (grad(3, 8), grad(6, 8)), (rand(3, 8), grad(6, 8))):
            yield prompt, where, ids, table, None, [mask, labels], [1, -100]
        yield grad(3, 8), where, ids, grad(6, 8, dtype=torch.bfloat16), None, [], []
        yield grad(3, 8), where, ids, rand(6, 8), None, [labels], [-100]
        yield grad(3, 8), where, ids.int(), rand(6, 8), None, [mask.int()], [1]
        yield grad(3, 8), where, ids, rand(6, 8), None, [mask, ids], [1, POSITIONS + 2]
        yield grad(3, 8), where, None, None, grad(2, 4, 8), [mask, labels], [1, -100]
        for embeds in (rand(2, 4, 8), grad(2, 4, 8), grad(2, 4, 8, dtype=torch.bfloat16)):
            yield grad(3, 8), where, None, None, embeds, [], []
        yield grad(3, 8, layout="transposed"), where, None, None, grad(2, 4, 8, layout="transposed"), [], []

    own = torch.tensor([1, 0]), 3  # prefixes of one row each
    yield grad(3, 8), None, ids, rand(6, 8), None, [mask, labels], [1, -100], *own
    yield grad(3, 8, layout="transposed"), None, None, None, grad(2, 4, 8), [], [], *own


def splice_backward_samples() -> Iterator[Arguments]:
    yield rand(2, 5, 8), None, 3, 4, True, True, torch.tensor([1, 0]), 3
    for layout in ("contiguous", "transposed"):
        for where in (None, slots()):
            for prompt, tokens in ((True, True), (True, False), (False, True)):
                yield rand(2, 7, 8, layout=layout), where, 3, 4, prompt, tokens
    yield rand(2, 7, 8, dtype=torch.bfloat16), slots(), 3, 4, True, True


def cpt_samples() -> Iterator[Arguments]:
    trainable = torch.tensor([True, False, True])
    yield rand(3, 8), grad(3, 8), torch.rand(3), trainable
    yield rand(3, 8, dtype=torch.bfloat16), grad(3, 8, dtype=torch.bfloat16), torch.rand(3), trainable
    yield rand(3, 8, layout="transposed"), grad(3, 8), torch.rand(3), trainable
    yield rand(3, 8), grad(3, 8, layout="transposed"), torch.rand(3), trainable


def head_loss_samples() -> Iterator[Arguments]:
    labels, factors = torch.tensor([3, -100, 0, 10]), torch.rand(4)
    yield grad(4, 5), rand(11, 5), None, labels, None, 0.0, 1.0, True
    yield grad(4, 5, layout="transposed"), rand(11, 5), rand(11), labels, factors, 0.0, 1.0, True
    yield rand(4, 5), rand(11, 5, layout="transposed"), rand(11), labels, factors, 2.0, 0.5, False
    yield grad(4, 5, dtype=torch.bfloat16), rand(11, 5, dtype=torch.bfloat16), None, labels, factors, 2.0, 0.5, True


def prefix_attention_samples(make: Callable[..., Tensor] = grad) -> Iterator[Arguments]:
    """Two rows of two queries of two heads, which share one of keys."""
    index, mask = torch.tensor([1, -1]), torch.tensor([[True, True], [False, True]])
    prefix_mask = torch.tensor([[True, False, True], [True, True, True]])
    for layout in ("contiguous", "transposed"):
        keys = [make(2, 1, 2, 8, layout=layout) for _ in range(2)]
        one = [make(1, 1, 3, 8, layout=layout) for _ in range(2)]
        yield make(2, 2, 2, 8, layout=layout), *one, *keys, None, None, None, 0.3, 0, 0.0
        two = [make(2, 1, 3, 8, layout=layout) for _ in range(2)]
        yield make(2, 2, 2, 8, layout=layout), *two, *keys, index, prefix_mask, mask, 0.3, 0, 0.0
        yield make(2, 2, 2, 8, layout=layout), *two, *keys, index, None, mask, 0.3, 3, 2.0
    half = {"dtype": torch.bfloat16}
    one, keys = [rand(1, 1, 3, 8, **half) for _ in range(2)], [rand(2, 1, 5, 8, **half) for _ in range(2)]
    yield make(2, 1, 1, 8, **half), *one, *keys, None, None, None, 0.3, 0, 0.0


def prefix_attention_backward_samples() -> Iterator[Arguments]:
    for arguments in prefix_attention_samples(rand):
        out, lse = torch.ops.fusedprompt.prefix_attention(*arguments)
        yield torch.ones_like(out), out, lse, [True] * 5, *arguments
    yield torch.ones_like(out), out, lse, [True, False, True, False, False], *arguments


SAMPLES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "mlp": mlp_samples,
    "lstm": lstm_samples,
    "lstm_forward": lstm_forward_samples,
    "lstm_backward": lstm_backward_samples,
    "splice": splice_samples,
    "splice_backward": splice_backward_samples,
    "cpt": cpt_samples,
    "head_loss": head_loss_samples,
    "prefix_attention": prefix_attention_samples,
    "prefix_attention_backward": prefix_attention_backward_samples,
}


def test_every_op_of_the_library_has_samples() -> None:
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("fusedprompt::") for name in names if name.startswith("fusedprompt::")}
    # Triton's and the native ones have tests of their own.
    assert {name for name in ours if not name.endswith("_triton") and "_native" not in name} == set(SAMPLES)


@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, make in SAMPLES.items() for index, _ in enumerate(make())]
)
def test_op_passes_opcheck(name: str, index: int) -> None:
    arguments = list(SAMPLES[name]())[index]
    torch.library.opcheck(getattr(torch.ops.fusedprompt, name).default, arguments)


def differentiate(function: Callable[[Tensors], Tensor], inputs: Tensors) -> Tensors:
    """The result and the gradient of each input that requires one; a compiled function compiles its backward too."""
    leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    out = function(leaves)
    d_out = normal(tuple(out.shape), out.dtype, generator(9))
    wanted = {name: value for name, value in leaves.items() if value.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), d_out)
    return {"output": out.detach(), **{f"d_{name}": gradient for name, gradient in zip(wanted, gradients)}}


def mlp_case() -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        x, w0, w1, b0, b1 = inputs.values()
        return 2 * ops.mlp(x + 1, [w0, w1], [b0, b1])

    return run, {"x": grad(7, 3), "w0": grad(5, 3), "w1": grad(4, 5), "b0": grad(5), "b1": grad(4)}


def lstm_case() -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        x, *weights = inputs.values()
        return 2 * ops.lstm(x + 1, weights, num_layers=2)

    return run, {"x": grad(2, 5, 3), **{str(i): weight for i, weight in enumerate(lstm_weights(grad, 2, True))}}


def splice_case(use_slots: bool = True) -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        prompt, table, ids = inputs["prompt"], inputs["table"], inputs["ids"]
        layout = Layout.from_slots(slots(), 3) if use_slots else Layout.prefix(3)
        mask = torch.ones(ids.shape)
        batch = ops.splice_batch(prompt, layout, input_ids=ids, table=table, attention_mask=mask, labels=ids)
        return batch.inputs_embeds * (batch.attention_mask * batch.labels).unsqueeze(-1)

    return run, {"prompt": grad(3, 8), "table": grad(6, 8), "ids": torch.tensor([[1, 2, 0, 5], [5, 5, 4, 3]])}


def cpt_case() -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        epsilon, trainable = torch.tensor([0.1, 9.0, 0.5]), torch.tensor([True, False, True])
        rows, projected = ops.cpt(inputs["embedding"], inputs["delta"], epsilon, trainable)
        return rows * 2 + projected

    return run, {"embedding": rand(3, 8), "delta": grad(3, 8)}


def cpt_loss_case() -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        return ops.cpt_loss(inputs["logits"], torch.tensor([[1, 2, 3]]), torch.tensor([[4, 4, 8]]), decay=0.5)

    return run, {"logits": grad(1, 3, 8)}


def head_loss_case() -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        return 2 * ops.head_loss(inputs["hidden"] + 1, inputs["weight"], torch.tensor([3, -100, 0, 10]))

    return run, {"hidden": grad(4, 5), "weight": rand(11, 5)}


def prefix_attention_case() -> tuple[Callable[[Tensors], Tensor], Tensors]:
    def run(inputs: Tensors) -> Tensor:
        query, *others = inputs.values()
        return 2 * ops.prefix_attention(query + 1, *others, index=torch.tensor([0, -1]))

    shapes = {"prefix_key": (1, 2, 3, 8), "prefix_value": (1, 2, 3, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8)}
    return run, {"query": grad(2, 4, 5, 8), **{name: grad(*shape) for name, shape in shapes.items()}}


CASES = {
    "mlp": mlp_case,
    "lstm": lstm_case,
    "splice-slots": splice_case,
    "splice-prefix": lambda: splice_case(False),
    "cpt": cpt_case,
    "cpt_loss": cpt_loss_case,
    "head_loss": head_loss_case,
    "prefix_attention": prefix_attention_case,
}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        *((name, "aot_eager") for name in CASES),
        *((name, "inductor") for name in ("lstm", "splice-slots", "cpt", "prefix_attention")),
    ],
)
def test_op_compiles_without_graph_breaks_to_the_bits_of_eager(name: str, compiler: str) -> None:
    function, inputs = CASES[name]()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert_identical(differentiate(compiled, inputs), differentiate(function, inputs))


@pytest.mark.usefixtures("fresh_dynamo")
def test_mlp_compiled_by_inductor_matches_fp64_oracle_as_well_as_eager() -> None:
    function, inputs = mlp_case()

    def exact(values: Tensors) -> Tensor:
        x, w0, w1, b0, b1 = values.values()
        return 2 * oracle.mlp(x + 1, [w0, w1], [b0, b1])

    actual = differentiate(torch.compile(function, fullgraph=True), inputs)
    assert_as_accurate(actual, function, exact, inputs, normal((7, 4), torch.float32, generator(9)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("indices", [None, torch.arange(7).unsqueeze(0), torch.tensor([[0, 6, 3], [2, 2, 1]])])
@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_prompt_encoder_compiles_without_graph_breaks_to_the_bits_of_eager(
    encoder: str, indices: Tensor | None
) -> None:
    config = fp.PromptEncoderConfig(
        num_virtual_tokens=7, token_dim=6, encoder_hidden_size=5, encoder_reparameterization_type=encoder
    )
    module = fp.PromptEncoder(config)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def run(function: Callable[..., Tensor]) -> Tensors:
        out = function(indices)
        weights = dict(module.named_parameters())
        gradients = torch.autograd.grad(out, list(weights.values()), normal(tuple(out.shape), out.dtype, generator(9)))
        return {"output": out.detach(), **dict(zip(weights, gradients))}

    assert_identical(run(compiled), run(module))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("dynamic", "expected"), [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("start", [None, torch.tensor([0, 2])], ids=["prefix", "insert"])
def test_splice_compiled_once_for_every_text_length(start: Tensor | None, dynamic: bool | None, expected: int) -> None:
    def run(prompt: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        layout = Layout.prefix(3) if start is None else Layout.insert(3, ids.shape[1], start)
        batch = ops.splice_batch(prompt, layout, input_ids=ids, table=table, labels=ids)
        return batch.inputs_embeds * batch.labels.unsqueeze(-1)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    prompt, table = grad(3, 8), rand(6, 8)
    for length in (4, 5, 9, 17, 6):
        ids = torch.randint(0, 6, (2, length), generator=generator(length), device="cpu")
        actual, eager = compiled(prompt, ids, table), run(prompt, ids, table)
        assert torch.equal(actual, eager)
        assert_identical(*({"d": torch.autograd.grad(out.sum(), prompt)[0]} for out in (actual, eager)))
    assert counter.frame_count == expected


@pytest.mark.usefixtures("fresh_dynamo")
def test_prefix_attention_compiles_once_for_every_text_length_and_batch() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.prefix_attention, fullgraph=True, backend=counter, dynamic=True)
    prefix = [grad(1, 2, 3, 8), grad(1, 2, 3, 8)]
    for batch, length in ((5, 11), (7, 10), (6, 17)):  # sizes that are equal by chance would be taken for one
        own = [grad(batch, heads, length, 8) for heads in (4, 2, 2)]
        results = []
        for function in (compiled, ops.prefix_attention):
            out = function(own[0], *prefix, *own[1:])
            results.append({"out": out, **dict(zip("abcde", torch.autograd.grad(out.sum(), [*own, *prefix])))})
        assert_identical(*results)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_op_compiled_with_dropout_draws_the_masks_of_eager(name: str) -> None:
    _, inputs = CASES[name]()

    def run(values: Tensors) -> Tensor:
        x, *weights = values.values()
        if name == "mlp":
            return ops.mlp(x, weights[:2], weights[2:], dropout=0.5, training=True)
        return ops.lstm(x, weights, num_layers=2, dropout=0.5, training=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, run):
        torch.manual_seed(7)
        results.append(differentiate(function, inputs))
    assert_identical(*results)
