"""Prefixes of keys and values in forward and training: PEFT, rows alone, and text in context as oracles."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedprompt
from fusedprompt.routes.prefix import layer_order, prefix_states
from mixtures import BASE, assert_close, gradients
from models import build, config_fields, ours, pad, pair, task_inputs, tokens

METHODS = ("PREFIX", "PROJECTED", "CARTRIDGE")
TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
CASES = [
    *((family, "CAUSAL_LM", "PREFIX") for family in ("GPT2", "Mistral", "Gemma2", "OPT", "Bloom", "GPTNeoX", "Qwen3")),
    *(("Llama", "CAUSAL_LM", method) for method in METHODS),
    *(("Llama", task, "PREFIX") for task in TASKS),
    *(("Bert", task, "CARTRIDGE") for task in TASKS),
    ("Roberta", "SEQ_CLS", "PROJECTED"),
    ("T5", "SEQ_2_SEQ_LM", "PROJECTED"),
    ("Bart", "SEQ_2_SEQ_LM", "PREFIX"),
]
ODD: dict[str, dict[str, Any]] = {
    "T5": {"num_layers": 3, "num_decoder_layers": 3},
    "Bart": {"encoder_layers": 3, "decoder_layers": 3},
}


def step(model: Any, **inputs: Any) -> dict[str, Tensor]:
    """Loss, outputs per token or row, and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    found = {name: output[name].detach() for name in names if name in output}
    loss = output.loss if output.get("loss") is not None else output.last_hidden_state.square().mean()
    loss.backward()
    return {**found, "loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_a_training_step_is_that_of_peft(family: str, task: str, method: str) -> None:
    theirs, mine = pair(family, task, method, **ODD.get(family, {}))
    inputs = task_inputs(task, tokens())
    found, expected = step(mine, **inputs), step(theirs, **inputs)
    assert any("prompt_encoder" in name and value.any() for name, value in found.items())
    assert_close(found, expected)
    del inputs["attention_mask"]
    assert_close(step(mine, **inputs), step(theirs, **inputs))
    assert {n: p.requires_grad for n, p in mine.prompt_encoder.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.prompt_encoder.named_parameters()
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "CAUSAL_LM") for family in ("Llama", "GPT2", "Gemma2", "OPT", "Bloom")),
        *(("Llama", task) for task in TASKS),
        *(("Bert", task) for task in TASKS),
        ("Roberta", "SEQ_CLS"),
    ],
)
def test_a_padded_row_is_the_row_alone(family: str, task: str, side: str) -> None:
    model = ours(family, task, "PREFIX").double()
    ids = tokens(2)
    (padded, mask), given = pad(ids, 3 * (side == "left"), 3 * (side == "right")), task_inputs(task, ids)
    where, batch = mask != 0, {**given, "input_ids": padded, "attention_mask": mask}
    if task in ("CAUSAL_LM", "TOKEN_CLS"):
        # Labels of padding would count; but the first token's own is given, and nothing predicts it.
        batch["labels"] = torch.full_like(padded, -100).masked_scatter(where, given["labels"])
    for name in ("start_positions", "end_positions"):
        if name in given:
            batch[name] = given[name] + 3 * (side == "left")
    found, expected = step(model, **batch), step(model, **given)
    for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if name in found and found[name].shape[:2] == padded.shape:
            found[name] = found[name][where].view(2, 7, *found[name].shape[2:])
    if task in ("FEATURE_EXTRACTION", "QUESTION_ANS"):  # their losses count padding
        found, expected = (
            {n: v for n, v in one.items() if n.endswith(("logits", "state"))} for one in (found, expected)
        )
    assert_close(found, expected, 1e-6)  # losses are summed in fp32


