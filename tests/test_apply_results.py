"""A patched PEFT model against the same model unpatched: outputs, gradients, text and files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedprompt
from fusedprompt.integrations.peft import patch_of
from models import WIDTH, build, config_fields, pad, task_inputs, tokens
from tolerance import one_thread  # noqa: F401

METHODS = ("PROMPT", "MLP", "LSTM", "CPT")
CASES = [
    *[(family, "CAUSAL_LM", method) for family in ("Llama", "GPT2", "OPT", "Gemma") for method in METHODS],
    *[
        (family, task, method)
        for family, task in (
            ("Bert", "SEQ_CLS"),
            ("GPT2", "SEQ_CLS"),
            ("Llama", "SEQ_CLS"),
            ("Roberta", "TOKEN_CLS"),
            ("Bert", "QUESTION_ANS"),
            ("Bert", "FEATURE_EXTRACTION"),
            ("T5", "SEQ_2_SEQ_LM"),
            ("Bart", "SEQ_2_SEQ_LM"),
        )
        for method in METHODS[:3]
    ],
]


def peft_model(family: str, task: str = "CAUSAL_LM", method: str = "PROMPT", **overrides: Any) -> Any:
    """PEFT's model with visible prompts, in eval mode."""
    import peft

    name, fields = config_fields(method, task)
    base = build(family, task, **overrides)
    torch.manual_seed(7)
    model = peft.get_peft_model(base, getattr(peft, name)(**fields))
    if method == "CPT":  # a zero change would hide the projection
        with torch.no_grad():
            model.prompt_encoder["default"].delta_embedding.weight.copy_(torch.randn(8, WIDTH) * 0.02)
    return model.eval()


def inputs_of(task: str, side: str = "none") -> dict[str, torch.Tensor]:
    ids, mask = tokens(), None
    if side != "none":
        ids, mask = pad(ids, 2 * (side == "left"), 2 * (side == "right"))
        mask[0] = 1
    inputs = task_inputs(task, ids, mask)
    if task == "TOKEN_CLS":
        del inputs["labels"]  # PEFT cannot take them
    return inputs


