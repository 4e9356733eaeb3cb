"""Multitask prompt tuning: rows of a batch with tasks of their own, against PEFT and against each row alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import fusedprompt as fp
from mixtures import BASE, PADDED, ROUTES, assert_close, gradients, padded
from models import build, task_inputs, tokens
from tolerance import largest, one_thread  # noqa: F401

TASKS, RANKS, ROWS = 4, 2, 3
IDS = [2, 0, 2, 3, 0]  # not all tasks of the adapter, and not in order


def fields(task: str = "CAUSAL_LM", **changes: Any) -> dict[str, Any]:
    return {"task_type": task, "num_virtual_tokens": ROWS, "num_tasks": TASKS, "num_ranks": RANKS, **changes}


def draw(*models: Any, adapter: str = "default", seed: int = 5) -> None:
    """Matrices that are not small, and heads that are not the base model's: tasks differ visibly."""
    for model in models:
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            encoder = model.prompt_encoder[adapter]
            for matrices in (encoder.prefix_task_cols, encoder.prefix_task_rows):
                matrices.copy_(torch.randn(matrices.shape, generator=generator, device="cpu"))
            for name, parameter in model.named_parameters():
                if f".modules_to_save.{adapter}" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.3)


def multitask(family: str = "Llama", task: str = "CAUSAL_LM", **changes: Any) -> Any:
    torch.manual_seed(7)
    model = fp.get_prompt_model(build(family, task), fp.MultitaskPromptTuningConfig(**fields(task, **changes)))
    draw(model)
    return model.eval()


def pair(family: str, task: str, **changes: Any) -> tuple[Any, Any]:
    mine = multitask(family, task, **changes)
    torch.manual_seed(7)
    config = peft.MultitaskPromptTuningConfig(**fields(task, **changes))
    theirs = peft.get_peft_model(build(family, task), config).eval()
    draw(theirs)
    return theirs, mine


