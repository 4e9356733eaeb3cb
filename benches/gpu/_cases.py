"""The same work done by several contenders, on any device: ours, PEFT's, torch.compile's of PEFT's, and ATen's."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fusedprompt
from fusedprompt import Layout, ops

from .._models import encoder_config
from . import shapes
from .shapes import Shape

OURS, ATEN, PEFT, COMPILED = "fusedprompt", "ATen", "PEFT", "PEFT compiled"


@dataclass
class Work:
    """A contender's work on one set of inputs. forward: gives the output, recording a graph for backward."""

    forward: Callable[[], Tensor]
    parameters: Sequence[Tensor]
    d_out: Tensor

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.forward()
        return out, torch.autograd.grad(out, self.parameters, self.d_out)


@dataclass
class Case:
    """What is computed, and by whom.

    contenders: name to a function that makes its work on a set of inputs.
    truth: output and gradients in fp64, or exact, for set 0.
    tolerance: largest relative error in the Frobenius norm, of the output and of gradients.
    set_bytes: size of one set of inputs.
    precision: for `matmul_precision`.
    """

    shape: Shape
    contenders: dict[str, Callable[[int], Work]]
    truth: Callable[[], tuple[Tensor, Sequence[Tensor]]]
    tolerance: tuple[float, float]
    set_bytes: int
    precision: str = "highest"
    left_out: dict[str, str] = field(default_factory=dict)

    def check(self, works: dict[str, Work]) -> dict[str, Work]:
        """The contenders that can run, and whose results are right; ours must.

        Raises:
            AssertionError: ours is not.
        """
        true_out, true_gradients = self.truth()
        right = {}
        for name, work in works.items():
            try:
                out, gradients = work.both()
            except (RuntimeError, ValueError) as error:  # of torch.compile, and of a variant that does not fit
                if name == OURS:
                    raise
                self.left_out[name] = f"cannot run: {str(error).splitlines()[0]}"
                continue
            errors = [_error(out, true_out), max(map(_error, gradients, true_gradients), default=0.0)]
            if all(error <= limit for error, limit in zip(errors, self.tolerance)):
                right[name] = work
                continue
            message = f"{errors[0]:.2g} (output) and {errors[1]:.2g} (gradients) away from the truth"
            assert name != OURS, f"{self.shape.group} {self.shape.name} {self.shape.dtype}: {message}"
            self.left_out[name] = message
        return right


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _normal(source: torch.Generator, *shape: int) -> Tensor:
    """Drawn on the CPU: the same numbers on every GPU."""
    return torch.randn(shape, generator=source, device="cpu")


