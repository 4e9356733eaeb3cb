"""`fusedprompt tune`: what it learns from, runs that are killed, what is refused, and what is written."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fusedprompt as fp
import killed
from byte_models import END, save_byte_model
from fusedprompt.commands.language_model import load_tokenizer
from fusedprompt.commands.tune import curve, main, settings, training
from fusedprompt.commands.tune.data import Source
from fusedprompt.commands.tune.template import CPTWriter, PlainWriter, TextTemplate
from tolerance import one_thread  # noqa: F401

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

TEMPLATE = r"Word: {text}\nFirst: {label}"
METHODS = ["p-tuning", "prompt-tuning", "prefix", "cpt"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("byte-model"), positions=160)


def some_rows(count: int = 30) -> list[dict[str, Any]]:
    drawn = random.Random(0)
    words = [drawn.choice(["red", "blue", "green"]) for _ in range(count)]
    return [{"text": f"{word} {index}", "label": word[0], "more": None} for index, word in enumerate(words)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some_rows()))
    return path


def command(model: Path, data: Path, out: Path, *more: str, template: str | None = TEMPLATE) -> list[str]:
    usual = ["--device", "cpu", "--virtual-tokens", "3", "--steps", "9", "--interval", "2", "--batch-size", "4"]
    usual += [] if template is None else ["--template", template]
    usual += ["--examples", "2", "--answers", "0", "--learning-rate", "0.01"]
    return ["--model", str(model), "--data", str(data), "--out", str(out), *usual, *more]


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "curve.csv")}


# Runs


@pytest.fixture(scope="module", params=METHODS)
def done(
    request: pytest.FixtureRequest, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A method, and the folder of a run of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    assert main(command(model, data, folder, "--method", request.param)) == 0
    return request.param, folder


MOMENTS = {
    "p-tuning": [
        "while its file is written",
        "before training",
        "in the first interval",
        "in a later interval",
        "in evaluation",
        "with half a checkpoint",
        "with half a state",
        "with a whole checkpoint",
        "before saving",
        "before it is told to be done",
        "while its file is written",
    ],
    "prompt-tuning": ["in a later interval"],
    "prefix": ["in a later interval"],
    "cpt": ["in a later interval"],
}


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_that_is_not(
    done: tuple[str, Path], model: Path, data: Path, tmp_path: Path
) -> None:
    method, undisturbed = done
    arguments = command(model, data, tmp_path / "run", "--method", method)
    for moment in MOMENTS[method]:
        assert killed.run(moment, arguments) == -9, moment
        known = tmp_path / "run" / "tune.json"
        assert not known.exists() or "result" not in json.loads(known.read_text()), moment
    assert killed.run(None, arguments) == 0
    assert files(tmp_path / "run") == files(undisturbed)
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {entry.name for entry in undisturbed.iterdir()}


def test_adapters_load_in_peft_and_here_with_the_loss_that_is_told(done: tuple[str, Path], model: Path) -> None:
    peft = pytest.importorskip("peft")
    method, folder = done
    known = json.loads((folder / "tune.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(str(model))
    template = TextTemplate(TEMPLATE)
    rows = held_out_rows(folder)
    assert len(rows) == 3  # one batch, so that the mean is over all tokens
    writer = CPTWriter(template, tokenizer) if method == "cpt" else PlainWriter(template, tokenizer)
    ours = fp.PromptModel.from_pretrained(base, folder)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), str(folder))
    losses: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": [], "base": []}
    for row in rows:
        ids = {name: torch.tensor([values]) for name, values in writer.row(row).items()}
        labels = ids["input_ids"].clone()
        answer = len(f" {row['label']}") + 1  # and what ends a text
        with torch.no_grad():
            inputs = {"input_ids": ids["input_ids"]}
            codes = {"input_type_mask": ids["input_type_mask"]} if method == "cpt" else {}
            logits = {"ours": ours(**inputs, logits="full").logits, "theirs": theirs(**inputs, **codes).logits}
            with theirs.disable_adapter():
                logits["base"] = theirs(**inputs).logits
        for name, values in logits.items():
            part = torch.nn.functional.cross_entropy(values[0, -answer - 1 : -1], labels[0, -answer:], reduction="none")
            losses[name].append(part)
    means = {name: float(torch.cat(parts).mean()) for name, parts in losses.items()}
    told = known["result"]["held_out_loss"]
    assert means["ours"] == pytest.approx(told, rel=1e-5) and means["theirs"] == pytest.approx(told, rel=1e-5)
    assert means["base"] == pytest.approx(known["held_out_loss_without_prompt"], rel=1e-5)
    assert told < known["held_out_loss_without_prompt"] or method == "cpt"  # which an untrained model cannot do


def held_out_rows(folder: Path) -> list[dict[str, str]]:
    """A tenth of the rows, in the order that the seed gives."""
    rows = [{"text": row["text"], "label": row["label"]} for row in some_rows()]
    return random.Random(0).sample(rows, len(rows))[-3:]


def test_the_curve_is_a_table_and_a_picture(done: tuple[str, Path]) -> None:
    _, folder = done
    table = list(csv.DictReader(io.StringIO((folder / "curve.csv").read_text())))
    assert [row["step"] for row in table] == ["2", "4", "6", "8", "9"]
    assert [*table[0]] == ["step", "loss", "held_out_loss", "learning_rate"]
    result = json.loads((folder / "tune.json").read_text())["result"]
    lowest = min(table, key=lambda row: float(row["held_out_loss"]))
    assert result == {
        "steps": 9,
        "kept_step": int(lowest["step"]),
        "held_out_loss": float(lowest["held_out_loss"]),
    }
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_terminal_there_is_a_line_for_each_interval(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, data, tmp_path / "run", "--answers", "2")) == 0
    out, err = capfd.readouterr()
    assert "\r" not in out + err and err == ""
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == [
        "2/9",
        "4/9",
        "6/9",
        "8/9",
        "9/9",
    ]
    assert (
        len(out.splitlines()) == 12
    )  # two before, five intervals, the end, how many are right, two answers, what next


def test_on_a_terminal_there_is_a_bar_beside_them(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(command(model, data, tmp_path / "run", "--steps", "3", "--interval", "1")) == 0
    out, err = capsys.readouterr()
    assert "tuning:" in err and "3/3" in err
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == ["1/3", "2/3", "3/3"]


def test_a_run_that_is_done_is_left_alone(
    done: tuple[str, Path], model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, folder = done
    before = {entry: entry.stat().st_mtime_ns for entry in folder.rglob("*")}
    assert main(command(model, data, folder, "--method", method)) == 0
    assert " is done: 9 steps; the prompt of step " in capsys.readouterr().out
    assert {entry: entry.stat().st_mtime_ns for entry in folder.rglob("*")} == before


def test_a_run_ends_when_patience_does(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,label\nred,x\nblue,y\n")  # the better it learns, the less it expects these
    options = ["--steps", "40", "--interval", "1", "--patience", "3", "--held-out-data", str(other)]
    assert main(command(model, data, tmp_path / "run", *options, "--learning-rate", "0.1")) == 0
    table = list(csv.DictReader(io.StringIO((tmp_path / "run" / "curve.csv").read_text())))
    losses = [float(row["held_out_loss"]) for row in table]
    assert len(losses) < 40 and losses.index(min(losses)) == len(losses) - 4
    result = json.loads((tmp_path / "run" / "tune.json").read_text())["result"]
    assert result["steps"] == len(losses) and result["kept_step"] == len(losses) - 3
    assert f"{len(losses)} steps (of 40: it brought nothing more)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ([], 1, False),
        ([3, 2], 1, False),
        ([3, 2, 2], 1, True),
        ([3, 2, 2], 2, False),
        ([2, 3, 4], 2, True),
        ([2, 3, 4], 0, False),
        ([float("nan")] * 2, 2, True),
        ([float("nan"), 1], 1, False),
        ([1] * 10, 0, True),
    ],
)
def test_patience_counts_intervals_since_the_best(losses: list[float], patience: int, over: bool) -> None:
    points = [curve.Point(step, 1.0, loss, 0.1) for step, loss in enumerate(losses, 1)]
    assert curve.is_over(points, 10, patience) is over


def test_ctrl_c_says_how_to_go_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(model, data, tmp_path / "run")
    usual = training.prompt_model

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "prompt_model", interrupt)
    assert main(arguments) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setattr(training, "prompt_model", usual)
    monkeypatch.setattr(training, "train", interrupt)
    assert main(arguments) == 130
    assert "stopped; the same command goes on from the last interval" in capsys.readouterr().err


def test_a_text_is_learned_in_blocks_and_its_end_is_held_out(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Soft prompts are rows of numbers. " * 20)
    options = ["--max-length", "32", "--method", "prompt-tuning", "--init-text", "rows"]
    assert main(command(model, text, tmp_path / "run", *options, template=None)) == 0
    known = json.loads((tmp_path / "run" / "tune.json").read_text())
    blocks = [[0, *map(int, row)] for row in byte_ids(text.read_text(), model).unfold(0, 31, 31)]
    assert len(blocks) == 21
    held_out = torch.tensor(blocks[-2:])
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        logits = base(held_out).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert known["held_out_loss_without_prompt"] == pytest.approx(float(expected), rel=1e-5)


def byte_ids(text: str, model: Path) -> torch.Tensor:
    """By the model's vocabulary, without its tokenizer's code."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return torch.tensor([vocabulary["Ġ" if letter == " " else "Ċ" if letter == "\n" else letter] for letter in text])


