"""Patched PEFT models on quantised bases, and inside DDP, FSDP and the default compiler, against unpatched ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fusedprompt
from models import build, tokens
from test_apply_results import METHODS, assert_same, inputs_of, peft_model, run
from tolerance import one_thread  # noqa: F401


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Linear8bit(nn.Linear):
    """As bitsandbytes has it: a parameter of int8 that is no plain matrix, and a product that dequantises it."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Linear8bit:
        made = cls(linear.in_features, linear.out_features, bias=False)
        values, scale = quantised(linear.weight.data)
        made.weight = nn.Parameter(values, requires_grad=False)
        made.register_buffer("scale", scale)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Embedding8bit(nn.Embedding):
    @classmethod
    def of(cls, embedding: nn.Embedding) -> Embedding8bit:
        made = cls(*embedding.weight.shape)
        values, scale = quantised(embedding.weight.data)
        made.weight = nn.Parameter(values, requires_grad=False)
        made.register_buffer("scale", scale)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.scale[ids]


def replace(base: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    for path, module in list(base.named_modules()):
        if type(module) is kind:
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, make(module))


def on_base(base: Any, method: str) -> Any:
    """PEFT's model on a base model that is there already."""
    import peft

    from models import config_fields

    name, fields = config_fields(method)
    torch.manual_seed(7)
    return peft.get_peft_model(base, getattr(peft, name)(**fields)).eval()


@pytest.mark.parametrize("route", ["splice", "shared"])
@pytest.mark.parametrize("method", METHODS)
def test_8_bit_linears_and_embeddings_give_what_peft_gives(method: str, route: str) -> None:
    base = build("Llama")
    replace(base, nn.Linear, Linear8bit.of)
    replace(base, nn.Embedding, Embedding8bit.of)
    model, inputs = on_base(base, method), inputs_of("CAUSAL_LM")
    expected = run(model, inputs)
    generated = model.generate(input_ids=tokens(), max_new_tokens=4, pad_token_id=0)
    with fusedprompt.apply(model, route=route) as patch:
        assert_same(run(model, inputs), expected, shared=True)
        assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=4, pad_token_id=0), generated)
        assert not patch.refused
        assert "word embeddings: Embedding8bit" in patch.report()


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_modules_quantised_by_torch_give_what_peft_gives(kind: str) -> None:
    from torch.ao import quantization

    base = build("Llama", tie_word_embeddings=False)
    if kind == "linear":
        base = quantization.quantize_dynamic(base, {nn.Linear}, dtype=torch.qint8)
    model, inputs = on_base(base, "MLP"), inputs_of("CAUSAL_LM")
    if kind == "embedding":  # PEFT finds word embeddings by their parameter, which is packed away from now on
        model.word_embeddings.qconfig = quantization.float_qparams_weight_only_qconfig
        packed = torch.ao.nn.quantized.Embedding.from_float(model.word_embeddings)
        model.word_embeddings = packed
        model.base_model.set_input_embeddings(packed)
    with torch.no_grad():
        expected = model(**inputs)
        for route in ("splice", "shared") if kind == "embedding" else ("splice",):
            with fusedprompt.apply(model, route=route) as patch:
                actual = model(**inputs)
                assert not patch.refused
            torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(actual.loss, expected.loss)
    if kind == "linear":
        with pytest.raises(fusedprompt.BackendUnavailable, match="a quantised Linear rounds its input"):
            fusedprompt.apply(model, route="shared")


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
    "fully_shard": lambda model: _fully_shard(model),
}


def _fully_shard(model: Any) -> Any:
    for layer in model.base_model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_wrapped(rank: int, world_size: int, folder: str) -> None:
    """Two steps of each method in each wrapper, on this process's rows; patched and unpatched losses agree."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        for name, wrap in WRAPPERS.items():
            for method, route in (("MLP", "splice"), ("MLP", "shared"), ("PROMPT", "shared"), ("LSTM", "splice")):
                losses: list[list[float]] = [[], []]
                model = peft_model("Llama", method=method).train()
                for patched, twin in ((False, copy.deepcopy(model)), (True, model)):
                    if patched:
                        patch = fusedprompt.apply(twin, route=route)
                    wrapped = wrap(twin)
                    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
                    optimizer = torch.optim.AdamW(trained, lr=1e-2)
                    ids = tokens(2, seed=rank + 5)
                    for _ in range(3):
                        loss = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
                        loss.backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        losses[patched].append(loss.item())
                assert losses[1] == pytest.approx(losses[0], rel=1e-4), (name, method, route)
                assert losses[0][0] != losses[0][2]
                # Of a base model in shards the head is called with the rest of it.
                assert ("head_loss: reference" in str(patch)) == (name == "DDP" and route == "shared")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_ddp_and_fsdp_give_the_losses_of_plain_peft(world_size: int, tmp_path: Path) -> None:
    if world_size == 1:
        train_wrapped(0, 1, str(tmp_path))
    else:
        torch.multiprocessing.spawn(train_wrapped, (world_size, str(tmp_path)), world_size)


def test_the_default_compiler_gives_what_peft_gives() -> None:
    model, inputs = peft_model("GPT2", method="MLP", n_layer=1), inputs_of("CAUSAL_LM")
    with torch.no_grad():
        expected = model(**inputs)
        with fusedprompt.apply(model, route="splice"):
            actual = torch.compile(model)(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)