def step(model: Any, **given: Any) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every trained parameter."""
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    names = [name for name in ("logits", "start_logits", "end_logits") if name in output]
    return {"loss": output.loss.detach(), **{name: output[name].detach() for name in names}, **gradients(model)}


def formula(encoder: Any, task_id: int) -> Tensor:
    """The prompt of a task, in fp64."""
    table, cols, rows = (one.double() for one in (encoder.embedding.weight, *_matrices(encoder)))
    return table * torch.einsum("pr,rd->pd", cols[task_id], rows[task_id])


def _matrices(encoder: Any) -> tuple[Tensor, Tensor]:
    return encoder.prefix_task_cols, encoder.prefix_task_rows


# Rows


def test_prompts_and_gradients_equal_the_formula_in_fp64() -> None:
    encoder = multitask().prompt_encoder["default"].double()
    for task_ids in ((1,), (0, 1, 2), (3, 0), (2, 2, 1), (0, 3), (1, 3), (0, 1, 3)):
        rows = encoder(task_ids=task_ids)
        expected = torch.stack([formula(encoder, task_id) for task_id in task_ids])
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
        weights = torch.randn(rows.shape, dtype=torch.float64)
        found = torch.autograd.grad((rows * weights).sum(), [*encoder.parameters()])
        wanted = torch.autograd.grad((expected * weights).sum(), [*encoder.parameters()])
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_tasks_prompt_has_the_same_bits_whatever_else_is_in_the_batch() -> None:
    model = multitask()
    encoder = model.prompt_encoder["default"]
    for task_ids in ((0, 1, 2, 3), (0, 2), (3, 1), (0, 3), (0, 1, 3)):
        for rows, task_id in zip(encoder(task_ids=task_ids), task_ids):
            assert torch.equal(rows, model.prompt_rows(task_id=task_id))
            assert largest(rows) > 0.1
    assert torch.equal(encoder(), encoder.embedding.weight)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ids", [IDS, [1] * 5])
def test_language_model_steps_equal_those_of_peft(ids: list[int], route: str) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM")
    given = {"input_ids": tokens(5, 6), "labels": tokens(5, 6), "attention_mask": torch.ones(5, 6, dtype=torch.int64)}
    expected = step(theirs, **given, task_ids=torch.tensor(ids))
    found = step(mine, **given, task_ids=ids, route=route)
    assert_close(found, expected)
    assert found["prompt_encoder.default.prefix_task_rows"][1].any() == (1 in ids)


@pytest.mark.parametrize(("family", "task"), [("Bert", "SEQ_CLS"), ("Llama", "SEQ_CLS")])
def test_classified_rows_equal_those_of_peft(family: str, task: str) -> None:
    theirs, mine = pair(family, task)
    given = task_inputs(task, tokens(5, 6))
    expected = step(theirs, **given, task_ids=torch.tensor(IDS))
    assert_close(step(mine, **given, task_ids=torch.tensor(IDS)), expected, 1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("padding", PADDED)
def test_each_row_is_as_if_alone(padding: str, route: str) -> None:
    model, (ids, mask) = multitask(), padded(*PADDED[padding])
    labels = ids.masked_fill(mask == 0, -100)
    mask_given = {} if bool(mask.all()) else {"attention_mask": mask}
    options = {"route": route, "logits": "text"}
    found = step(model, input_ids=ids, labels=labels, task_ids=torch.tensor(IDS), **mask_given, **options)
    logits = found.pop("logits")
    model.zero_grad()
    losses, count = [], 0
    for row, task_id in enumerate(IDS):
        text = ids[row : row + 1, mask[row] != 0]
        own = model(input_ids=text, labels=text, task_ids=[task_id], route="splice", logits="text")
        assert_close({"logits": logits[row][mask[row] != 0]}, {"logits": own.logits[0].detach()})
        losses.append(own.loss * text.shape[1])
        count += text.shape[1]
    loss = torch.stack(losses).sum() / count
    loss.backward()
    assert_close(found, {"loss": loss.detach(), **gradients(model)})


@pytest.mark.parametrize(
    ("family", "task", "output"),
    [
        ("Bert", "TOKEN_CLS", "logits"),
        ("GPT2", "TOKEN_CLS", "logits"),
        ("Bert", "QUESTION_ANS", "start_logits"),
        ("Llama", "QUESTION_ANS", "start_logits"),
        ("Bert", "FEATURE_EXTRACTION", "last_hidden_state"),
        ("Llama", "FEATURE_EXTRACTION", "last_hidden_state"),
    ],
)
def test_every_task_type_serves_rows_of_several_tasks_as_if_alone(family: str, task: str, output: str) -> None:
    """PEFT's question answering and feature extraction raise: they never hand task_ids on."""
    model, (ids, mask) = multitask(family, task), padded(*PADDED["right"])
    given = task_inputs(task, ids, mask)
    found = model(**given, task_ids=IDS)
    if task != "FEATURE_EXTRACTION":
        found.loss.backward()
        assert all(parameter.grad.any() for parameter in model.prompt_encoder.parameters())
    for row, task_id in enumerate(IDS):
        length = int(mask[row].sum())
        own = model(input_ids=ids[row : row + 1, :length], task_ids=[task_id])[output][0]
        other = model(input_ids=ids[row : row + 1, :length], task_ids=[1])[output][0]
        first = found[output].shape[1] - ids.shape[1]
        torch.testing.assert_close(found[output][row, first:][:length], own[first:], rtol=1e-4, atol=1e-4)
        assert largest(own - other) > 1e-2


