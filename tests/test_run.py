"""`python -m fusedprompt run`: a script runs as Python runs it, and PEFT's models in it on these ops and routes."""

from __future__ import annotations

import copy
import gc
import io
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model

import fusedprompt
from fusedprompt import RouteUnavailable
from fusedprompt.commands.run.models import Models
from fusedprompt.integrations import creation
from fusedprompt.integrations import peft as integration
from fusedprompt.integrations.peft import patch_of
from models import build, tokens
from pages import ROOT
from word_tokenizers import word_tokenizer

SCRIPTS = Path(__file__).with_name("scripts")
REPORT = "fusedprompt run: "


def python(*arguments: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def without_report(text: str) -> str:
    """Standard error up to the report, and what follows it: the traceback of an error."""
    return re.sub(rf"^{REPORT}.*\n", "", text, flags=re.MULTILINE)


# As Python would


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script that tells of itself and ends as its first argument says, a module that does the same, and others."""
    place = tmp_path_factory.mktemp("run")
    text = '''"""What this is."""
import os
import signal
import sys

import neighbour

def fail():
    raise RuntimeError("in a function")

class Odd(Exception):
    pass

names = sorted(set(globals()) - {"__annotations__"})
print(__name__, __file__, __doc__, __package__, names, neighbour.__name__)
print(sys.modules["__main__"].__dict__ is globals(), sys.argv, sys.path[0])
try:
    for_annotations: "not a name here" = 1
    assert "typing" not in sys.modules or True
finally:
    how = sys.argv[1] if len(sys.argv) > 1 else ""
if how == "raise":
    fail()
elif how == "chain":
    try:
        fail()
    except RuntimeError as error:
        raise Odd("another") from error
elif how == "exit":
    sys.exit(int(sys.argv[2]))
elif how == "words":
    sys.exit("some words")
elif how == "hook":
    import traceback
    sys.excepthook = lambda kind, error, trace: print(
        "hooked", [one.lineno for one in traceback.extract_tb(trace) if "runpy" not in one.filename])
    fail()
elif how in ("SIGINT", "SIGTERM", "SIGKILL"):
    os.kill(os.getpid(), getattr(signal, how))
elif how == "atexit":
    import atexit
    atexit.register(lambda: print("at exit", for_annotations))
'''
    (place / "deep").mkdir()
    (place / "deep" / "script.py").write_text(text)
    (place / "deep" / "neighbour.py").write_text("")
    (place / "neighbour.py").write_text("")
    (place / "wrong.py").write_text("x = 1\nif x\n")
    (place / "package").mkdir()
    (place / "package" / "__init__.py").write_text("")
    (place / "package" / "__main__.py").write_text(text)
    return place


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--fix", "-m", "--help"],
        ["raise"],
        ["chain"],
        ["exit", "0"],
        ["exit", "7"],
        ["words"],
        ["hook"],
        ["SIGINT"],
        ["SIGTERM"],
        ["atexit"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("how", [["deep/script.py"], ["-m", "package"]], ids=["script", "module"])
def test_a_script_and_its_end_are_what_python_makes_of_them(folder: Path, how: list[str], arguments: list[str]) -> None:
    plain = python(*how, *arguments, cwd=folder)
    ours = python("-m", "fusedprompt", "run", *how, *arguments, cwd=folder)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    expected = plain.stderr
    if how[0] == "-m":  # Python shows its own runpy
        expected = re.sub(r'  File "<frozen runpy>".*\n', "", expected)
    assert without_report(ours.stderr) == expected
    killed = arguments == ["SIGTERM"]
    assert ours.stderr.count(REPORT) == (not killed)


def test_an_error_of_syntax_is_shown_as_python_shows_it(folder: Path) -> None:
    plain, ours = python("wrong.py", cwd=folder), python("-m", "fusedprompt", "run", "wrong.py", cwd=folder)
    assert (ours.returncode, without_report(ours.stderr)) == (plain.returncode, plain.stderr)


def test_a_console_script_finds_the_script_s_neighbours_and_not_its_own(folder: Path) -> None:
    code = "import sys; from fusedprompt.__main__ import console; sys.path.insert(0, '/nowhere'); console()"
    ours = python("-c", code, "run", "deep/script.py", cwd=folder)
    assert ours.stdout == python("deep/script.py", cwd=folder).stdout


def test_nothing_heavy_is_imported_before_the_script(folder: Path) -> None:
    """Programs set HF_HOME and the like before they import transformers."""
    script = folder / "light.py"
    script.write_text(
        "import sys\nprint({'torch', 'transformers', 'peft', 'huggingface_hub', 'numpy'} & set(sys.modules))\n"
    )
    assert python("-m", "fusedprompt", "run", "--backend", "reference", script, cwd=folder).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a script, or -m MODULE"),
        (["missing.py"], "script: expected a file, got 'missing.py'"),
        (["--backend", "fast", "deep/script.py"], "argument --backend: invalid choice: 'fast'"),
        (["--route", "long", "deep/script.py"], "argument --route: invalid choice: 'long'"),
        (["-m"], "expected a script, or -m MODULE"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, arguments: list[str], message: str) -> None:
    process = python("-m", "fusedprompt", "run", *arguments, cwd=folder)
    assert process.returncode == 2 and message in process.stderr and not process.stdout


# Scripts of the kinds that people have, each by PEFT alone and here


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and tokenizers, as folders for `from_pretrained`."""
    place = tmp_path_factory.mktemp("offline")
    for name, family, task, words in (
        ("causal", "Llama", "CAUSAL_LM", "gpt2"),
        ("seq2seq", "T5", "SEQ_2_SEQ_LM", "gpt2"),
        ("classifier", "Bert", "SEQ_CLS", "bert"),
    ):
        build(family, task).save_pretrained(place / name)
        word_tokenizer(words).save_pretrained(place / name)
    return place


def results(process: subprocess.CompletedProcess[str]) -> list[str]:
    assert process.returncode == 0, process.stderr
    return [line for line in process.stdout.splitlines() if line.startswith("RESULT")]


def assert_same_results(ours: list[str], plain: list[str]) -> None:
    """The same words, and numbers to three digits: sums in another order may round otherwise."""
    number = re.compile(r"-?\d+\.\d+")
    assert plain and [number.sub("#", line) for line in ours] == [number.sub("#", line) for line in plain]
    for mine, theirs in zip(number.findall(" ".join(ours)), number.findall(" ".join(plain))):
        assert float(mine) == pytest.approx(float(theirs), rel=2e-3, abs=2e-4), (ours, plain)


CASES = [
    ("complaints.py", "causal", ["prompt"], "PROMPT_TUNING, 8 virtual tokens", "route shared where it pays"),
    ("complaints.py", "causal", ["prefix"], "PREFIX_TUNING, 30 virtual tokens", "route prefix"),
    ("headlines.py", "seq2seq", [], "PROMPT_TUNING, 20 virtual tokens", "PeftModelForSeq2SeqLM"),
    (
        "two_tasks.py",
        "seq2seq",
        [],
        "MULTITASK_PROMPT_TUNING, 10 virtual tokens for each of 2 tasks",
        "each of 1 tasks",
    ),
    ("context.py", "causal", [], "CPT, ", "CPT reads its loss's settings"),
]


@pytest.mark.parametrize(
    ("script", "model", "options", "shown", "also"), CASES, ids=[" ".join([case[0], *case[2]]) for case in CASES]
)
def test_a_script_gets_peft_s_results_on_our_ops(
    offline: Path, tmp_path: Path, script: str, model: str, options: list[str], shown: str, also: str
) -> None:
    plain = python(SCRIPTS / script, offline / model, tmp_path / "plain", *options, cwd=tmp_path)
    command = ["-m", "fusedprompt", "run", SCRIPTS / script, offline / model, tmp_path / "ours", *options]
    ours = python(*command, cwd=tmp_path)
    assert_same_results(results(ours), results(plain))
    report = ours.stderr[ours.stderr.index(REPORT) :]
    assert report.count(REPORT) == 1 and shown in report and also in report
    assert "prompt learning patched" in report and "is as PEFT made it" not in report
    assert "fusedprompt" not in plain.stderr


def test_processes_of_a_launcher_give_one_report(offline: Path, tmp_path: Path) -> None:
    """torchrun starts two; `accelerate launch` starts one where there is no GPU."""
    script, one = SCRIPTS / "paraphrases.py", {"OMP_NUM_THREADS": "1"}
    ours = ["-m", "fusedprompt", "run", script, offline / "classifier"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", "29618"]
    plain = python(*torchrun, script, offline / "classifier", tmp_path / "plain", cwd=tmp_path, **one)
    patched = python(*torchrun, *ours, tmp_path / "ours", cwd=tmp_path, **one)
    assert_same_results(results(patched), results(plain))
    accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launched = python(*accelerate, *ours, tmp_path / "again", cwd=tmp_path, **one)
    assert len(results(launched)) == 3
    for process in (patched, launched):
        assert process.stderr.count(REPORT) == 1 and "2 models with prompt learning patched" in process.stderr
        assert "P_TUNING, 20 virtual tokens, mlp: reference" in process.stderr


def test_a_dry_run_stops_at_the_first_call_and_says_what_would_be_patched(offline: Path, tmp_path: Path) -> None:
    command = ["--dry-run", SCRIPTS / "complaints.py", offline / "causal", tmp_path / "out", "prompt"]
    process = python("-m", "fusedprompt", "run", *command, cwd=tmp_path)
    assert process.returncode == 0 and "RESULT" not in process.stdout and "trainable params" in process.stdout
    assert "1 model with prompt learning would be patched" in process.stderr
    assert "PROMPT_TUNING, 8 virtual tokens, splice: reference" in process.stderr and not (tmp_path / "out").exists()


# What becomes of models


@pytest.fixture
def models() -> Iterator[Models]:
    """As in a program that has imported PEFT."""
    made = Models("auto", "auto", False, False)
    end = creation.watch(made._serve)
    yield made
    end()
    assert not creation._watchers and not creation._replaced


def prompt(length: int = 5) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)


def test_models_are_patched_wherever_they_are_made_and_others_are_left(models: Models, tmp_path: Path) -> None:
    class Mine(peft.PeftModelForCausalLM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.was_patched = patch_of(self) is not None

    made = get_peft_model(build("Llama"), prompt())
    made.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("Llama"), tmp_path, low_cpu_mem_usage=True)
    by_class, mine = peft.PeftModelForCausalLM(build("Llama"), prompt()), Mine(build("Llama"), prompt())
    lora = peft.get_peft_model(build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(TypeError):
        peft.PeftModelForCausalLM(build("Llama"), prompt(), no_such_argument=True)
    patched = [patch_of(model) is not None for model in (made, loaded, by_class, mine, lora)]
    assert patched == [True, True, True, True, False] and mine.was_patched
    assert (
        models.report().splitlines()[0].endswith("4 models with prompt learning patched; left as they are: 1 of LORA")
    )
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, made(input_ids=tokens()).logits)
    assert "from_pretrained" in vars(peft.PeftModel) and peft.PeftModel.__init__.__wrapped__


def test_a_patch_of_the_program_s_own_takes_the_place_of_ours(models: Models) -> None:
    made = get_peft_model(build("Llama"), prompt())
    with pytest.raises(RouteUnavailable):  # and the model stays as it was
        fusedprompt.apply(get_peft_model(build("Bert", "SEQ_CLS"), prompt_of("SEQ_CLS")), route="shared")
    assert patch_of(made).automatic and patch_of(copy.deepcopy(made)).automatic
    fusedprompt.apply(made, route="splice")
    with pytest.raises(ValueError, match="expected a model that is not patched"):
        fusedprompt.apply(made)
    integration.enable(route="splice")
    try:
        other = get_peft_model(build("Llama"), prompt())
    finally:
        integration.disable()
    third = get_peft_model(build("Llama"), prompt())
    patch_of(third).revert()
    assert patch_of(other).route == "auto"
    text = models.report()
    assert "route splice (asked for)" in text and "PeftModelForCausalLM: the program reverted the patch" in text


def prompt_of(task: str) -> Any:
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5)


