"""`fusedprompt generate`: what it writes, against PEFT's `generate` a row at a time, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from byte_models import END, save_byte_model
from fusedprompt.commands import tune
from fusedprompt.commands.generate import main
from fusedprompt.commands.language_model import load_tokenizer
from tolerance import one_thread  # noqa: F401

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

TEXTS = ["red 7", "a far longer text", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("byte-model"), positions=160)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each way of writing rows one: with a template, of CPT, of a text, and one for a template of two columns."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"w{index},{index % 3}\n" for index in range(12)))
    (folder / "text.txt").write_text("Soft prompts are rows of numbers. " * 20)
    one, two = r"W: {text}\nF: {label};", "{label}: {text} {label2}"
    (folder / "two.csv").write_text("text,label,label2\n" + "a,b,c\n" * 4)
    for name, more in {
        "plain": ["--data", str(folder / "rows.csv"), "--template", one],
        "cpt": ["--data", str(folder / "rows.csv"), "--template", one, "--method", "cpt", "--examples", "2"],
        "text": ["--data", str(folder / "text.txt"), "--max-length", "32"],
        "two": ["--data", str(folder / "two.csv"), "--template", two],
    }.items():
        usual = ["--model", str(model), "--out", str(folder / name), "--steps", "2", "--virtual-tokens", "3"]
        assert tune.main([*usual, *more, "--device", "cpu", "--answers", "0"]) == 0
    return {name: folder / name for name in ("plain", "cpt", "text", "two")}


def written_by_peft(model: Path, adapter: Path, question: str, begin: list[int], count: int) -> str:
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(str(model))
    theirs = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.tensor([begin + tokenizer(question, add_special_tokens=False)["input_ids"]])
    new = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    row = new[0, ids.shape[1] :].tolist()
    return str(tokenizer.decode(row[: row.index(END)] if END in row else row))


@pytest.mark.parametrize(
    ("name", "question", "begin"), [("plain", "W: {}\nF:", [0]), ("cpt", "W: {}\nF:", []), ("text", "{}", [0])]
)
def test_rows_of_a_batch_are_answered_as_peft_answers_each_alone(
    name: str, question: str, begin: list[int], adapters: dict[str, Path], model: Path, capsys: Any
) -> None:
    assert main(["--adapter", str(adapters[name]), "--max-new-tokens", "6", "--json", "--device", "cpu", *TEXTS]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [row["text"] for row in found] == TEXTS and "\r" not in err
    for row, text in zip(found, TEXTS):
        expected = written_by_peft(model, adapters[name], question.format(text), begin, 6)
        assert row["answer"] == (expected if name == "text" else expected.removesuffix(";").strip())


def test_texts_come_from_arguments_files_and_the_input(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    told = []
    for words in (TEXTS, ["--data", tmp_path / "rows.jsonl"], ["--data", tmp_path / "texts.txt"], ["-"]):
        arguments = ["--adapter", str(adapters["plain"]), "--max-new-tokens", "4", "--json", "--device", "cpu"]
        assert main([*arguments, *map(str, words)]) == 0
        told.append(capsys.readouterr().out)
    assert len(set(told)) == 1 and len(told[0].splitlines()) >= len(TEXTS)


def test_a_template_of_several_columns_asks_for_rows(adapters: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    arguments = ["--adapter", str(adapters["two"]), "--max-new-tokens", "3", "--json", "--device", "cpu"]
    assert main([*arguments, "--data", str(tmp_path / "rows.csv")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["text"], row["label"]) == ("a", "b") and set(row) == {"text", "label", "answer"}


def test_raw_texts_are_gone_on_from_without_the_template(adapters: dict[str, Path], model: Path, capsys: Any) -> None:
    arguments = [
        "--adapter",
        str(adapters["plain"]),
        "--max-new-tokens",
        "5",
        "--raw",
        "--json",
        "--device",
        "cpu",
        "Ab c",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == written_by_peft(model, adapters["plain"], "Ab c", [0], 5)


def test_samples_are_the_same_for_the_same_seed(adapters: dict[str, Path], capsys: Any) -> None:
    told = []
    for seed in ("1", "1", "2"):
        options = ["--temperature", "5", "--seed", seed, "--max-new-tokens", "20", "--json", "--device", "cpu"]
        assert main(["--adapter", str(adapters["text"]), *options, "x"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize(
    ("adapter", "more", "message"),
    [
        ("plain", [], "TEXT, --data: expected one of them"),
        ("plain", ["x", "--data", "rows.csv"], "TEXT, --data: expected one of them"),
        ("plain", [" "], "TEXT: expected a text, got none"),
        ("two", ["x"], "TEXT: expected rows by --data (.jsonl, .csv), because the template asks for the columns"),
        ("plain", ["--data", "ROWS"], "line 2: expected the columns 'text' of the template, got 'body'"),
        ("plain", ["x", "--temperature", "-1"], "--temperature: expected a number >= 0, got '-1'"),
        ("plain", ["x", "--model", "no/such/model"], "--model: expected a causal language model with a tokenizer"),
        (
            "nowhere",
            ["x"],
            "adapter_config.json: no such file; expected the configuration of a prompt",
        ),
    ],
)
def test_wrong_arguments_are_named(
    adapter: str, more: list[str], message: str, adapters: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.csv").write_text("body\nx\n")
    words = [str(tmp_path / "rows.csv") if word == "ROWS" else word for word in more]
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(adapters.get(adapter, tmp_path / adapter)), "--device", "cpu", *words])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
