"""`apply` on PEFT models with prefixes: PEFT's results, its encoder run once, what is corrected, and what is said."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import fusedprompt
from mixtures import assert_close
from models import PAD, build, config_fields, pad, task_inputs, tokens
from test_prefix import CASES, ODD, step


def made(family: str, task: str, method: str, **options: Any) -> Any:
    kind, fields = config_fields(method, task)
    torch.manual_seed(7)
    return peft.get_peft_model(build(family, task, **options), getattr(peft, kind)(**fields)).eval()


@pytest.mark.parametrize(("family", "task", "method"), [case for case in CASES if case[0] not in ("OPT", "Qwen3")])
def test_a_patched_step_is_the_plain_one(family: str, task: str, method: str) -> None:
    plain, model = (made(family, task, method, **ODD.get(family, {})) for _ in range(2))
    fusedprompt.apply(model)
    ids, mask = pad(tokens(), 2 * (family == "Llama"), 0)
    for inputs in (task_inputs(task, tokens()), task_inputs(task, ids, mask)):
        assert_close(step(model, **inputs), step(plain, **inputs))
    assert "calls that went to PEFT" not in fusedprompt.integrations.peft.patch_of(model).report()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "T5"])
@pytest.mark.parametrize("inference", [False, True])
def test_patched_generate_is_the_plain_one(family: str, inference: bool) -> None:
    task = "SEQ_2_SEQ_LM" if family == "T5" else "CAUSAL_LM"
    plain, model = (made(family, task, "CARTRIDGE") for _ in range(2))
    for one in (plain, model):
        one.peft_config["default"].inference_mode = inference
    fusedprompt.apply(model)
    ids, mask = pad(tokens(), 3, 0)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": None}
    for given in (
        {"input_ids": tokens()},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "num_beams": 2},
    ):
        assert torch.equal(model.generate(**given, **options), plain.generate(**given, **options))


def test_layers_that_peft_ties_stay_tied() -> None:
    plain, model = (made("T5", "SEQ_2_SEQ_LM", "PREFIX", num_layers=4, num_decoder_layers=4) for _ in range(2))
    patch = fusedprompt.apply(model, fix=True)
    inputs = task_inputs("SEQ_2_SEQ_LM", tokens())
    assert_close(step(model, **inputs), step(plain, **inputs))
    remain = patch.report().split("PEFT's defects that remain:")[1]
    assert "a decoder of an even number of layers has the same prefix in layers l and l + half of them" in remain


def test_what_is_corrected_is_named_and_corrected() -> None:
    model = made("Llama", "CAUSAL_LM", "PREFIX")
    ids = tokens()
    (padded, mask), plain = pad(ids, 3, 0), model(input_ids=ids).logits
    shifted = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    assert not torch.allclose(shifted, plain, rtol=1e-2)
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **options)
    with fusedprompt.apply(model, fix=True) as patch:
        assert_close({"logits": model(input_ids=padded, attention_mask=mask).logits[:, 3:]}, {"logits": plain})
        assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), expected)
        said = patch.report()
        for line in (
            "padding between a prefix and its text is counted",
            "generate behind a prefix fails with use_cache",
        ):
            assert line in said.split("corrected:")[1].split("PEFT's defects that remain:")[0]
        assert "default, active: PREFIX_TUNING, 4 virtual tokens, head_loss: reference, route prefix" in said
    with fusedprompt.apply(model) as patch:
        found = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
        assert_close({"logits": found}, {"logits": shifted})
        assert "generate: PEFT's own, with a prefix that all rows share" in patch.report()
        assert "encoder of default: keys and values are the parameters" in patch.report()


def test_the_projection_runs_once_and_rows_of_several_prefixes_mix() -> None:
    model = made("Llama", "CAUSAL_LM", "PROJECTED")
    model.add_adapter("other", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    shapes: list[Any] = []
    model.prompt_encoder["default"].transform.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    ids = tokens()
    with fusedprompt.apply(model):
        first = model(input_ids=ids).logits
        model.generate(input_ids=ids, max_new_tokens=2)
        assert shapes == [(1, 4, 16)] * 2
        mixed = model(input_ids=ids, adapter_names=["default", "other", "default"]).logits
    assert_close({"logits": mixed[::2]}, {"logits": first[::2]})
    model.set_adapter("other")
    assert_close({"logits": mixed[1:2]}, {"logits": model(input_ids=ids[1:2]).logits})


def test_the_projection_runs_on_the_op_unless_something_must_see_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, given = made("Llama", "CAUSAL_LM", "PROJECTED"), tokens(), list[Any]()
    mlp = fusedprompt.ops.mlp
    monkeypatch.setattr(fusedprompt.ops, "mlp", lambda *args, **options: given.append(options) or mlp(*args, **options))
    expected = model(input_ids=ids).logits
    with fusedprompt.apply(model) as patch:
        assert_close({"logits": model(input_ids=ids).logits}, {"logits": expected})
        assert [options["activation"] for options in given] == ["tanh"]
        assert "default, active: PREFIX_TUNING, 4 virtual tokens, mlp: reference, " in patch.report()
        model.prompt_encoder["default"].transform[1] = torch.nn.GELU()
        assert "encoder of default: transform.1 is a GELU, not a Tanh" in patch.report()
        model(input_ids=ids)
    assert len(given) == 1


def test_checkpointing_and_splicing_are_refused_in_words() -> None:
    model = made("Llama", "CAUSAL_LM", "PREFIX").train()
    with pytest.raises(fusedprompt.RouteUnavailable, match="route 'splice' cannot run: adapter 'default' is keys"):
        fusedprompt.apply(model, route="splice")
    model.base_model.gradient_checkpointing_enable()
    with fusedprompt.apply(model), pytest.raises(ValueError, match="gradient checkpointing: expected it to be off"):
        model(input_ids=tokens())


def test_files_are_those_of_the_plain_model(tmp_path: Any) -> None:
    for method in ("PROJECTED", "CARTRIDGE"):
        model = made("Llama", "CAUSAL_LM", method)
        model.save_pretrained(tmp_path / "plain")
        with fusedprompt.apply(model, fix=True):
            model.save_pretrained(tmp_path / "patched")
        name = "adapter_model.safetensors"
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