def test_rows_of_two_multitask_adapters_of_other_methods_and_of_none_are_as_if_alone() -> None:
    model = multitask()
    model.add_adapter("more", fp.MultitaskPromptTuningConfig(**fields(num_virtual_tokens=5, num_tasks=2)))
    draw(model, adapter="more", seed=9)
    model.add_adapter("plain", fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    names, ids = ["more", "default", BASE, "plain", "more", "default"], [1, 3, None, None, 0, 3]
    batch = tokens(6, 5)
    for route in ROUTES:
        given = torch.tensor([-1 if one is None else one for one in ids]) if route == "splice" else ids
        found = model(input_ids=batch, adapter_names=names, task_ids=given, route=route, logits="text").logits
        for row, (name, task_id) in enumerate(zip(names, ids)):
            only = {"adapter_names": [name], "task_ids": None if task_id is None else [task_id], "logits": "text"}
            own = model(input_ids=batch[row : row + 1], route="splice", **only).logits[0]
            torch.testing.assert_close(found[row], own, rtol=1e-4, atol=1e-4)


def test_each_distinct_task_is_made_once_and_no_batch_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = multitask(), list[tuple[int, ...]]()
    encoder = model.prompt_encoder["default"]
    encoder.register_forward_hook(lambda module, args, kwargs, out: made.append(tuple(out.shape)), with_kwargs=True)
    for route in ROUTES:
        made.clear()
        model(input_ids=tokens(5, 6), task_ids=IDS, route=route)
        assert made == [(3, ROWS, 32)]
        model(input_ids=tokens(5, 6), task_ids=[1] * 5, route=route)
        assert made[1:] == [(1, ROWS, 32)]


# Kept prompts, templates, slots


def test_prompts_are_kept_per_task() -> None:
    model, passes = multitask(), list[tuple[int, ...]]()

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is None:
            passes.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    model.base_model.model.register_forward_pre_hook(hook, with_kwargs=True)
    batch = tokens(5, 6)

    def prompt_passes(ids: list[int]) -> int:
        passes.clear()
        with torch.no_grad():
            found = model(input_ids=batch, task_ids=ids, route="shared").logits
            count = len(passes)
            torch.testing.assert_close(found, model(input_ids=batch, task_ids=ids, route="splice").logits)
        return count

    assert prompt_passes(IDS) == 3 and len(model.prompt_cache) == 3
    assert prompt_passes(IDS) == 0 and prompt_passes([0] * 5) == 0
    assert prompt_passes([1] * 5) == 1 and len(model.prompt_cache) == 4
    with torch.no_grad():
        model.prompt_encoder["default"].prefix_task_cols.mul_(2)
    assert prompt_passes(IDS) == 3
    model.prompt_cache.clear("default")
    assert len(model.prompt_cache) == 0


def test_templates_and_slots_hold_each_rows_own_task() -> None:
    torch.manual_seed(7)
    config = fp.MultitaskPromptTuningConfig(**fields())
    model = fp.get_prompt_model(build("Llama"), config, template="[prompt 1] [text] [anchor 7 8] [prompt 2]").eval()
    draw(model)
    batch = tokens(5, 4)
    found = model(input_ids=batch, task_ids=IDS).logits
    for row, task_id in enumerate(IDS):
        own = model(input_ids=batch[row : row + 1], task_ids=[task_id]).logits[0]
        torch.testing.assert_close(found[row], own, rtol=1e-4, atol=1e-4)
    plain = multitask()
    slots = torch.tensor([[0, ~0, ~1, 1, 2, ~2, 3]]).expand(5, -1)
    found = plain(input_ids=batch, slots=slots, task_ids=IDS).logits
    for row, task_id in enumerate(IDS):
        own = plain(input_ids=batch[row : row + 1], slots=slots[:1], task_ids=[task_id]).logits[0]
        torch.testing.assert_close(found[row], own, rtol=1e-4, atol=1e-4)
        assert largest(own - plain(input_ids=batch[row : row + 1], slots=slots[:1], task_ids=[1]).logits[0]) > 1e-2


def test_packed_examples_stand_behind_the_prompts_of_their_own_tasks() -> None:
    model = multitask()
    texts, tasks = [tokens(1, length, seed=length)[0] for length in (4, 2, 3, 5)], [2, 0, 2, 3]
    examples = [{"input_ids": text, "task_id": task} for text, task in zip(texts, tasks)]
    packed = fp.pack(model, examples, max_length=16)
    assert packed["task_ids"] == [2, 0, 3] and packed["adapter_names"] == ["default"] * 3
    named = fp.pack(model, [{"input_ids": text} for text in texts], max_length=16, task_ids=tasks)
    assert torch.equal(named["slots"], packed["slots"]) and named["task_ids"] == packed["task_ids"]
    found = step(model, **packed)
    model.zero_grad()
    losses = []
    for text, task in zip(texts, tasks):
        own = model(input_ids=text[None], labels=text[None], task_ids=[task], route="splice")
        losses.append(own.loss * len(text))
    loss = torch.stack(losses).sum() / sum(map(len, texts))
    loss.backward()
    found.pop("logits")
    assert_close(found, {"loss": loss.detach(), **gradients(model)})


# Generating


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("route", ROUTES)
def test_rows_are_continued_as_if_alone(route: str, beams: int) -> None:
    model, (ids, mask) = multitask(), padded(*PADDED["left"])
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(input_ids=ids, attention_mask=mask, task_ids=torch.tensor(IDS), route=route, **options)
    for row, task_id in enumerate(IDS):
        own = model.generate(input_ids=ids[row : row + 1, mask[row] != 0], task_ids=[task_id], **options)
        assert together[row, -5:].tolist() == own[0, -5:].tolist()
    ids = tokens(5, 4)
    found = {tuple(model.generate(input_ids=ids, task_ids=[t] * 5, **options)[:, 4:].flatten()) for t in range(TASKS)}
    assert len(found) > 1  # tasks matter


def test_generated_tokens_are_those_of_peft() -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for ids in (IDS, [1] * 5):
        given = {"input_ids": tokens(5, 6), "task_ids": torch.tensor(ids), **options}
        assert torch.equal(mine.generate(**given), theirs.generate(**given))


# Arguments


def test_wrong_tasks_are_refused_by_name() -> None:
    model, ids = multitask(), tokens(3, 4)
    own = r"a task of the adapter 'default' \(MULTITASK_PROMPT_TUNING\)"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=rf"task_ids: expected one in \[0, 4\) for row 0, {own}, got None"):
            call(input_ids=ids)
        with pytest.raises(ValueError, match=rf"task_ids: expected one in \[0, 4\) for row 1, {own}, got 4"):
            call(input_ids=ids, task_ids=torch.tensor([0, 4, 1]))
        with pytest.raises(ValueError, match=rf"expected one in \[0, 4\) for row 2, {own}, got -1"):
            call(input_ids=ids, task_ids=[0, 0, -1])
        with pytest.raises(ValueError, match="task_ids: expected B = 3 ids, one per row, got 2"):
            call(input_ids=ids, task_ids=[0, 1])
        with pytest.raises(TypeError, match=r"task_ids: expected a tensor or list of one int per row, got \[0.5"):
            call(input_ids=ids, task_ids=[0.5, 1, 1])
        with pytest.raises(TypeError, match="task_ids: expected a tensor or list of one int per row, got 1"):
            call(input_ids=ids, task_ids=1)
    with pytest.raises(ValueError, match=r"task_ids: expected None with assisted decoding"):
        model.generate(input_ids=ids, task_ids=[0, 1, 1], prompt_lookup_num_tokens=2)
    cache = model(input_ids=ids, task_ids=[0, 1, 1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="task_ids: expected None for tokens that follow a cache"):
        model(input_ids=ids, past_key_values=cache, task_ids=[0, 1, 1])
    assert model(input_ids=ids[:, :1], past_key_values=cache).logits.shape[:2] == (3, 1)
    with model.disable_adapter(), pytest.raises(ValueError, match="task_ids: expected None where adapters are disab"):
        model(input_ids=ids, task_ids=[0, 0, 0])
    with pytest.raises(ValueError, match=r"task_ids: expected one in \[0, 4\) for row 0"):
        model.prompt_rows()
    with pytest.raises(ValueError, match=rf"task_ids: expected one in \[0, 4\) for row 0, {own}, got None"):
        model(**fp.pack(model, [{"input_ids": [3, 4]}]))
    with pytest.raises(ValueError, match="task_ids: expected 1 ids, one per example, got 2"):
        fp.pack(model, [{"input_ids": [3, 4]}], task_ids=[0, 1])
    plain = fp.get_prompt_model(build("Llama"), fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(
        ValueError, match="expected None for row 0, whose PROMPT_TUNING is the same for all tasks, got 0"
    ):
        plain(input_ids=ids, task_ids=[0, 0, 0])
    with pytest.raises(ValueError, match="task_ids: expected None for row 1, which has no prompt, got 2"):
        model(input_ids=ids, adapter_names=["default", BASE, BASE], task_ids=[0, 2, None])


def test_explain_names_tasks() -> None:
    model, ids = multitask(), tokens(5, 4)
    assert model.explain().startswith(
        "default, active: MULTITASK_PROMPT_TUNING, 3 virtual tokens for each of 4 tasks, route shared where it pays"
    )
    assert model.explain(input_ids=ids, task_ids=IDS).splitlines()[1:] == [
        "default, task 2, 2 rows, row 0: Q Q Q t t t t",
        "default, task 0, 2 rows, row 1: P P P t t t t",
        "default, task 3, 1 row, row 3: R R R t t t t",
    ]
    assert model.explain(input_ids=ids, task_ids=[1] * 5).splitlines()[1] == "default, task 1, row 0: P P P t t t t"
    said = model.explain("generate", input_ids=ids, task_ids=IDS).splitlines()
    assert said[0] == "route shared" and said[1].startswith("default, task 2, 2 rows, row 0: Q Q Q t t t t")


def test_training_learns_each_task_and_copies_keep_it() -> None:
    model = multitask()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = ("embedding.weight", "prefix_task_cols", "prefix_task_rows")
    assert trained == {f"prompt_encoder.default.{name}" for name in names}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids, losses = tokens(2, 5), []
    for _ in range(8):
        optimizer.zero_grad()
        output = model(input_ids=ids, labels=ids, task_ids=[0, 3])
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    found = model(input_ids=ids, task_ids=[0, 3]).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=ids, task_ids=[0, 3]).logits, found)
    own = cross_entropy(model(input_ids=ids[:1], task_ids=[0], logits="text").logits[0, :-1], ids[0, 1:])
    other = cross_entropy(model(input_ids=ids[:1], task_ids=[1], logits="text").logits[0, :-1], ids[0, 1:])
    assert own < other