@torch.no_grad()
def in_context(base: Any, text: Tensor, more: Tensor) -> tuple[Any, Tensor]:
    """A text's own keys and values (N, 2 L D), and what a base model says of more text behind it."""
    cache = base(input_ids=text, use_cache=True).past_key_values
    parts = [part[0].transpose(0, 1) for layer in cache.layers for part in (layer.keys, layer.values)]
    size = more.shape[0]
    both = base(input_ids=torch.cat((text.expand(size, -1), more), 1))
    return torch.stack(parts, 1).flatten(1), both.logits[:, text.shape[1] :]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in ("Llama", "GPT2", "Gemma", "Qwen3", "OPT", "Bloom", "Phi")),
        ("Mistral", {"sliding_window": 8}),  # shorter than prefix and text together
        ("Gemma2", {"sliding_window": 8}),
        ("Gemma2", {"sliding_window": 64}),
    ],
)
def test_a_texts_own_keys_and_values_are_the_text_in_context(family: str, options: dict[str, Any]) -> None:
    model = ours(family, method="PREFIX", rows=6, **options).double()
    text, more = tokens(1, 6, seed=9), tokens(3, 7)
    prefix, expected = in_context(model.base_model, text, more)
    model.prompt_encoder["default"].load_prompt_embeddings(prefix)
    for given in ({}, {"attention_mask": torch.ones_like(more)}):
        found = model(input_ids=more, **given).logits
        assert_close({"logits": found.detach()}, {"logits": expected}, 1e-10)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=more).logits, expected, rtol=1e-2)


def test_a_layer_with_a_window_keeps_of_a_longer_prefix_what_the_next_token_sees() -> None:
    theirs, mine = pair("Gemma2", "CAUSAL_LM", "PREFIX", sliding_window=4)  # of 4 virtual tokens
    inputs = task_inputs("CAUSAL_LM", tokens())
    assert_close(step(mine, **inputs), step(theirs, **inputs))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "T5"])
def test_rows_with_adapters_of_different_lengths_are_those_rows_alone(family: str) -> None:
    task = "SEQ_2_SEQ_LM" if family == "T5" else "CAUSAL_LM"
    model = ours(family, task, "PREFIX", rows=2)
    for name, method, rows in (("long", "PROJECTED", 5), ("cartridge", "CARTRIDGE", 3)):
        kind, fields = config_fields(method, task, rows)
        model.add_adapter(name, getattr(fusedprompt, kind)(**fields))
    # Gemma 2 gives NaN for padding in fp64, without a prefix too.
    model.to(torch.float32 if family == "Gemma2" else torch.float64).set_adapter(["default", "long", "cartridge"])
    names, (ids, mask) = ["long", "default", BASE, "cartridge", "long"], pad(tokens(5), 2, 0)
    inputs = task_inputs(task, ids, mask)
    labels = inputs.pop("labels")
    for fixed in (inputs, {"input_ids": ids[:, 2:]}):
        count = (labels != -100).sum()
        given = {**fixed, "labels": labels if "attention_mask" in fixed or family == "T5" else labels[:, 2:]}
        found = step(model, **given, adapter_names=names)
        assert model.explain(**given, adapter_names=names).startswith("route prefix\n" if family != "T5" else "route")
        model.zero_grad()
        total, logits = 0.0, []
        for row, name in enumerate(names):
            alone = {key: value[row : row + 1] for key, value in given.items()}
            if "attention_mask" in alone and family != "T5":
                alone = {key: value[:, 2:] for key, value in alone.items()}
                alone.pop("attention_mask")
            output = model(**alone, adapter_names=[name])
            logits.append(output.logits)
            total = total + output.loss * ((alone["labels"][:, int(family != "T5") :] != -100).sum())
        counted = count if family == "T5" else count - len(names)
        (total / counted).backward()  # type: ignore[union-attr]
        expected = {"loss": (total / counted).detach(), **gradients(model)}  # type: ignore[union-attr]
        assert len(expected) == 8
        text = found.pop("logits")[:, -logits[0].shape[1] :]
        assert_close(found, expected, 1e-5 if family == "Gemma2" else 1e-6)
        assert_close({"logits": text}, {"logits": torch.cat(logits).detach()}, 1e-5 if family == "Gemma2" else 1e-10)


