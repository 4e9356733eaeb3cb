"""The demo: its words, its story end to end, a text of one's own, and its errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedprompt as fp
from byte_models import save_byte_model
from fusedprompt.commands.demo import main, own_text, story, timing, training, words
from fusedprompt.commands.demo.words import IGNORED, PAD, TASKS

CPU = torch.device("cpu")

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run no faster on two threads, and far slower where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Words


def test_words_are_real_and_the_same_every_time() -> None:
    first, second = words.load_words(), words.load_words()
    assert first == second
    everything = [*first.train, *first.validation, *first.test]
    assert len(everything) == len(set(everything)) == 12_000
    assert (len(first.validation), len(first.test)) == (250, 500)
    assert {"import", "return", "open", "word", "before", "between", "language"} <= set(everything)
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 8 for word in everything)
    assert words.load_words(seed=1).test != first.test


def test_words_missing_from_the_standard_library_come_from_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        words, "_python_sources", lambda folder: iter(["one two three" if "torch" not in folder else "four fiveSix"])
    )
    found = words.load_words(count=6, validation=1, test=1)
    assert sorted([*found.train, *found.validation, *found.test]) == ["five", "four", "one", "six", "three", "two"]
    with pytest.raises(RuntimeError, match=r"needs 7 words .* found 6"):
        words.load_words(count=7, validation=1, test=1)


def test_escapes_and_longer_words_give_no_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_python_sources", lambda folder: iter([r"\nalpha getBetaName incomprehensibility"]))
    found = words.load_words(count=4, validation=1, test=1)
    assert sorted([*found.train, *found.validation, *found.test]) == ["alpha", "beta", "get", "name"]


@pytest.mark.parametrize(
    ("task", "answer"), [("upper", "LANGUAGE"), ("reverse", "egaugnal"), ("sort", "aaegglnu"), ("drop-vowels", "lngg")]
)
def test_tasks_rewrite_words(task: str, answer: str) -> None:
    assert TASKS[task].rewrite("language") == answer


@pytest.mark.parametrize("tagged", [False, True])
def test_lines_bear_labels_on_the_answer_alone(tagged: bool) -> None:
    batch = words.lines(["cat", "language"], TASKS["reverse"], tagged)
    question = "Rcat=" if tagged else "cat="
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert bytes(ids[ids != PAD].tolist()) == f"{question}tac\n".encode()
    assert bytes(labels[labels != IGNORED].tolist()) == b"tac\n"
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    assert batch["input_ids"].shape == (2, 18 + tagged)


# The story


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The quick story's folder and summary."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["--quick", "--output", str(folder), "--seed", "3", "--threads", "1", "--device", "cpu"]) == 0
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def some_words() -> words.Words:
    return words.load_words(count=200, validation=5, test=5)


def test_story_writes_every_number(told: tuple[Path, dict[str, Any]]) -> None:
    _, summary = told
    assert (summary["mode"], summary["task"], summary["seed"]) == ("story", "reverse", 3)
    assert set(summary["versions"]) == {"fusedprompt", "python", "torch", "transformers"}
    assert summary["machine"]["threads"] == 1
    assert summary["settings"] == dataclasses.asdict(training.QUICK)
    assert set(summary["exact_match_with_tag"]) == set(TASKS)
    assert len(summary["pretraining"]["loss"]) == training.QUICK.pretraining_steps
    assert set(summary["prompts"]) == {"MLP", "LSTM"}
    for prompt in summary["prompts"].values():
        assert 0.0 <= prompt["exact_match"] <= 100.0
        assert prompt["reloaded_largest_difference"] == 0.0
        assert prompt["encoding"]["largest_difference"] < 1e-4
        assert min(prompt["encoding"]["fusedprompt_ms"], prompt["encoding"]["pytorch_ms"]) > 0.0
        assert prompt["backends"]["mlp"]["reference"] == "runs"
        assert len(prompt["examples"]) == training.QUICK.examples
        curve = prompt["curve"]
        assert curve["checked_steps"] == [0, 4, 8, 12] and len(curve["checks"]) == 4
        assert len(curve["loss"]) == len(curve["seconds"]) == 12
    together = summary["together"]
    assert set(together["exact_match"]) == set(TASKS) and together["rows"] == 4 * training.QUICK.test_words
    assert [row[0] for row in together["examples"]] == list(TASKS) and together["steps"] == 4
    assert "lstm" in summary["prompts"]["LSTM"]["backends"] and "lstm" not in summary["prompts"]["MLP"]["backends"]


def test_story_learns_even_in_a_hurry(told: tuple[Path, dict[str, Any]]) -> None:
    _, summary = told
    losses = summary["pretraining"]["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_story_draws_its_curves(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "curves.png").stat().st_size > 20_000


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_story_adapters_load_in_peft_with_equal_logits(told: tuple[Path, dict[str, Any]], kind: str) -> None:
    peft = pytest.importorskip("peft")
    folder, _ = told
    batch = words.lines(["cat", "language"], TASKS["reverse"], tagged=False)
    ours = fp.PromptModel.from_pretrained(story.fresh_base(folder, CPU), folder / kind)
    theirs = peft.PeftModel.from_pretrained(story.fresh_base(folder, CPU), str(folder / kind)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits)


def test_mixed_rows_are_answered_as_each_adapter_alone_answers_them(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    model = fp.PromptModel(story.fresh_base(folder, CPU))
    for name in TASKS:
        model.load_adapter(folder / "together" / name, name)
    model.eval()
    some, lengths = ["cat", "language", "window", "fig"], [model.prompt_rows_count(name) for name in TASKS]
    assert lengths == [8, 9, 10, 11]
    alone = []
    for name, word in zip(TASKS, some):
        model.set_adapter(name, inference_mode=True)
        alone += words.rewrite_words(model, [word], TASKS[name], tagged=False)
    assert words.rewrite_words(model, some, TASKS["sort"], tagged=False, adapter_names=list(TASKS)) == alone


def test_words_are_rewritten_alike_alone_and_in_a_padded_batch(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    model = fp.PromptModel.from_pretrained(story.fresh_base(folder, CPU), folder / "mlp")
    some = ["cat", "language", "window"]
    alone = [words.rewrite_words(model, [word], TASKS["sort"], tagged=False)[0] for word in some]
    assert words.rewrite_words(model, some, TASKS["sort"], tagged=False) == alone


def test_pretraining_is_the_same_for_the_same_seed(some_words: words.Words) -> None:
    settings = dataclasses.replace(training.QUICK, pretraining_steps=4)
    losses = [story.pretrain(settings, some_words, seed, CPU)[1].loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_reloaded_adapter_that_differs_is_reported(
    told: tuple[Path, dict[str, Any]], some_words: words.Words
) -> None:
    folder, _ = told
    saved = fp.PromptModel.from_pretrained(story.fresh_base(folder, CPU), folder / "mlp")
    other = fp.PromptModel.from_pretrained(story.fresh_base(folder, CPU), folder / "mlp")
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.add_(1.0)
    assert story.compare_models(saved, saved, some_words, TASKS["upper"]) == 0.0
    with pytest.raises(RuntimeError, match="differ"):
        story.compare_models(saved, other, some_words, TASKS["upper"])


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_timed_encoders_compute_the_same(kind: str) -> None:
    config = fp.PromptEncoderConfig(
        num_virtual_tokens=5, token_dim=12, encoder_reparameterization_type=kind, encoder_hidden_size=9
    )
    encoder = fp.PromptEncoder(config)
    torch.testing.assert_close(timing.PlainEncoder(encoder).encode(), encoder.encode())
    assert timing.compare_encoders(encoder, rounds=1)["largest_difference"] < 1e-4


# A text of one's own


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("language-model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Soft prompts are rows of numbers. " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_own_text_lowers_the_held_out_loss(language_model: Path, text: Path, tmp_path: Path, encoder: str) -> None:
    output = tmp_path / "out"
    options = ["--steps", "40", "--block-size", "32", "--virtual-tokens", "4", "--learning-rate", "0.02"]
    chosen = ["--model", str(language_model), "--text", str(text), "--output", str(output), "--encoder", encoder]
    assert main([*chosen, *options, "--device", "cpu", "--threads", "1"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["mode"] == "text"
    assert summary["held_out_loss_with_prompt"] < summary["held_out_loss_without_prompt"]
    # Loading gives back what training ended with.
    assert summary["held_out_loss_with_prompt"] == pytest.approx(summary["curve"]["checks"][-1], rel=1e-6)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "adapter" / "adapter_model.safetensors").exists()


def test_own_text_blocks_begin_as_the_tokenizer_begins_a_text(language_model: Path, text: Path) -> None:
    data = own_text.load(str(language_model), text, own_text.TextSettings(block_size=16, virtual_tokens=4))
    blocks = torch.cat([data.train, data.held_out])
    assert blocks.shape == (34 * 40 // 15, 16)
    assert (blocks[:, 0] == 0).all() and (blocks[:, 1:] != 0).all()
    assert len(data.held_out) == len(blocks) // 10


def test_held_out_loss_is_the_mean_over_tokens(language_model: Path, text: Path) -> None:
    data = own_text.load(str(language_model), text, own_text.TextSettings(block_size=16, virtual_tokens=4))
    with torch.no_grad():
        logits = data.base(data.held_out).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.held_out[:, 1:].flatten())
    # Two blocks at a time: the last batch is smaller than the others.
    assert len(data.held_out) % 2 == 1
    assert own_text.held_out_loss(data.base, data.held_out, 2) == pytest.approx(float(expected), rel=1e-5)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL"], "--model, --text: expected both or neither"),
        (["--steps", "3"], "--steps: expected only with --model and --text"),
        (["--threads", "0"], "--threads: expected a positive integer, got '0'"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (["--task", "translate"], "--task: invalid choice: 'translate'"),
        (["--output", "TEXT"], "--output: expected a folder to write to, got"),
        (["--model", "MODEL", "--text", "missing.txt"], "--text: expected a file of UTF-8 text, got 'missing.txt'"),
        (["--model", "no/such/model", "--text", "TEXT"], "--model: expected a causal language model"),
        (
            ["--model", "MODEL", "--text", "TEXT", "--learning-rate", "-1"],
            "--learning-rate: expected a positive number",
        ),
        (["--model", "MODEL", "--text", "TEXT"], "--virtual-tokens + --block-size: expected at most the model's 64"),
        (["--model", "MODEL", "--text", "SHORT", "--block-size", "40"], "--text: expected at least two blocks of"),
        (["--model", "MODEL", "--text", "TEXT", "--block-size", "1"], "--block-size: expected at least 2"),
        (["--model", "MODEL", "--text", "BINARY"], "--text: expected a file of UTF-8 text"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str],
    message: str,
    language_model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    paths = {
        "MODEL": str(language_model),
        "TEXT": str(text),
        "SHORT": str(tmp_path / "short.txt"),
        "BINARY": str(tmp_path / "binary.txt"),
    }
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "out"), *(paths.get(argument, argument) for argument in arguments)])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["--quick"]) == 1
    assert "the demo needs matplotlib; install with: pip install fusedprompt[demo]" in capsys.readouterr().err


def test_threads_are_set_back(told: tuple[Path, dict[str, Any]], language_model: Path, text: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(SystemExit):
        main(["--threads", "2", "--output", str(told[0]), "--model", str(language_model), "--text", "missing.txt"])
    assert torch.get_num_threads() == before


def test_without_a_terminal_a_training_writes_a_few_lines_and_no_bars(
    some_words: words.Words, capfd: pytest.CaptureFixture[str]
) -> None:
    """tqdm's bars are rewritten at each step, and each of their states would be a line of a file."""
    story.pretrain(dataclasses.replace(training.QUICK, pretraining_steps=20), some_words, 1, CPU)
    out, err = capfd.readouterr()
    assert "\r" not in out + err and "it/s" not in out + err
    steps = [line.split()[2] for line in out.splitlines() if line.startswith("   pre-training: step ")]
    assert steps == ["4/20,", "8/20,", "12/20,", "16/20,", "20/20,"]