@pytest.mark.filterwarnings("ignore:.*position ids")
def test_models_that_are_gone_are_told_of_and_not_kept(models: Models) -> None:
    for length in (4, 4, 6):
        made = get_peft_model(build("Llama"), prompt(length))
        made(input_ids=tokens(), position_ids=tokens())
        watched = weakref.ref(made)
        del made
        gc.collect()
        assert watched() is None
    text = models.report()
    assert text.count("fusedprompt on PeftModelForCausalLM") == 2 and "2 times: fusedprompt on" in text
    assert "which is gone" in text and text.count("calls that went to PEFT: PEFT ignores position_ids") == 2


def test_an_error_of_ours_is_reported_and_does_not_reach_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models("triton", "auto", False, False)
    end = creation.watch(models._serve)
    try:
        assert patch_of(get_peft_model(build("Llama"), prompt())) is None
        monkeypatch.setattr(peft, "__version__", "0.99.0")
        assert patch_of(get_peft_model(build("Llama"), prompt())) is None
    finally:
        end()
    text = models.report()
    assert text.startswith("fusedprompt run: 0 models with prompt learning patched")
    assert "PeftModelForCausalLM is as PEFT made it: BackendUnavailable: backend 'triton' of op 'splice'" in text
    assert "RuntimeError: fusedprompt.apply: expected peft >= 0.17 and < 0.22, got 0.99.0" in text


def test_other_ranks_and_children_print_nothing(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    models.print_report()
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    models.print_report()
    assert capsys.readouterr() == ("", "")


def test_a_report_that_fails_is_a_line(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(models, "report", lambda: 1 // 0)
    monkeypatch.setattr(sys, "__stderr__", written)
    models.print_report()
    assert written.getvalue() == "fusedprompt run: no report: ZeroDivisionError: integer division or modulo by zero\n"