def test_every_layer_of_an_encoder_decoder_has_its_own_keys_and_values_and_peft_ties_half() -> None:
    theirs, mine = pair("T5", "SEQ_2_SEQ_LM", "PREFIX", num_layers=4, num_decoder_layers=4)
    inputs = task_inputs("SEQ_2_SEQ_LM", tokens())
    live = []
    for model in (theirs, mine):
        step(model, **inputs)
        gradient = model.prompt_encoder["default"].embedding.weight.grad
        live.append([bool(part.any()) for part in gradient.view(4, 4, -1).unbind(1)])
    assert live == [[True, False, True, False], [True] * 4]
    assert [layer_order(count, True) for count in (1, 3, 4)] == [[0], [0, 2, 1], [0, 2, 1, 3]]
    weights = [model.prompt_encoder["default"].embedding.weight for model in (theirs, mine)]
    with torch.no_grad():  # with the second half equal to the first it is PEFT's
        rows = weights[0].view(4, 4, -1)[:, [0, 0, 2, 2]].reshape(4, -1)
        weights[1].copy_(rows)
    assert_close({"logits": mine(**inputs).logits}, {"logits": theirs(**inputs).logits})


def test_what_is_kept_is_made_once_and_anew_when_the_encoder_changes() -> None:
    model, ids = ours("Llama", method="PROJECTED"), tokens()
    runs: list[int] = []
    encode = type(model.prompt_encoder["default"]).encode
    model.prompt_encoder["default"].encode = lambda: runs.append(1) or encode(model.prompt_encoder["default"])
    with torch.no_grad():
        first = model(input_ids=ids).logits
        again = model(input_ids=ids, adapter_names=["default"] * 3).logits
        assert len(runs) == 1 and torch.equal(first, again)
        parts = prefix_states(model, (model.prompts["default"],)).parts
        assert parts.is_contiguous() and model.prompt_cache.nbytes() == parts.nbytes
        for parameter in model.base_model.model.layers.parameters():
            parameter.add_(0.01)  # a prefix does not depend on the base model's layers
        model(input_ids=ids)
        assert len(runs) == 1
        model.prompt_encoder["default"].embedding.weight.mul_(2)
        assert not torch.equal(model(input_ids=ids).logits, first) and len(runs) == 2


def test_use_cache_and_the_form_of_the_output_are_the_callers() -> None:
    model, ids = ours("Llama", method="PREFIX"), tokens()
    whole = model(input_ids=ids)
    assert whole.past_key_values.get_seq_length() == 4 + 7 and whole.logits.shape == (3, 7, 67)
    without = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    assert without.past_key_values is None and torch.equal(without.logits, whole.logits)
    assert without.hidden_states[-1].shape[1] == 7
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], whole.logits)
    assert torch.equal(model(input_ids=ids, logits="text").logits, whole.logits)
    embeds = model.base_model.get_input_embeddings()(ids)
    assert_close({"logits": model(inputs_embeds=embeds).logits}, {"logits": whole.logits})
    moved = model(input_ids=ids, position_ids=torch.arange(7).unsqueeze(0)).logits
    assert_close({"logits": moved}, {"logits": whole.logits})
    begun = model(input_ids=ids[:, :3])
    rest = model(input_ids=ids[:, 3:], past_key_values=begun.past_key_values).logits
    assert_close({"logits": rest}, {"logits": whole.logits[:, 3:]})
    own = transformers.DynamicCache(config=model.base_model.config)
    assert_close({"logits": model(input_ids=ids, past_key_values=own).logits}, {"logits": whole.logits})
    assert own.get_seq_length() == 11


def test_a_half_precision_base_reads_what_peft_gives_it() -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", "PREFIX")
    for model in (theirs, mine):
        model.base_model.to(torch.bfloat16)
    inputs = {"input_ids": tokens()}
    assert torch.equal(mine(**inputs).logits, theirs(**inputs).logits)
    assert all(p.dtype == torch.float32 for p in mine.prompt_encoder.parameters())


# Refusals


def distilbert() -> Any:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=67, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    )