# Encoder-decoders


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_encoder_decoder_steps_equal_those_of_peft_with_a_table_for_the_encoder_alone(family: str) -> None:
    theirs, mine = pair(family, "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    given = task_inputs("SEQ_2_SEQ_LM", tokens(5, 6))
    expected = step(theirs, **given, task_ids=torch.tensor(IDS))
    assert_close(step(mine, **given, task_ids=IDS), expected, 1e-4)
    # PEFT drops decoder_input_ids, or fails for them without labels.
    ids = tokens(5, 4, seed=3)
    found = mine(input_ids=given["input_ids"], decoder_input_ids=ids, task_ids=IDS).logits
    for row, task_id in enumerate(IDS):
        own = {"input_ids": given["input_ids"][row : row + 1], "decoder_input_ids": ids[row : row + 1]}
        assert_close({"logits": found[row]}, {"logits": mine(**own, task_ids=[task_id]).logits[0]}, 1e-4)


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_what_is_trained_with_a_table_for_both_stacks_is_what_generates(family: str) -> None:
    """PEFT trains with the second half in front of the decoder's tokens, and generates without it."""
    theirs, mine = pair(family, "SEQ_2_SEQ_LM")
    given = task_inputs("SEQ_2_SEQ_LM", tokens(5, 6))
    options = {"max_new_tokens": 4, "do_sample": False}
    made = mine.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], task_ids=IDS, **options)
    ids = torch.tensor(IDS)
    peft_made = theirs.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], task_ids=ids, **options
    )
    assert torch.equal(made, peft_made)
    scored = mine(input_ids=given["input_ids"], decoder_input_ids=made[:, :-1], task_ids=IDS).logits
    assert torch.equal(scored[:, 0].argmax(-1), made[:, 1])
    assert mine(**given, task_ids=IDS).logits.shape == (*given["labels"].shape, scored.shape[-1])