def run(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that a caller can see of a step: output tensors, and every gradient of the loss and of the outputs."""
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**given)
    seen = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    parts = [value for name, value in seen.items() if name != "loss" and value.requires_grad]
    sums = {"outputs": sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in parts)}
    if "loss" in seen:
        sums["loss"] = seen["loss"]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = {}
    for name, total in sums.items():
        found = torch.autograd.grad(total, list(trained.values()), retain_graph=True, allow_unused=True)
        gradients.update({f"d {name} / d {key}": value for key, value in zip(trained, found) if value is not None})
    return {**{name: value.detach() for name, value in seen.items()}, **gradients}


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], exact: bool = False, shared: bool = False
) -> None:
    """Names, shapes and dtypes are the same; values are equal, or equal but for rounding.

    transformers computes losses, norms and rotary embeddings in fp32, whatever the model's dtype: losses'
    gradients are rounded there, and on the shared route the rest, because sums are taken in another order.
    """
    assert list(actual) == list(expected)
    for name, value in expected.items():
        found = actual[name]
        assert (found.shape, found.dtype) == (value.shape, value.dtype), name
        rounding = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 0.0}[value.dtype]
        rounding = 1e-4 if name.startswith("d loss") else 1e-5 if shared else rounding
        limit = 0.0 if exact else rounding * float(value.double().abs().max()) + 1e-14
        torch.testing.assert_close(found, value, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("family", "task", "method", "route"),
    [
        (*case, route)
        for case in CASES
        for route in ("splice", "auto")
        if route == "splice" or case[0] in ("Llama", "GPT2")  # elsewhere auto differs in nothing
    ],
)
def test_outputs_and_gradients_equal_peft(family: str, task: str, method: str, side: str, route: str) -> None:
    model, inputs = peft_model(family, task, method).double(), inputs_of(task, side)
    if route == "auto":  # large enough for sharing to pay
        inputs = {name: torch.cat([value] * 16) for name, value in inputs.items()}
    expected = run(model, inputs)
    with fusedprompt.apply(model, route=route) as patch:
        actual = run(model, inputs)
        assert not patch.refused
    assert_same(actual, expected, shared=route == "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        *[("Llama", "CAUSAL_LM", method) for method in ("PROMPT", "MLP", "CPT")],
        *[(*model, method) for model in (("Bert", "SEQ_CLS"), ("T5", "SEQ_2_SEQ_LM")) for method in ("PROMPT", "MLP")],
    ],
)
def test_splice_does_the_same_arithmetic_as_peft_bit_by_bit(
    family: str, task: str, method: str, dtype: torch.dtype
) -> None:
    model, inputs = peft_model(family, task, method), inputs_of(task, "left")
    model.base_model.to(dtype)
    expected = run(model, inputs)
    with fusedprompt.apply(model, route="splice"):
        actual = run(model, inputs)
    if method == "CPT":  # the loss in fp32, and the projection in another order
        for name in [name for name in expected if "loss" in name]:
            limit = 1e-5 if dtype is torch.float32 else 0.05
            torch.testing.assert_close(actual.pop(name).float(), expected.pop(name).float(), rtol=limit, atol=limit)
        return assert_same(actual, expected)
    return assert_same(actual, expected, exact=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["inputs_embeds", "no mask", "no labels", "hidden states", "tuple", "positions"])
def test_every_kind_of_call_gives_what_peft_gives(kind: str, method: str) -> None:
    model, inputs = peft_model("Llama", method=method).double(), inputs_of("CAUSAL_LM")
    given: dict[str, Any] = dict(inputs)
    if kind == "inputs_embeds":
        given["inputs_embeds"] = model.word_embeddings(given.pop("input_ids")).detach()
    elif kind == "no mask":
        del given["attention_mask"]
    elif kind == "hidden states":
        given |= {"output_hidden_states": True, "output_attentions": True}
    elif kind == "positions":
        given["position_ids"] = torch.arange(7).expand(3, -1)
    if kind in ("no labels", "tuple"):
        del given["labels"]
    if kind == "tuple":
        given["return_dict"] = False
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(**given)
        with fusedprompt.apply(model):
            actual = model(**given)
            by_position = model(given.pop("input_ids", None), **given) if "input_ids" in given else actual
    assert isinstance(actual, type(expected))
    if kind == "tuple":
        torch.testing.assert_close(actual[0], expected[0])
        return
    assert list(actual) == list(expected) == list(by_position)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(by_position.logits, expected.logits)
    if kind == "hidden states":
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states)
        torch.testing.assert_close(actual.attentions, expected.attentions)


def test_token_types_are_extended_as_peft_does() -> None:
    model, inputs = peft_model("Bert", "SEQ_CLS", "MLP").double(), inputs_of("SEQ_CLS")
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    expected = run(model, inputs)
    with fusedprompt.apply(model):
        actual = run(model, inputs)
    assert_same(actual, expected)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    assert not torch.equal(run(model, inputs)["logits"], expected["logits"])


@pytest.mark.parametrize("loss", ["none", "decay"])
def test_loss_and_mask_of_cpt_equal_peft(loss: str) -> None:
    model, inputs = peft_model("Llama", method="CPT").double(), inputs_of("CAUSAL_LM")
    config = model.peft_config["default"]
    config.opt_weighted_loss_type, config.opt_loss_decay_factor = loss, 0.5
    kinds = torch.tensor([[1, 2, 3, 4, 1, 2, 4], [4] * 7, [0, 0, 4, 4, 8, 8, 8]])
    masks = [kinds.clone(), kinds.clone()]
    expected = [model(**inputs, input_type_mask=masks[0]).loss for _ in range(2)]
    with fusedprompt.apply(model):
        actual = [model(**inputs, input_type_mask=masks[1]).loss for _ in range(2)]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, check_dtype=False)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], kinds)


def test_cpt_without_a_label_gives_nan_as_in_peft() -> None:
    model, inputs = peft_model("Llama", method="CPT"), inputs_of("CAUSAL_LM")
    model.peft_config["default"].cpt_tokens_type_mask = [1] * 8
    with fusedprompt.apply(model):
        assert model(**inputs).loss.isnan()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2, "output_logits": True},
    "without a cache": {"use_cache": False},
    "hidden states": {"output_hidden_states": True},
}


def generated(model: Any, side: str = "left", **options: Any) -> Any:
    ids, mask = pad(tokens(), 2 * (side == "left"), 0)
    mask[1] = 1
    given = {"max_new_tokens": 6, "pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True, **options}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(input_ids=ids, attention_mask=mask, **given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *[("Llama", method) for method in METHODS],
        *[(family, method) for family in ("GPT2", "OPT", "T5") for method in ("PROMPT", "MLP")],
    ],
)
def test_generated_tokens_and_scores_equal_peft(family: str, way: str, method: str) -> None:
    model = peft_model(family, "SEQ_2_SEQ_LM" if family == "T5" else "CAUSAL_LM", method)
    if family == "T5" and way == "hidden states":
        return
    expected, prefills = generated(model, **WAYS[way]), []

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given.get("inputs_embeds") is not None:
            prefills.append(tuple(given["inputs_embeds"].shape[:2]))

    with fusedprompt.apply(model) as patch:
        actual = generated(model, **WAYS[way])
        model.base_model.register_forward_pre_hook(look, with_kwargs=True)
        generated(model, **WAYS[way])
        alone = sorted(patch.generated_alone)
    assert type(actual) is type(expected) and list(actual) == list(expected)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-4)
    if way == "hidden states":
        assert [state.shape for state in actual.hidden_states[0]] == [
            state.shape for state in expected.hidden_states[0]
        ]
    if family == "T5":
        return
    copies = {"beams": 3, "several": 2}.get(way, 1)
    shared = way in ("greedy", "sampling", "beams", "several")
    rows = 8 if method == "CPT" else 4
    # The prompt was kept by the first call: the text alone is prefilled.
    assert prefills[0] == (3 * copies, 9 if shared else 9 + rows)
    assert [text.split()[0] for text in alone] == (
        [] if shared else ["output_hidden_states" if "hid" in way else "the"]
    )
    assert torch.equal(generated(model, **WAYS[way]).sequences, expected.sequences)


def test_generate_runs_without_a_shared_prompt_where_that_is_not_exact() -> None:
    model = peft_model("Llama", method="MLP")
    model.base_model.to(torch.bfloat16)
    expected = generated(model)
    with fusedprompt.apply(model) as patch:
        assert torch.equal(generated(model).scores[0], expected.scores[0])
        assert "generate: PEFT's own, the prompt in each row (in torch.bfloat16 rounding may" in patch.report()
    with fusedprompt.apply(model, route="shared") as patch:
        assert "generate: PEFT's own, behind a prompt that is computed once and kept" in patch.report()
        torch.testing.assert_close(generated(model).scores[0], expected.scores[0], rtol=0.05, atol=0.3)
        with pytest.raises(fusedprompt.BackendUnavailable, match="output_hidden_states concerns the virtual tokens"):
            generated(model, output_hidden_states=True)


def test_a_kept_prompt_follows_changes_of_the_adapter_and_the_base_model() -> None:
    model = peft_model("Llama", method="MLP")
    with fusedprompt.apply(model) as patch:
        for change in (
            lambda: None,
            lambda: model.prompt_encoder["default"].mlp_head[4].bias.data.add_(1.0),
            lambda: setattr(model.peft_config["default"], "inference_mode", True),
            lambda: model.base_model.get_submodule("model.norm").weight.data.mul_(2),
        ):
            change()
            actual = generated(model, "none")
            plain = copy.deepcopy(model)
            patch_of(plain).revert()
            expected = generated(plain, "none")
            torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-4)
            assert not patch.generated_alone


@pytest.mark.parametrize("method", METHODS)
def test_training_follows_peft_and_saves_the_same_files(method: str, tmp_path: Path) -> None:
    import peft
    from safetensors.torch import load_file

    inputs, losses = inputs_of("CAUSAL_LM"), {}
    for name in ("theirs", "ours"):
        model = peft_model("Llama", method=method).train()
        before = list(model.state_dict())
        if name == "ours":
            fusedprompt.apply(model, route="splice")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[name] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        assert list(model.state_dict()) == before
        model.save_pretrained(tmp_path / name)
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    files = {name: tmp_path / name / "adapter_model.safetensors" for name in losses}
    theirs, ours = (load_file(file) for file in files.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if method in ("PROMPT", "MLP"):  # PEFT's own arithmetic, so the bytes are PEFT's too
        assert files["ours"].read_bytes() == files["theirs"].read_bytes()
    configs = [(tmp_path / name / "adapter_config.json").read_bytes() for name in losses]
    assert configs[0] == configs[1]

    trained = model.get_prompt(1)  # what the model was trained with, gradients and all
    with torch.no_grad():
        assert torch.equal(model.get_prompt(1), trained)
    reloaded = peft.PeftModel.from_pretrained(build("Llama"), tmp_path / "ours")
    assert torch.equal(reloaded.get_prompt(1), trained)
    with fusedprompt.apply(reloaded):
        assert torch.equal(reloaded.get_prompt(1), trained)
        torch.testing.assert_close(reloaded(**inputs).loss, model.eval()(**inputs).loss, rtol=1e-5, atol=0)


def test_a_context_whose_codes_leave_no_label_is_nan_as_in_peft_and_with_fix_named_and_trained() -> None:
    import peft

    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7])  # its codes are 1 by default
    model = peft.get_peft_model(build("Llama"), config)
    ids, what = tokens(), "CPT's loss is no number where the context's largest type code is no multiple of 4"
    assert model(input_ids=ids, labels=ids).loss.isnan()
    with fusedprompt.apply(model) as patch:
        assert model(input_ids=ids, labels=ids).loss.isnan()
        assert what in patch.report().split("PEFT's defects that remain:")[1]
    with fusedprompt.apply(model, fix=True) as patch:
        output = model(input_ids=ids, labels=ids)
        right = torch.nn.functional.cross_entropy(output.logits[:, 2:-1].flatten(0, 1), ids.flatten())
        torch.testing.assert_close(output.loss, right)
        corrected, remain = patch.report().split("PEFT's defects that remain:")
        assert what in corrected.split("corrected:")[1] and "CPT's cpt_mask is not read" in remain