# Rows and templates


def test_the_answer_and_what_ends_a_text_are_learned(model: Path) -> None:
    writer = PlainWriter(TextTemplate(r"A {text}{{!}}\nB: {label}."), load_tokenizer(str(model)))
    row = writer.row({"text": "cat", "label": "7"})
    assert row["input_ids"] == [0, *byte_ids("A cat{!}\nB: 7.", model).tolist(), END]
    answer = [*byte_ids(" 7.", model).tolist(), END]
    assert row["labels"] == [-100] * (len(row["input_ids"]) - len(answer)) + answer
    assert row["input_ids"][: -len(answer)] == writer.question({"text": "cat"})


def test_rows_of_cpt_have_the_same_words_and_type_codes(model: Path) -> None:
    writer = CPTWriter(TextTemplate(r"A {text} B\nC: {label}."), load_tokenizer(str(model)))
    row = writer.row({"text": "cat", "label": "7"})
    assert row["input_ids"] == [*byte_ids("A cat B\nC: 7.", model).tolist(), END]
    assert row["labels"] == [-100] * (len(row["input_ids"]) - 4) + row["input_ids"][-4:]
    assert row["input_type_mask"] == [1] + [2] * 4 + [3] * 5 + [4] * 4  # "A", " cat", " B\nC:", " 7." and its end
    assert row["input_ids"][:-4] == writer.question({"text": "cat"})