def _error(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    error = float((value - truth).norm() / truth.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


# The dtypes of the parameters and of autocast, the precision of fp32 products, and the tolerance. Gradients jump where
# rounding moves the input of a ReLU across zero.
_KINDS: dict[str, tuple[torch.dtype, torch.dtype | None, str, tuple[float, float]]] = {
    "fp32": (torch.float32, None, "highest", (1e-5, 2e-3)),
    "tf32": (torch.float32, None, "high", (3e-3, 0.05)),
    "bf16": (torch.bfloat16, None, "highest", (0.02, 0.12)),
    "bf16 autocast": (torch.float32, torch.bfloat16, "highest", (0.02, 0.12)),
}


def mlp_case(rows: int, width: int, kind: str, device: torch.device) -> Case:
    """P-tuning's encoder: three layers, D = H = width."""
    config = encoder_config("MLP", rows, width, width)
    modules = (lambda: peft.PromptEncoder(config), lambda: fusedprompt.PromptEncoder(config))
    return _encoder_case(shapes.mlp(rows, width, kind), modules, (rows, width), kind, device)


def projection_case(rows: int, layers: int, width: int, kind: str, device: torch.device) -> Case:
    """Prefix tuning's encoder: keys and values of L layers from two layers, D = H = width."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=rows,
        token_dim=width,
        num_layers=layers,
        num_attention_heads=1,
        encoder_hidden_size=width,
        prefix_projection=True,
    )
    modules = (lambda: peft.PrefixEncoder(config), lambda: fusedprompt.PrefixEncoder(config))
    shape = shapes.projection(rows, layers, width, kind)
    return _encoder_case(shape, modules, (rows, 2 * layers * width), kind, device)


def _encoder_case(
    shape: Shape,
    modules: tuple[Callable[[], nn.Module], Callable[[], Any]],
    sizes: tuple[int, int],
    kind: str,
    device: torch.device,
) -> Case:
    """modules: make PEFT's and ours. sizes: of what they give."""
    dtype, autocast, precision, tolerance = _KINDS[kind]
    indices = torch.arange(sizes[0], device=device).unsqueeze(0)
    d_out = _normal(_seeded(1), *sizes).to(device, autocast or dtype)

    def within(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if autocast is None:
            return function

        def forward() -> Tensor:
            # The cache keeps 16-bit copies of the weights for as long as autocast lasts: here, one call.
            with torch.autocast(device.type, autocast):
                return function()

        return forward

    def make_module(index: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return modules[0]().to(device, dtype)

    def make_ours(index: int, backend: str) -> Work:
        theirs = make_module(index)
        module = modules[1]().to(device, dtype)
        module.load_state_dict(theirs.state_dict())

        def forward() -> Tensor:
            with fusedprompt.use_backend(backend):
                return module.encode()

        return Work(within(forward), list(module.parameters()), d_out)

    template = make_module(0)

    def call_template(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(template, parameters, (indices,)).squeeze(0)

    compiled = torch.compile(call_template)  # once for all sets: modules of their own would be compiled anew

    def make_theirs(index: int, is_compiled: bool) -> Work:
        module = make_module(index)
        parameters = dict(module.named_parameters())
        if is_compiled:
            return Work(within(lambda: compiled(parameters)), list(parameters.values()), d_out)
        return Work(within(lambda: module(indices).squeeze(0)), list(parameters.values()), d_out)

    def truth() -> tuple[Tensor, Sequence[Tensor]]:
        module = make_module(0).double()
        work = Work(lambda: module(indices).squeeze(0), list(module.parameters()), d_out.double())
        return work.both()

    return Case(
        shape=shape,
        contenders={
            OURS: lambda index: make_ours(index, "auto"),  # cuBLAS's products, where there are many rows
            ATEN: lambda index: make_ours(index, "reference"),
            PEFT: lambda index: make_theirs(index, is_compiled=False),
            COMPILED: lambda index: make_theirs(index, is_compiled=True),
        },
        truth=truth,
        tolerance=tolerance,
        set_bytes=sum(parameter.nbytes for parameter in template.parameters()),
        precision=precision,
    )


def cpt_case(rows: int, width: int, device: torch.device) -> Case:
    """A context and its change, in a ball for each row. PEFT is its encoder, whose indices wait for the device."""
    types = [row % 5 for row in range(rows)]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=list(range(rows)), cpt_mask=[1] * rows, cpt_tokens_type_mask=types
    )
    config.token_dim = width
    indices, d_out = torch.arange(rows, device=device).unsqueeze(0), _normal(_seeded(1), rows, width).to(device)
    epsilon = torch.where(torch.tensor(types) % 4 == 0, 1e-10, 0.1 * (width / 2048) ** 0.5).to(device)
    trainable = (torch.tensor(types) % 4 != 0).to(device)

    def draw(index: int) -> tuple[Tensor, Tensor]:
        source = _seeded(index)
        return _normal(source, rows, width).to(device), _normal(source, rows, width).to(device).requires_grad_()

    def make_ours(index: int, backend: str) -> Work:
        table, delta = draw(index)
        return Work(lambda: ops.cpt(table, delta, epsilon, trainable, backend=backend)[0], [delta], d_out)

    def make_theirs(index: int) -> Work:
        table, delta = draw(index)
        module = peft.CPTEmbedding(config, nn.Embedding(rows, width)).to(device)
        module.embedding.weight.data, parameter = table, module.delta_embedding.weight

        def forward() -> Tensor:
            parameter.data = delta.detach()  # it gives the parameter new memory in every call
            out: Tensor = module(indices)[0]
            return out

        return Work(forward, [parameter], d_out)

    def truth() -> tuple[Tensor, Sequence[Tensor]]:
        table, delta = (tensor.detach().double() for tensor in draw(0))
        scale = (epsilon.double() / delta.norm(dim=1)).clamp(max=1).unsqueeze(1)
        return table + delta * scale, [d_out.double() * trainable.unsqueeze(1)]

    return Case(
        shape=shapes.cpt(rows, width),
        contenders={
            OURS: lambda index: make_ours(index, "triton"),
            ATEN: lambda index: make_ours(index, "reference"),
            PEFT: make_theirs,
        },
        truth=truth,
        tolerance=(1e-6, 0.0),
        set_bytes=4 * rows * width * 4,
    )


def lstm_case(rows: int, width: int, hidden: int, kind: str, device: torch.device) -> Case:
    """P-tuning's LSTM: two layers, bidirectional, batch 1. ATen is nn.LSTM, which on a GPU is cuDNN."""
    dtype, _, precision, tolerance = _KINDS[kind]
    d_out = _normal(_seeded(1), 1, rows, 2 * hidden).to(device, dtype)

    def make_module(index: int) -> tuple[nn.LSTM, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            module = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
            x = torch.randn(1, rows, width)
        return module.to(device, dtype), x.to(device, dtype).requires_grad_()

    def make_ours(index: int) -> Work:
        module, x = make_module(index)
        weights = [getattr(module, name) for names in module._all_weights for name in names]
        return Work(lambda: ops.lstm(x, weights, num_layers=2, backend="native"), [x, *weights], d_out)

    def make_theirs(index: int) -> Work:
        module, x = make_module(index)

        return Work(
            lambda: module(x)[0],
            [x, *(getattr(module, name) for names in module._all_weights for name in names)],
            d_out,
        )

    def truth() -> tuple[Tensor, Sequence[Tensor]]:
        module, x = make_module(0)
        module, x = module.double(), x.detach().double().requires_grad_()
        parameters = [x, *(getattr(module, name) for names in module._all_weights for name in names)]
        return Work(lambda: module(x)[0], parameters, d_out.double()).both()

    weights = 2 * (4 * hidden * (width + hidden) + 4 * hidden * (2 * hidden + hidden)) + 4 * 2 * 4 * hidden
    rows_bytes = rows * (width + 4 * hidden) * dtype.itemsize
    return Case(
        shape=shapes.lstm(rows, width, hidden, kind),
        contenders={OURS: make_ours, ATEN: make_theirs},
        truth=truth,
        # A rounded state is rounded again at every step.
        tolerance=(3 * tolerance[0], 3 * tolerance[1]),
        set_bytes=weights * dtype.itemsize + rows_bytes,
        precision=precision,
    )


def splice_case(batch: int, length: int, width: int, device: torch.device, rows: int = shapes.PROMPT_ROWS) -> Case:
    """The prompt in front of a batch, with mask and labels, as PEFT's forward does it; a bf16 model, an fp32 prompt."""
    vocabulary, dtype = 32000 if device.type == "cuda" else 50, torch.bfloat16
    source = _seeded(0)
    table = _normal(source, vocabulary, width).to(device, dtype)
    d_out = _normal(source, batch, rows + length, width).to(device, dtype)

    def draw(index: int) -> tuple[Tensor, Tensor]:
        source = _seeded(index)
        # Numbers that bf16 has: all contenders must then agree to the bit.
        prompt = _normal(source, rows, width).bfloat16().float()
        ids = torch.randint(vocabulary, (batch, length), generator=source, device="cpu")
        return prompt.to(device).requires_grad_(), ids.to(device)

    def theirs(prompt: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lines of PEFT's PeftModelForCausalLM.forward, without the base model."""
        prompts = prompt.unsqueeze(0).repeat(batch, 1, 1).to(dtype)
        embeds = torch.cat((prompts, nn.functional.embedding(ids, table)), dim=1)
        ones = torch.ones(batch, rows, device=mask.device, dtype=mask.dtype)
        ignored = torch.full((batch, rows), -100, device=labels.device, dtype=labels.dtype)
        return embeds, torch.cat((ones, mask), dim=1), torch.cat((ignored, labels), dim=1)

    compiled = torch.compile(theirs)

    def make_theirs(index: int, is_compiled: bool) -> Work:
        prompt, ids = draw(index)
        call = compiled if is_compiled else theirs
        return Work(lambda: call(prompt, ids, ids, ids)[0], [prompt], d_out)

    def make_ours(index: int, backend: str) -> Work:
        prompt, ids = draw(index)
        layout = Layout.prefix(rows)

        def forward() -> Tensor:
            return ops.splice_batch(
                prompt, layout, input_ids=ids, table=table, attention_mask=ids, labels=ids, backend=backend
            ).inputs_embeds

        return Work(forward, [prompt], d_out)

    def truth() -> tuple[Tensor, Sequence[Tensor]]:
        prompt, ids = draw(0)
        embeds = torch.cat((prompt.expand(batch, -1, -1), table[ids].float()), dim=1)
        return embeds, [d_out[:, :rows].double().sum(0)]

    itemsize, total = dtype.itemsize, rows + length
    out_bytes = batch * total * width * itemsize
    in_bytes = batch * length * (width * itemsize + 8 * 3) + rows * width * 4
    return Case(
        shape=shapes.splice(batch, length, width, rows),
        contenders={
            OURS: lambda index: make_ours(index, "triton"),
            ATEN: lambda index: make_ours(index, "reference"),
            PEFT: lambda index: make_theirs(index, is_compiled=False),
            COMPILED: lambda index: make_theirs(index, is_compiled=True),
        },
        truth=truth,
        tolerance=(0.0, 0.01),  # PEFT sums the prompt's gradient in bf16
        set_bytes=in_bytes + out_bytes,
    )


def head_case(rows: int, width: int, vocabulary: int, kind: str, device: torch.device) -> Case:
    """A language model's head and loss. ATen is a Linear and transformers' loss."""
    dtype, _, precision, tolerance = _KINDS[kind]
    source = _seeded(0)
    weight = (_normal(source, vocabulary, width) * 0.05).to(device, dtype)
    labels = torch.randint(vocabulary, (rows,), generator=source, device="cpu").to(device)
    d_out = torch.ones((), device=device)

    def draw(index: int) -> Tensor:
        return _normal(_seeded(index), rows, width).to(device, dtype).requires_grad_()

    def plain(hidden: Tensor) -> Tensor:
        return nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    compiled = torch.compile(plain)

    def make_theirs(index: int, is_compiled: bool) -> Work:
        hidden = draw(index)
        return Work(lambda: (compiled if is_compiled else plain)(hidden), [hidden], d_out)

    def make_ours(index: int) -> Work:
        hidden = draw(index)
        return Work(lambda: ops.head_loss(hidden, weight, labels), [hidden], d_out)

    def truth() -> tuple[Tensor, Sequence[Tensor]]:
        hidden = draw(0).detach().double().requires_grad_()
        loss = nn.functional.cross_entropy(hidden @ weight.double().T, labels, reduction="sum")
        return loss, torch.autograd.grad(loss, hidden)

    return Case(
        shape=shapes.head(rows, width, vocabulary, kind),
        contenders={
            OURS: make_ours,
            ATEN: lambda index: make_theirs(index, is_compiled=False),
            COMPILED: lambda index: make_theirs(index, is_compiled=True),
        },
        truth=truth,
        tolerance=tolerance,
        set_bytes=(vocabulary + rows) * width * dtype.itemsize,
        precision=precision,
    )


def prefix_attention_case(
    batch: int, heads: int, kv_heads: int, length: int, prefix: int, width: int, kind: str, device: torch.device
) -> Case:
    """One prefix for all rows. ATen has keys that are put together for each row, as transformers' caches give them."""
    dtype, _, precision, tolerance = _KINDS[kind]
    d_out = _normal(_seeded(1), batch, heads, length, width).to(device, dtype)
    shapes_of = [(batch, heads, length, width), *[(1, kv_heads, prefix, width)] * 2]
    shapes_of += [(batch, kv_heads, length, width)] * 2

    def draw(index: int) -> list[Tensor]:
        source = _seeded(index)
        return [_normal(source, *shape).to(device, dtype).requires_grad_() for shape in shapes_of]

    def make_ours(index: int) -> Work:
        inputs = draw(index)
        return Work(lambda: ops.prefix_attention(*inputs), inputs, d_out)

    def together(query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pairs = ((prefix_key, key), (prefix_value, value))
        keys, values = (torch.cat((one.expand(batch, -1, -1, -1), own), 2) for one, own in pairs)
        seen = torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)

    def make_theirs(index: int) -> Work:
        inputs = draw(index)
        return Work(lambda: together(*inputs), inputs, d_out)

    def truth() -> tuple[Tensor, Sequence[Tensor]]:
        inputs = [one.detach().double().requires_grad_() for one in draw(0)]
        out = together(*inputs)
        return out, torch.autograd.grad(out, inputs, d_out.double())

    return Case(
        shape=shapes.prefix_attention(batch, heads, kv_heads, length, prefix, width, kind),
        contenders={OURS: make_ours, ATEN: make_theirs},
        truth=truth,
        tolerance=tolerance,
        set_bytes=sum(math.prod(shape) for shape in shapes_of) * dtype.itemsize,
        precision=precision,
    )


@dataclass(frozen=True)
class Planned:
    """A case that is not built yet."""

    name: str
    build: Callable[[], Case]

    def __str__(self) -> str:
        return self.name


def cases(device: torch.device) -> Iterator[Planned]:
    """The cases: first one of each op, then in turns; what matters least is last. On a CPU, at toy sizes.

    PEFT is compiled in the first of each op only, for that takes longer than all the rest of a case.
    """
    on_gpu = device.type == "cuda"
    splices = shapes.SPLICES if on_gpu else ((2, 6, 32),)
    lstms = shapes.LSTMS if on_gpu else ((5, 16, 24),)
    heads = shapes.HEADS if on_gpu else ((9, 16, 40),)
    mlps = shapes.MLPS if on_gpu else ((5, 16),)
    projections = shapes.PROJECTIONS if on_gpu else ((5, 2, 16),)
    contexts = shapes.CPTS if on_gpu else ((5, 16),)
    attentions = shapes.ATTENTIONS if on_gpu else ((2, 2, 1, 5, 7, 16),)
    half, others = ("bf16", "fp32"), ("bf16 autocast", "tf32")
    in_turns = itertools.zip_longest(
        ((splice_case, *sizes) for sizes in splices),
        ((lstm_case, *sizes, kind) for sizes in lstms for kind in half),
        ((head_case, *sizes, kind) for sizes in heads for kind in half),
        ((mlp_case, *sizes, kind) for kind in (*half, *others) for sizes in mlps),
        ((projection_case, *sizes, kind) for sizes in projections for kind in (*half, *others)),
        ((cpt_case, *sizes) for sizes in contexts),
        ((prefix_attention_case, *sizes, "bf16") for sizes in attentions),
    )
    planned: list[Any] = [case for turn in in_turns for case in turn if case is not None]
    if on_gpu:
        planned += [(lstm_case, *sizes, "tf32") for sizes in lstms]
        planned.sort(key=lambda case: case[0] is mlp_case and 8192 in case)
    for index, (function, *arguments) in enumerate(planned):
        is_first = index < 4
        words = (function.__name__.removesuffix("_case"), *arguments, *(["first"] if is_first else []))

        def build(function: Any = function, arguments: Any = arguments, is_first: bool = is_first) -> Case:
            case: Case = function(*arguments, device)
            if not is_first:
                case.contenders.pop(COMPILED, None)
            return case

        yield Planned("-".join(str(word).replace(" ", "-") for word in words), build)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """fp32 products of cuBLAS and of cuDNN: in IEEE fp32 where `name` is "highest", else in TF32."""
    before: Any = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