def mamba() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=67, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (distilbert, "SEQ_CLS", "DistilBertForSequenceClassification takes no key/value cache"),
        (mamba, "CAUSAL_LM", "MambaForCausalLM (takes no key/value cache|keeps a state)"),
    ],
)
def test_a_base_model_without_a_cache_is_refused_at_once(make: Any, task: str, message: str) -> None:
    config = fusedprompt.PrefixTuningConfig(task_type=task, num_virtual_tokens=4, num_attention_heads=4)
    with pytest.raises(ValueError, match=f"reads a prefix of PREFIX_TUNING, but {message}"):
        fusedprompt.get_prompt_model(make(), config)


def test_gradient_checkpointing_is_refused_in_words_and_not_by_a_shape() -> None:
    model, inputs = ours("Llama", method="PREFIX"), task_inputs("CAUSAL_LM", tokens())
    model.base_model.gradient_checkpointing_enable()
    model(**inputs)  # nothing is recomputed in evaluation
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing: expected it to be off with PREFIX_TUNING"):
        model(**inputs)
    model.base_model.gradient_checkpointing_disable()
    model(**inputs).loss.backward()


def test_where_a_prefix_stands_is_no_question() -> None:
    base, case = build("Llama"), "with PREFIX_TUNING, whose keys and values stand in front of all text"
    config = fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=f"prompt_start: expected 0 {case}, got 1"):
        fusedprompt.get_prompt_model(base, config, prompt_start=1)
    with pytest.raises(ValueError, match=f"template: expected none {case}, got"):
        fusedprompt.get_prompt_model(base, config, template="[text] [prompt 4]")
    with pytest.raises(ValueError, match="num_layers: expected the 2 layers of the base model's cache, got 3"):
        fusedprompt.get_prompt_model(
            base, fusedprompt.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3)
        )
    model, ids = fusedprompt.get_prompt_model(base, config), tokens()
    for argument, value in (("slots", torch.arange(7).expand(3, -1)), ("fields", {"text": ids})):
        with pytest.raises(ValueError, match=f"{argument}: expected None {case}"):
            model(**({"input_ids": ids} if argument == "slots" else {}), **{argument: value})
    with pytest.raises(
        fusedprompt.RouteUnavailable, match="route 'splice' cannot run: PREFIX_TUNING is keys and values"
    ):
        model(input_ids=ids, route="splice")
    assert torch.equal(model(input_ids=ids, route="shared").logits, model(input_ids=ids).logits)


def test_prompts_and_prefixes_do_not_mix_in_a_batch() -> None:
    model = ours("Llama", method="PREFIX")
    model.add_adapter("rows", fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="adapter_names: expected prompts of input embeddings, or prefixes of keys"):
        model(input_ids=tokens(2), adapter_names=["default", "rows"])
    model.set_adapter("rows")  # either alone is served, whichever is active
    both = [model(input_ids=tokens(2), adapter_names=[name] * 2).logits.shape[1] for name in ("default", "rows")]
    assert both == [7, 9]


def test_a_decoder_that_counts_columns_takes_prefixes_of_one_length() -> None:
    model = ours("Bart", "SEQ_2_SEQ_LM", "PREFIX", rows=2)
    for name, rows in (("long", 5), ("same", 2)):
        fields = config_fields("PREFIX", "SEQ_2_SEQ_LM", rows)[1]
        model.add_adapter(name, fusedprompt.PrefixTuningConfig(**fields))
    inputs = task_inputs("SEQ_2_SEQ_LM", tokens(2))
    model(**inputs, adapter_names=["default", "same"])
    with pytest.raises(ValueError, match="adapter_names: expected prefixes of one length"):
        model(**inputs, adapter_names=["default", "long"])


def test_keys_of_another_shape_are_named_with_what_they_should_be() -> None:
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    given = fusedprompt.PrefixTuningConfig(**fields, token_dim=32, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"expected those of the base model's keys, 1 heads of width 8, got 32 for 4"):
        fusedprompt.get_prompt_model(build("Falcon", multi_query=True), given)
    model = fusedprompt.get_prompt_model(build("Falcon"), fusedprompt.PrefixTuningConfig(**fields))
    config = model.peft_config["default"]
    assert (config.token_dim, config.num_attention_heads) == (8, 1)  # PEFT's rule gives 32 and 4, which do not run
    model(input_ids=tokens())