def test_rows_of_csv_and_json_lines_are_the_same(tmp_path: Path) -> None:
    rows = [{"text": 'a "b", c\nd', "label": "1"}, {"text": "é", "label": "0.5"}]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    lines.write_text('{"text": "a \\"b\\", c\\nd", "label": 1}\n\n{"text": "é", "label": 0.5}\n', encoding="utf-8-sig")
    table.write_text('label,other,text\r\n1,,"a ""b"", c\nd"\r\n0.5,x,é\r\n', encoding="utf-8-sig")
    for path, places in ((lines, [1, 3]), (table, [3, 4])):
        found = Source.read(path).rows(["text", "label"])
        assert [row.fields for row in found] == rows
        assert [row.place for row in found] == [f"{path}, line {place}" for place in places]


ROW = b'{"text": "a", "label": "b"}\n'
COLUMNS = "expected the columns 'text', 'label' of the template, got 'text', 'name'"
BAD = [
    ("a.jsonl", b"", "--data: expected text in 'a.jsonl', got an empty file"),
    ("a.jsonl", b" \n\n", "--data: expected text in 'a.jsonl', got an empty file"),
    ("a.tsv", b"text\tlabel", "--data: expected a file that ends in .jsonl, .csv, .txt, got 'a.tsv'"),
    ("missing.jsonl", None, "--data: expected a file, got 'missing.jsonl': No such file"),
    ("a.jsonl", ROW + b'{"text": "\xff"}', "a.jsonl, line 2: expected UTF-8 text, got byte 0xff"),
    ("a.jsonl", ROW + b'\n{"text"', "a.jsonl, line 3: expected a JSON object, but it cannot be"),
    ("a.jsonl", b'["a", "b"]', 'a.jsonl, line 1: expected a JSON object, got \'["a", "b"]\''),
    ("a.jsonl", b'{"text": "a", "name": "b"}', f"a.jsonl, line 1: {COLUMNS}"),
    ("a.jsonl", b'{"text": "a", "label": null}', "line 1: column 'label': expected a text or a number, got null"),
    ("a.jsonl", b'{"text": ["a"], "label": 1}', "line 1: column 'text': expected a text or a number, got [\"a\"]"),
    ("a.jsonl", b'{"text": "a", "label": " "}', "a.jsonl, line 1: column 'label': expected a text, got none"),
    ("a.jsonl", ROW, "--data: expected at least two rows, one to be held out, got 1"),
    (
        "a.jsonl",
        ROW + b'{"text": "' + b"x" * 300 + b'", "label": 1}',
        "a.jsonl, line 2: expected at most --max-length 256 tokens, got 317",
    ),
    ("a.csv", b"text,label\n", "a.csv: expected rows, got the names of columns alone"),
    ("a.csv", b"text,name\na,b\n", f"a.csv, line 2: {COLUMNS}"),
    ("a.csv", b"text,label\na,b\nc\n", "a.csv, line 3: expected 2 columns, as in the first line, got 1"),
    ("a.csv", b'text,label\na,"b\n', "a.csv, line 2: expected CSV, but it cannot be read: unexpected end of data"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_data_is_told_with_its_line_and_nothing_is_written(
    name: str, content: bytes | None, message: str, model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    assert message in refusal(command(model, Path(name), Path("run")), capsys)
    assert not Path("run").exists()


def refusal(arguments: list[str], capsys: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--template", "Word: text"], "--template: expected a column in braces, such as {label}, got 'Word: text'"),
        (["--template", "{text} {"], "--template: expected columns in braces, got '{text} {': Single '{'"),
        (["--template", "{} {label}"], "--template: expected names of columns in braces"),
        (["--template", "{label}: {label}"], "--template: expected the last column, the answer, nowhere else"),
        (["--init-text", "hello"], "--init-text: expected with --method prompt-tuning or prefix, got it with p-tuning"),
        (["--method", "cpt", "--examples", "27"], "--examples: expected less than 27, the rows to train on, got 27"),
        (["--virtual-tokens", "150"], "--virtual-tokens + the longest row: expected at most the model's 160 positions"),
        (
            ["--max-length", "9", "--skip-long"],
            "--max-length: expected rows of at most 9 tokens, got longer ones alone",
        ),
        (
            ["--model", "no/such/model"],
            "--model: expected a causal language model with a tokenizer, got 'no/such/model'",
        ),
        (["--steps", "0"], "--steps: expected a positive integer, got '0'"),
        (["--held-out", "1"], "--held-out: expected a number between 0 and 1, got '1'"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, got 'nan'"),
        (["--patience", "-1"], "--patience: expected an integer >= 0, got '-1'"),
        (["--data", "TEXT"], "--template: expected none with a text, --data"),
        (["--out", "DATA"], "--out: expected a folder, got the file"),
        (["--out", "FULL"], "--out: expected a new or empty folder, or that of a run, got"),
    ],
)
def test_wrong_arguments_are_named(
    more: list[str], message: str, model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "text.txt").write_text("text " * 100)
    places = {"TEXT": tmp_path / "text.txt", "DATA": data, "FULL": tmp_path / "full"}
    arguments = command(model, data, tmp_path / "run", *(str(places.get(word, word)) for word in more))
    assert message in refusal(arguments, capsys)
    assert not (tmp_path / "run").exists() and len(list((tmp_path / "full").iterdir())) == 1


@pytest.mark.parametrize("method", ["p-tuning", "cpt"])
def test_rows_need_a_template_and_a_text_takes_none(method: str, model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("text " * 100)
    (tmp_path / "rows.csv").write_text("text,label\na,b\nc,d\n")
    table = command(model, tmp_path / "rows.csv", tmp_path / "run", "--method", method, template=None)
    assert "--template: expected a text with columns of" in refusal(table, capsys)
    if method == "cpt":
        text = command(model, tmp_path / "text.txt", tmp_path / "run", "--method", method, template=None)
        assert "--method: expected another one than cpt with a text" in refusal(text, capsys)


def test_another_run_is_not_gone_on_with(
    done: tuple[str, Path], model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    method, folder = done
    before, other = files(folder), tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes() + data.read_bytes())
    arguments = command(model, other, folder, "--method", method, "--steps", "11", "--batch-size", "4")
    told = refusal(arguments, capsys)
    assert "holds another run, with another data; steps 9, not 11. Choose another folder" in told
    assert files(folder) == before


def test_a_folder_that_a_run_is_at_work_in_is_left_to_it(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    with settings.alone_in(tmp_path / "run"):
        told = refusal(command(model, data, tmp_path / "run"), capsys)
    assert "--out: expected a folder that no other run is at work in, got" in told
    assert list((tmp_path / "run").iterdir()) == []


def test_a_loss_that_is_never_finite_is_told(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--learning-rate", "1e38", "--steps", "3", "--interval", "1", "--method", "prompt-tuning"]
    told = refusal(command(model, data, tmp_path / "run", *options), capsys)
    assert "--learning-rate: expected one with which the held-out loss stays finite, got 1e+38" in told


def test_long_rows_are_left_out_and_counted(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(data.read_text() + json.dumps({"text": "x" * 300, "label": "x"}) + "\n")
    assert (
        main(command(model, rows, tmp_path / "run", "--skip-long", "--steps", "1", "--held-out-data", str(data))) == 0
    )
    assert "30 rows to train on, 30 held out, 1 left out because they are too long." in capsys.readouterr().out