def test_fields_of_a_template_take_one_task_for_all_rows() -> None:
    torch.manual_seed(7)
    config, template = fp.MultitaskPromptTuningConfig(**fields()), "[prompt 1] [a] [prompt 2] [b]"
    model = fp.get_prompt_model(build("Llama"), config, template=template).eval()
    draw(model)
    given = {"a": tokens(2, 3), "b": (tokens(2, 2), torch.ones(2, 2, dtype=torch.int64))}
    logits = [model(fields=given, task_ids=[task_id] * 2).logits for task_id in (0, 3)]
    assert largest(logits[0] - logits[1]) > 1e-2
    with pytest.raises(ValueError, match="task_ids: expected B = 2 ids, one per row, got 1"):
        model(fields=given, task_ids=[0])
    with pytest.raises(ValueError, match="fields: expected None with rows of several adapters or tasks"):
        model(fields=given, task_ids=[0, 3])


def test_trainer_hands_on_a_column_of_tasks(tmp_path: Path) -> None:
    model, seen = multitask(), list[Any]()
    encoder = model.prompt_encoder["default"]
    encoder.register_forward_pre_hook(lambda _, args, given: seen.append([*given["task_ids"]]), with_kwargs=True)
    ids = tokens(4, 6)
    rows = [{"input_ids": one, "labels": one, "task_ids": task, "other": 1} for one, task in zip(ids, [3, 0, 3, 1])]
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), save_strategy="no", **options)
    before = {name: one.detach().clone() for name, one in encoder.named_parameters()}
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert seen and all(tasks == [0, 1, 3] for tasks in seen)
    changed = (encoder.prefix_task_rows != before["prefix_task_rows"]).flatten(1).any(1)
    assert changed.tolist() == [True, True, False, True]


@pytest.mark.parametrize("ids", [IDS, [1] * 5])
def test_it_is_compiled_without_a_break(ids: list[int]) -> None:
    model = multitask()
    model.base_model.requires_grad_(False)
    given = {"input_ids": tokens(5, 6), "labels": tokens(5, 6), "task_ids": ids, "route": "splice"}
    expected = step(model, **given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(**given)
    output.loss.backward()
    assert_close(
        {"loss": output.loss.detach(), **gradients(model)}, {k: expected[k] for k in expected if k != "logits"}
    )