def test_padding_that_would_count_is_refused_and_other_padding_is_not() -> None:
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 67, "max_seq_len": 96}
    torch.manual_seed(0)
    bases = {
        "it counts padding": transformers.MptForCausalLM(transformers.MptConfig(**sizes)).eval(),
        "11 positions are more than its window of 8": build("Mistral", sliding_window=8),
    }
    for reason, base in bases.items():
        config = fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = fusedprompt.get_prompt_model(base, config)
        for left in (0, 2):
            ids, mask = pad(tokens(2, 5), left, 2 - left)
            if left:
                with pytest.raises(ValueError, match=f"rows without padding at the left.*{reason}"):
                    model(input_ids=ids, attention_mask=mask)
            else:
                found = model(input_ids=ids, attention_mask=mask).logits[:, :5]
                assert_close({"logits": found}, {"logits": model(input_ids=ids[:, :5]).logits})


def test_what_is_pooled_behind_a_window_may_have_no_padding_at_all() -> None:
    base = build("Mistral", "SEQ_CLS", sliding_window=8)
    config = fusedprompt.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(base, config).eval()
    ids, mask = pad(tokens(2, 5), 0, 2)
    with pytest.raises(ValueError, match="expected rows without padding, because of the base model: 11 positions"):
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids[:, :5], attention_mask=mask[:, :5])


def test_a_cache_of_the_callers_takes_a_prefix_that_a_window_cuts_if_it_has_that_window() -> None:
    model = ours("Gemma2", method="PREFIX", rows=12, sliding_window=8)
    ids, expected = tokens(), model(input_ids=tokens()).logits
    own = transformers.DynamicCache(config=model.base_model.config)
    begun = model(input_ids=ids[:, :4], past_key_values=own).logits
    found = torch.cat((begun, model(input_ids=ids[:, 4:], past_key_values=own).logits), 1)
    assert_close({"": found}, {"": expected})
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(input_ids=ids[:1], **options)
    assert torch.equal(model.generate(input_ids=ids[:1], prompt_lookup_num_tokens=2, **options), generated)
    with pytest.raises(ValueError, match="for 12 virtual tokens, of which a layer with a window keeps 7"):
        model(input_ids=ids, past_key_values=transformers.DynamicCache())


# Counts


class Products(TorchDispatchMode):
    """Rows that matrix products had, by the columns of their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.rows.append((left.shape[0], right.shape[1]))
        return func(*args, **(kwargs or {}))


def test_a_step_computes_the_texts_tokens_alone_and_the_encoder_once() -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", "PROJECTED")
    found = []
    for model in (theirs, mine):
        with Products() as products:
            model(input_ids=tokens(3))
        layers = [rows for rows, columns in products.rows if columns == 48]  # of the MLPs, two in each layer
        found.append((layers, [rows for rows, columns in products.rows if columns == 2 * 2 * 16]))
    assert found[1] == ([3 * 7] * 4, [4])
    assert found[0] == ([3 * 7] * 4, [3 * 4])  # PEFT: the projection of every row


def test_a_step_whose_logits_nobody_reads_makes_none() -> None:
    model, inputs = ours("Llama", method="PREFIX").train(), task_inputs("CAUSAL_LM", tokens(8))
    for _ in range(3):
        model(**inputs).loss.backward()
        assert not model.text_head.read
    assert model(**inputs).logits.shape == (8, 7, 67) and model.text_head.read


def test_rows_share_one_copy_of_the_prefix() -> None:
    model = ours("Llama", method="PREFIX").requires_grad_(False)
    weight = model.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    layers = prefix_states(model, (model.prompts["default"],)).for_rows(8).layers
    start = weight.untyped_storage().data_ptr()
    for layer in layers:
        for part in (layer.keys, layer.values):
            assert part.shape == (8, 2, 4, 8) and part.stride(0) == 0
            assert part.untyped_storage().data_ptr() == start


def test_peft_and_we_refuse_the_same_checkpointing_at_creation_and_later() -> None:
    base = build("Llama").train()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model = fusedprompt.get_prompt_model(
        base, fusedprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(input_ids=tokens())
