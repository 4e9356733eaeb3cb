"""The prompt encoder against PEFT's class of the same name: weights, keys, values and gradients."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedprompt as fp
from fusedprompt.ops import _native
from tolerance import assert_identical, generator, largest, normal, one_thread, ulp  # noqa: F401

ROWS, WIDTH, HIDDEN = 7, 12, 10


def encoder_fields(encoder: str, **changes: Any) -> dict[str, Any]:
    return {
        "num_virtual_tokens": ROWS,
        "token_dim": WIDTH,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": HIDDEN,
        "encoder_reparameterization_type": encoder,
        **changes,
    }


def encoder_pair(encoder: str, **changes: Any) -> tuple[fp.PromptEncoder, nn.Module]:
    """Ours and PEFT's, built from the same fields and the same seed."""
    fields = encoder_fields(encoder, **changes)
    torch.manual_seed(1)
    ours = fp.PromptEncoder(fp.PromptEncoderConfig(**fields))
    torch.manual_seed(1)
    kind = peft.PromptEncoderReparameterizationType(encoder)
    theirs = peft.PromptEncoder(peft.PromptEncoderConfig(**{**fields, "encoder_reparameterization_type": kind}))
    return ours, theirs


def values_and_gradients(module: nn.Module, indices: Tensor) -> dict[str, Tensor]:
    out = module(indices)
    module.zero_grad()
    out.backward(normal(tuple(out.shape), out.dtype, generator(9)))
    gradients = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    return {"output": out.detach(), **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """With torch's own tolerances for fp32."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda message, name=name: f"{name}: {message}")


ENCODERS = [("MLP", {}), ("LSTM", {"encoder_num_layers": 1}), ("LSTM", {}), ("LSTM", {"encoder_num_layers": 3})]
encoders = pytest.mark.parametrize(("encoder", "changes"), ENCODERS, ids=["MLP", "LSTM-1", "LSTM-2", "LSTM-3"])
INDICES = {
    "all": torch.arange(ROWS).unsqueeze(0),
    "batch": torch.arange(ROWS).repeat(3, 1),
    "mixed": torch.tensor([[3, 0, 0, 6], [1, 2, 3, 4], [3, 0, 0, 6]]),
}


@encoders
def test_prompt_encoder_has_the_weights_keys_and_attributes_of_peft_for_a_seed(
    encoder: str, changes: dict[str, Any]
) -> None:
    ours, theirs = encoder_pair(encoder, **changes)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_identical(ours.state_dict(), theirs.state_dict())
    assert [name for name, value in ours.named_parameters() if value.requires_grad] == list(theirs.state_dict())
    for name in ("token_dim", "input_size", "output_size", "hidden_size", "total_virtual_tokens"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert str(ours.encoder_type.value) == str(theirs.encoder_type.value)


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
@encoders
def test_prompt_encoder_has_the_values_and_gradients_of_peft(
    encoder: str, changes: dict[str, Any], indices: Tensor
) -> None:
    ours, theirs = encoder_pair(encoder, **changes)
    assert_close(values_and_gradients(ours, indices), values_and_gradients(theirs, indices))


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_prompt_encoder_loads_the_state_dict_of_peft_and_peft_loads_its(encoder: str) -> None:
    ours, theirs = encoder_pair(encoder)
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(1)
    ours.load_state_dict(theirs.state_dict())
    assert_identical(ours.state_dict(), theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_prompt_encoder_takes_the_configuration_of_peft() -> None:
    fields = encoder_fields("LSTM")
    torch.manual_seed(1)
    ours = fp.PromptEncoder(peft.PromptEncoderConfig(**fields))
    assert_identical(ours.state_dict(), encoder_pair("LSTM")[0].state_dict())


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_prompt_encoder_gives_the_same_bits_in_training_and_evaluation_and_for_any_batch(encoder: str) -> None:
    module, _ = encoder_pair(encoder)
    module.train()
    training = module.encode()
    assert training.requires_grad and training.shape == (ROWS, WIDTH)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module.encode(), training)
        assert torch.equal(module(), training)
        for batch in (1, 5):
            assert torch.equal(module(INDICES["all"].expand(batch, -1)), training.expand(batch, -1, -1))
        other = torch.tensor([[6, 5, 4, 3, 2, 1, 0]])
        assert torch.equal(module(torch.cat((other, INDICES["all"])))[1], training)
    for batch in (1, 5):
        assert torch.equal(module(INDICES["all"].expand(batch, -1)), training.expand(batch, -1, -1))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_mlp_encoder_has_as_many_hidden_layers_as_configured_and_runs_them_in_order(num_layers: int) -> None:
    module = fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("MLP", encoder_num_layers=num_layers)))
    sizes = [WIDTH, *[HIDDEN] * num_layers, WIDTH]
    shapes = {name: tuple(value.shape) for name, value in module.mlp_head.state_dict().items()}
    expected = {}
    for layer, (into, out) in enumerate(itertools.pairwise(sizes)):
        expected |= {f"{2 * layer}.weight": (out, into), f"{2 * layer}.bias": (out,)}
    assert shapes == expected
    assert torch.equal(module.encode(), module.mlp_head(module.embedding.weight))


def test_mlp_encoder_dropout_zeroes_hidden_activations_in_training_only() -> None:
    module = fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("MLP", encoder_dropout=0.5)))
    torch.manual_seed(2)
    training = module.encode()
    torch.manual_seed(2)
    rows = module.embedding.weight
    for layer in module.mlp_head:
        rows = layer(rows)
        if isinstance(layer, nn.ReLU):
            rows = F.dropout(rows, 0.5)
    assert torch.equal(training, rows)
    module.eval()
    assert torch.equal(module.encode(), module.mlp_head(module.embedding.weight))
    assert not torch.equal(module.encode(), training)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_lstm_encoder_dropout_gives_the_values_and_gradients_of_peft_for_a_seed(num_layers: int) -> None:
    with pytest.warns(UserWarning, match="dropout option") if num_layers == 1 else nullcontext():
        ours, theirs = encoder_pair("LSTM", encoder_num_layers=num_layers, encoder_dropout=0.4)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        results.append(values_and_gradients(module, INDICES["all"]))
    assert_close(*results)
    ours.eval(), theirs.eval()
    assert_close(values_and_gradients(ours, INDICES["all"]), values_and_gradients(theirs, INDICES["all"]))
    changed = not torch.equal(ours.encode(), results[0]["output"][0])
    assert changed is (num_layers > 1)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_prompt_encoder_under_autocast_has_the_dtype_of_peft_and_is_as_close_to_fp64(encoder: str) -> None:
    ours, theirs = encoder_pair(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(INDICES["all"])
        # Without AVX-512 oneDNN has no bf16 LSTM, and PEFT's raises; PyTorch's own code serves there.
        with torch.backends.mkldnn.flags(enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            plain = theirs(INDICES["all"])
    assert actual.dtype == plain.dtype == torch.bfloat16
    truth = theirs.double()(INDICES["all"])
    allowed = 2 * largest(plain.double() - truth) + ulp(largest(truth), torch.bfloat16)
    assert largest(actual.double() - truth) <= allowed


@pytest.mark.parametrize(
    "module",
    [
        lambda: fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("MLP", inference_mode=True))),
        lambda: fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("LSTM", inference_mode=True))),
        lambda: fp.PromptEmbedding(
            fp.PromptTuningConfig(
                num_virtual_tokens=ROWS, token_dim=WIDTH, inference_mode=True, prompt_tuning_init="SAMPLE_VOCAB"
            ),
            nn.Embedding(5, WIDTH),
        ),
    ],
    ids=["MLP", "LSTM", "embedding"],
)
def test_a_module_in_inference_mode_holds_and_returns_the_table_alone(module: Any) -> None:
    built = module()
    assert list(built.state_dict()) == ["embedding.weight"]
    assert torch.equal(built.encode(), built.embedding.weight)
    assert torch.equal(built(INDICES["batch"]), built.embedding.weight.expand(3, -1, -1))


def test_a_module_for_an_encoder_decoder_has_rows_for_both_halves() -> None:
    fields = encoder_fields("MLP", task_type="SEQ_2_SEQ_LM", num_transformer_submodules=None)
    assert fp.PromptEncoder(fp.PromptEncoderConfig(**fields)).encode().shape == (2 * ROWS, WIDTH)
    fields["num_transformer_submodules"] = 1
    assert fp.PromptEncoder(fp.PromptEncoderConfig(**fields)).encode().shape == (ROWS, WIDTH)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize(("batch", "columns"), [(0, 3), (1, 0), (2, 0)])
def test_prompt_encoder_of_no_indices_gives_no_rows(encoder: str, batch: int, columns: int) -> None:
    module, _ = encoder_pair(encoder)
    assert module(torch.zeros(batch, columns, dtype=torch.int64)).shape == (batch, columns, WIDTH)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([[0, 1]], TypeError, r"indices: expected a tensor of shape \(B, P\), got list"),
        (torch.arange(3), ValueError, r"indices: expected shape \(B, P\), got \(3,\)"),
        (torch.zeros(1, 3), TypeError, r"indices: expected int64 or int32 ids, got torch.float32"),
        (torch.tensor([[ROWS]]), IndexError, "out of range"),
    ],
)
def test_prompt_encoder_refuses_wrong_indices(encoder: str, indices: Any, error: type[Exception], message: str) -> None:
    module, _ = encoder_pair(encoder)
    with pytest.raises(error, match=message):
        module(indices)


def test_an_lstm_without_its_compiled_kernels_warns_and_an_mlp_does_not(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(_native, "WHY_NOT_CPU", None)
    fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("LSTM")))
    monkeypatch.setattr(_native, "WHY_NOT_CPU", "needs the compiled extension")
    fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("MLP")))
    fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("LSTM", inference_mode=True)))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="LSTM runs without its compiled kernels: it needs the compiled extension"):
        fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("LSTM")))
