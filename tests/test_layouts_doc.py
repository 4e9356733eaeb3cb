"""The examples in docs/layouts.md run, and do what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fusedprompt
from models import PAD, VOCAB, build
from tolerance import one_thread  # noqa: F401
from word_tokenizers import word_tokenizer

DOC = (Path(__file__).parent.parent / "docs" / "layouts.md").read_text()


def blocks(section: str) -> list[str]:
    """The code of a section that begins with a heading of two #."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", DOC, flags=re.S | re.M)
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def steps(model: Any, batch: dict[str, Any], count: int, rate: float) -> list[float]:
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train(model: Any, batch: dict[str, Any]) -> None:
    """What the document's examples call."""
    losses = steps(model, batch, 60, 2e-2)
    assert losses[-1] < losses[0] / 2


def that_knows_capitals(base: Any, batch: dict[str, Any]) -> Any:
    """A base model that has learned to name a city's country after "of", and its size after "is"."""
    assert steps(base, batch, 80, 5e-3)[-1] < 0.1
    return base


QUESTIONS = ["of paris", "of rome", "is paris", "is rome"]
ANSWERS = ["france", "italy", "big", "a"]


def masked_model() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, pad_token_id=PAD, **sizes)).eval()
    tokenizer = word_tokenizer("bert")
    batch = tokenizer([f"{question} [MASK]" for question in QUESTIONS], return_tensors="pt")
    whole = tokenizer([f"{question} {answer}" for question, answer in zip(QUESTIONS, ANSWERS)], return_tensors="pt")
    labels = torch.where(batch["input_ids"] == tokenizer.mask_token_id, whole["input_ids"], -100)
    return that_knows_capitals(base, {**batch, "labels": labels})


def causal_model() -> Any:
    texts = [f"{question} {answer}" for question, answer in zip(QUESTIONS, ANSWERS)]
    batch = word_tokenizer("llama")(texts, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    return that_knows_capitals(build("Llama"), {**batch, "labels": labels})


def run(section: str) -> str:
    namespace: dict[str, Any] = {
        "fp": fusedprompt,
        "torch": torch,
        "train": train,
        "bert": masked_model(),
        "llama": causal_model(),
        "bert_classifier": build("Bert", "SEQ_CLS"),
        "bert_tokenizer": word_tokenizer("bert"),
        "llama_tokenizer": word_tokenizer("llama"),
    }
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in blocks(section):
            torch.manual_seed(0)
            exec(block, namespace)
    return output.getvalue()


@pytest.mark.parametrize("section", ["Templates", "Your own"])
def test_every_example_prints_the_pictures_that_stand_beside_it(section: str) -> None:
    code = "".join(blocks(section))
    pictures = re.findall(r"print\(batch\.picture.*# ((?:[PtA·] )+[PtA·])", code)
    printed = run(section).splitlines()
    if section == "Your own":
        assert printed == ["Layout(num_prompt_rows=3, slots=(1, 6)): t P P t t P"]
    else:
        assert printed == pictures and len(pictures) == 5


def test_the_mixed_example_says_what_stands_below_it() -> None:
    (text,) = re.findall(r"^## Mixed\n(.*?)(?=^## )", DOC, flags=re.S | re.M)
    (said,) = re.findall(r"```\n\n((?:    .*\n)+)", text)
    assert run("Mixed").splitlines() == [line.strip() for line in said.splitlines()]


def test_the_packed_example_runs() -> None:
    assert run("Packed") == ""


def test_a_pair_is_classified_better_than_by_chance() -> None:
    """Whether the hypothesis is one of 5 words or of 5 others, behind premises that were not seen before."""
    numbers = torch.Generator("cpu").manual_seed(0)

    def draw(count: int) -> list[dict[str, Any]]:
        words = torch.randint(0, 40, (count, 3), generator=numbers, device="cpu").tolist()
        return [{"premise": f"w{a} w{b}", "hypothesis": f"w{c % 10}", "label": int(c % 10 < 5)} for a, b, c in words]

    tokenizer = word_tokenizer("bert")
    text = "[prompt 2] [premise] [prompt 2] [sep] [hypothesis] [prompt 2]"
    template = fusedprompt.Template.parse(text).bind(tokenizer)
    config = fusedprompt.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=6)
    base = build("Bert", "SEQ_CLS")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # random attention that looks at something
    model = fusedprompt.get_prompt_model(base, config, template=template)
    collate = fusedprompt.TemplateCollator(template, tokenizer)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(100):
        loss = model(**collate(draw(64))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    test = collate(draw(200))
    with torch.no_grad():
        accuracy = float((model(**test).logits.argmax(-1) == test["labels"]).float().mean())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert accuracy > 0.8


def test_trainer_trains_with_a_template_and_its_collator(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("llama")
    template = fusedprompt.Template.parse("[prompt 2] [subject] [prompt 2] [answer]").bind(tokenizer)
    config = fusedprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = fusedprompt.get_prompt_model(build("Llama"), config, template=template)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"subject": "paris", "answer": "france"}, {"subject": "rome is", "answer": "italy"}]
    before = model.prompt_rows().detach().clone()
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=fusedprompt.TemplateCollator(template, tokenizer, loss=["answer"]),
    )
    result = trainer.train()
    assert result.training_loss > 0 and not torch.equal(model.prompt_rows(), before)
