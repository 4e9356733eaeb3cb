"""The examples on tiny models: each learns, what it saves comes back the same, and it stays short enough to read."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from byte_models import save_byte_model

pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} = {% endif %}"
MOST_LINES = {"cartridge.py": 120, "package_sections.py": 450}  # where it is not 80


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """A function that runs an example as a script and gives what it prints; here, as importing torch takes seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(example: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [example, *options])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(before)


def figures(text: str, pattern: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(figure) for figure in found.groups()]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama that reads bytes, with a chat template."""
    folder = save_byte_model(tmp_path_factory.mktemp("decoder"), positions=512)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.pad_token = CHAT, "</s>"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT that reads the words that come often in the examples' texts."""
    texts = [row["text"] for row in runpy.run_path(str(EXAMPLES / "_data.py"))["documented"]()]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    answers = ["tree", "number", "log", "mail", "path", "security"]
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=500, special_tokens=[*specials, *answers, "about"])
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names: dict[str, Any] = dict(zip(("pad", "unk", "cls", "sep", "mask"), specials))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    )
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=500, initializer_range=0.2, **sizes)
    transformers.BertForPreTraining(config).save_pretrained(folder)
    return str(folder)


def test_classification_learns_and_comes_back_the_same(run: Callable[..., str], encoder: str) -> None:
    text = run("classification.py", "--model", encoder, "--steps", "60")
    before, after = (
        figures(text, rf"{when}: held-out loss ([\d.]+), accuracy ([\d.]+)") for when in ("before", "after")
    )
    assert after[0] < before[0] and after[1] > before[1]
    assert "reloaded: logits are the same" in text


def test_instruction_tuning_lowers_the_loss_of_answers_that_were_not_trained_on(
    run: Callable[..., str], decoder: str
) -> None:
    text = run("sft.py", "--model", decoder, "--steps", "20")
    without, after = figures(text, r"held-out loss of answers: ([\d.]+) without a prompt, ([\d.]+) with it")
    assert after < without
    assert "reloaded: answers are the same" in text


def test_a_masked_model_learns_to_fill_in_a_template_and_comes_back_the_same(
    run: Callable[..., str], encoder: str
) -> None:
    text = run("masked_template.py", "--model", encoder, "--steps", "60")
    before, after = (
        figures(text, rf"{when}: held-out loss ([\d.]+), [a-z ]+6 words ([\d.]+)") for when in ("before", "after")
    )
    assert after[0] < 0.9 * before[0]
    assert "reloaded: figures are the same" in text
    assert text.startswith("1t 4P ")


def test_both_adapters_of_a_mixed_batch_learn_and_come_back_the_same(run: Callable[..., str], decoder: str) -> None:
    text = run("mixed_adapters.py", "--model", decoder, "--steps", "20")
    for name in ("module", "name"):
        before, after, reloaded = figures(
            text, rf"{name}: held-out loss ([\d.]+) before, ([\d.]+) after, ([\d.]+) reloaded"
        )
        assert after < before and abs(reloaded - after) <= 1e-4


def test_a_cartridge_comes_near_to_what_the_text_says(run: Callable[..., str], tmp_path: Path) -> None:
    model = str(save_byte_model(tmp_path, positions=8192))
    text = run("cartridge.py", "--model", model, "--virtual-tokens", "16", "--steps", "21")
    away = [float(nats) for nats in re.findall(r"^step \d+: (-?[\d.]+) nats", text, re.MULTILINE)]
    assert len(away) == 3 and away[2] < 0.85 * away[0]
    contexts = re.findall(r"^\| ([\w' ]+?) \| (\d+) \| \d+ \| \d+ \|$", text, re.MULTILINE)
    names = ["no context", "full context", "the text's first tokens", "cartridge"]
    assert [name for name, _ in contexts] == names and [int(count) for _, count in contexts][2:] == [16, 16]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < MOST_LINES.get(path.name, 80)
