"""For every task and family an output's loss is what the base model's own loss gives on the logits beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import fusedprompt
from models import VOCAB, WIDTH, ours, pad, task_inputs, tokens

ROWS = 4
CASES = [
    *(("CAUSAL_LM", family) for family in ("Llama", "GPT2", "OPT", "Gemma2", "GPTNeoX", "Bloom")),
    *(("SEQ_CLS", family) for family in ("Llama", "GPT2", "Bert", "Roberta")),
    *(("TOKEN_CLS", family) for family in ("Llama", "GPT2", "Bert", "Roberta")),
    *(("QUESTION_ANS", family) for family in ("Llama", "GPT2", "Bert", "Roberta")),
    *(("SEQ_2_SEQ_LM", family) for family in ("T5", "Bart")),
]
PADDING = {"whole": (0, 0), "left": (3, 0), "right": (0, 2), "both": (2, 1)}


def base_loss(model: Any, task: str, output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """transformers' function of the base model's class, on the logits as they were returned."""
    function = model.base_model.loss_function
    if task == "QUESTION_ANS":
        loss: Tensor = function(
            output.start_logits, output.end_logits, inputs["start_positions"], inputs["end_positions"]
        )
        return loss
    logits, labels = output.logits, inputs["labels"]
    if task == "CAUSAL_LM":
        before = torch.full((labels.shape[0], logits.shape[1] - labels.shape[1]), -100)
        mask = inputs["attention_mask"]
        left = (mask != 0).int().argmax(1)
        rows = []
        for row, own in enumerate(labels):  # ours puts padding in front of the prompt
            start = int(left[row])
            rows.append(torch.cat((own[:start], before[row], own[start:])))
        return function(logits=logits, labels=torch.stack(rows), vocab_size=VOCAB)  # type: ignore[no-any-return]
    if task == "SEQ_2_SEQ_LM":
        return cross_entropy(logits.flatten(0, 1), labels.flatten())
    if task == "SEQ_CLS":
        return cross_entropy(logits, labels)
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("route", ["auto", "splice", "shared"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("task", "family"), CASES, ids=lambda value: value)
def test_the_loss_is_that_of_the_logits(task: str, family: str, padding: str, route: str) -> None:
    model = ours(family, task, rows=ROWS)
    ids, mask = pad(tokens(3, 7), *PADDING[padding])
    inputs = task_inputs(task, ids, mask)
    if task == "QUESTION_ANS":
        inputs["start_positions"], inputs["end_positions"] = torch.tensor([2, 3, 99]), torch.tensor([4, 3, 99])
    try:
        output = model(**inputs, route=route)
    except fusedprompt.RouteUnavailable:
        assert route == "shared"
        return
    torch.testing.assert_close(output.loss, base_loss(model, task, output, inputs), rtol=1e-4, atol=1e-5)


def test_answers_in_a_mixed_batch_count_each_rows_own_tokens() -> None:
    model = ours("Bert", "QUESTION_ANS", rows=ROWS)
    _, fields = "PromptTuningConfig", {"task_type": "QUESTION_ANS", "num_virtual_tokens": 2}
    model.add_adapter("other", fusedprompt.PromptTuningConfig(**fields))
    inputs = task_inputs("QUESTION_ANS", tokens(3, 7))
    output = model(**inputs, adapter_names=["other", "default", "__base__"])
    torch.testing.assert_close(output.loss, base_loss(model, "QUESTION_ANS", output, inputs))
    output = model(**inputs, return_dict=False)
    assert torch.equal(output[0], model(**inputs).loss)


def test_a_base_model_with_an_own_loss_of_answers_keeps_it() -> None:
    """Smoothed by its class, in code that nobody can call apart: then its loss is over all its positions."""

    class Smoothed(transformers.BertForQuestionAnswering):
        def forward(self, start_positions: Any = None, end_positions: Any = None, **given: Any) -> Any:
            output = super().forward(**given)
            if start_positions is not None:
                both = ((output.start_logits, start_positions), (output.end_logits, end_positions))
                output["loss"] = sum(cross_entropy(logits, at, label_smoothing=0.5) for logits, at in both)
            return output

    settings = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    base = Smoothed(transformers.BertConfig(vocab_size=VOCAB, **settings)).eval()
    config = fusedprompt.PromptTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=ROWS)
    model = fusedprompt.get_prompt_model(base, config)
    inputs = task_inputs("QUESTION_ANS", tokens(2, 5))
    spans = {name: inputs[f"{name}_positions"] + ROWS for name in ("start", "end")}
    rows = torch.cat((model.prompt_rows().expand(2, -1, -1), model.word_embeddings(inputs["input_ids"])), 1)
    whole = base(inputs_embeds=rows, start_positions=spans["start"], end_positions=spans["end"])
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).loss, whole.loss)


@pytest.mark.parametrize("family", ["TrOCR", "Mvp"])
@pytest.mark.parametrize("route", ["auto", "splice"])
def test_a_loss_that_the_forward_makes_by_itself_is_the_base_models(family: str, route: str) -> None:
    """These decoders' labels are not moved: no function of transformers says so, only their own code."""
    sizes = {"d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    prompt = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)
    model, ids = fusedprompt.get_prompt_model(base, prompt), tokens(8, 10)
    output = model(input_ids=ids, labels=ids, route=route)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits[:, 30:].flatten(0, 1), ids.flatten()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["slots", "template", "mixed", "none"])
@pytest.mark.parametrize("family", ["Mvp", "TrOCR"])
def test_a_loss_that_is_not_of_next_tokens_keeps_the_first_label(family: str, where: str, masked: bool) -> None:
    settings = {"d_model": WIDTH, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, max_position_embeddings=64, **settings)
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    prompt = fusedprompt.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=ROWS, num_attention_heads=2, num_layers=1
    )
    template = f"[text] [prompt {ROWS}]" if where == "template" else None
    model = fusedprompt.get_prompt_model(base, prompt, template=template).eval()
    ids, columns = tokens(3, 5), 5
    given: dict[str, Any] = {"labels": ids}
    if where == "slots":
        slots = torch.tensor([0, 1, -1, -2, -3, -4, 2, 3, 4]).expand(3, -1)
        given, columns = {"slots": slots, "labels": ids.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -100)}, 9
    elif where in ("mixed", "none"):
        given["adapter_names"] = ["default", "__base__", "default"] if where == "mixed" else ["__base__"] * 3
    mask = {"attention_mask": torch.ones(3, columns, dtype=torch.int64)} if masked else {}
    output = model(input_ids=ids, **given, **mask)
    counts = (output.logits.shape[1] - 5) * (where in ("template", "mixed"))
    labels = given["labels"] if where == "slots" else torch.nn.functional.pad(ids, (counts, 0), value=-100)
    if where == "template":
        labels = labels.roll(-ROWS, 1)
    loss = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-5)
