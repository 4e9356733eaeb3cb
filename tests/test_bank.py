"""A bank's folder and memory: what is added comes back, whatever dies, runs at the same time or is damaged."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedprompt as fp
from fusedprompt.bank.folder import INDEX, ROWS, BankFolder
from models import VOCAB, WIDTH, build, config_fields, ours, pair

pytestmark = pytest.mark.filterwarnings("ignore:.*is left out")
ROOT = Path(__file__).resolve().parents[1]
FIRST = 128  # ids begin at the next power of two above the 67 tokens


def rows_of(value: float, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, D), all of one value, which is exact in every dtype."""
    return torch.full((count, WIDTH), value, dtype=dtype)


@pytest.fixture(scope="module")
def base() -> Any:
    return build("Llama")


@pytest.fixture
def bank(base: Any, tmp_path: Path) -> fp.PromptBank:
    return fp.PromptBank(tmp_path / "bank", base)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def file_of(bank: fp.PromptBank, name: str) -> Path:
    return bank._folder.file(bank._version(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_added_comes_back_bit_for_bit_from_another_process_view(base: Any, tmp_path: Path, dtype: Any) -> None:
    given = {name: torch.randn(count, WIDTH).to(dtype) for name, count in (("a", 1), ("b", 7), ("team/c d", 3))}
    bank = fp.PromptBank(tmp_path, base)
    for name, rows in given.items():
        bank.add(name, rows)
    again = fp.PromptBank(tmp_path)  # needs no base model
    assert again.names == [*given] and len(again) == 3 and "b" in again and "d" not in again
    assert (again.vocabulary, again.width, again.first_id) == (VOCAB, WIDTH, FIRST)
    for name, rows in given.items():
        for found in (bank.rows(name), again.rows(name)):
            assert found.dtype == dtype and torch.equal(found, rows)
    assert [again.ids(name) for name in given] == [[128], [*range(129, 136)], [136, 137, 138]]
    assert fp.PromptBank(tmp_path, base, max_bytes=0).rows("a").equal(given["a"])


def test_opening_reads_no_rows(bank: fp.PromptBank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.add_all({str(index): rows_of(index) for index in range(50)})
    reads = list[str]()
    original = BankFolder.read_rows
    monkeypatch.setattr(
        BankFolder, "read_rows", lambda self, entry, width: reads.append(entry.name) or original(self, entry, width)
    )
    again = fp.PromptBank(bank.folder)
    assert len(again.names) == 50 and again.ids("49") and reads == []
    assert again.rows("7").eq(7).all() and reads == ["7"]


def test_a_tensor_that_changes_after_it_was_added_changes_nothing(bank: fp.PromptBank) -> None:
    rows = rows_of(1.0)
    bank.add("a", rows)
    rows.zero_()
    assert bank.rows("a").eq(1).all() and fp.PromptBank(bank.folder).rows("a").eq(1).all()


# Versions


def test_no_two_versions_of_any_prompts_share_an_id_whatever_is_removed_purged_or_opened_again(
    bank: fp.PromptBank,
) -> None:
    seen = set[int]()
    for turn in range(6):
        for name in ("a", "b"):
            bank.add(name, rows_of(turn, 2 + turn))
            ids = bank.ids(name)
            assert len(ids) == 2 + turn and min(ids) >= FIRST and not seen & {*ids}
            seen |= {*ids}
        bank.remove("b")
        if turn % 2:
            bank.purge()
        if turn % 3 == 2:
            bank = fp.PromptBank(bank.folder)


def test_ids_of_past_versions_answer_until_purge(bank: fp.PromptBank) -> None:
    bank.add("a", rows_of(1.0))
    old = torch.tensor(bank.ids("a"))
    bank.add("a", rows_of(2.0, 6))
    bank.add("b", rows_of(3.0))
    new, other = torch.tensor(bank.ids("a")), torch.tensor(bank.ids("b"))
    bank.remove("b")
    mixed = torch.cat((new[3:], old[1:2], other, old[:1], new[3:4]))
    found = bank._look_up(mixed, torch.device("cpu"))
    assert found[:, 0].tolist() == [2.0] * 3 + [1.0] + [3.0] * 4 + [1.0, 2.0]
    before = len([*(bank.folder / ROWS).iterdir()])
    bank.purge()
    assert (before, len([*(bank.folder / ROWS).iterdir()])) == (3, 1)
    assert bank._look_up(new, torch.device("cpu")).eq(2).all()
    for gone in (old, other, torch.tensor([FIRST - 1]), torch.tensor([10**9])):
        with pytest.raises(IndexError, match=f"input_ids: expected .* got {int(gone.min())}"):
            bank._look_up(gone, torch.device("cpu"))
    assert bank.nbytes() == new.numel() * WIDTH * 4


def test_two_banks_of_one_folder_write_in_turn_and_see_each_other(bank: fp.PromptBank) -> None:
    other = fp.PromptBank(bank.folder)
    for turn in range(4):
        (bank, other)[turn % 2].add(f"p{turn}", rows_of(turn))
    assert "p3" not in bank  # it has written p2 since
    bank.refresh()
    assert bank.names == other.names == ["p0", "p1", "p2", "p3"]
    ids = [one for turn in range(4) for one in bank.ids(f"p{turn}")]
    assert len({*ids}) == 16 and [other.ids(f"p{turn}") for turn in range(4)] == [ids[i : i + 4] for i in (0, 4, 8, 12)]
    assert all(bank.rows(f"p{turn}").eq(turn).all() for turn in range(4))


def test_four_banks_of_one_folder_write_at_the_same_time_and_lose_nothing(bank: fp.PromptBank) -> None:
    """Each with a view of its own, as in four processes; the lock is between open files, and so between these too."""
    wrong = list[str]()

    def write(number: int) -> None:
        draw, own = random.Random(number), fp.PromptBank(bank.folder)
        try:
            for turn in range(25):
                name, rows = f"{number}-{turn % 3}", rows_of(100 * number + turn, 1 + turn % 3)
                own.add(name, rows)
                if draw.random() < 0.2:
                    own.purge()
                own.refresh()
                if not torch.equal(own.rows(name), rows):
                    wrong.append(name)
        except Exception as error:
            wrong.append(repr(error))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert wrong == []
    again = fp.PromptBank(bank.folder)
    ids = [one for name in again.names for one in again.ids(name)]
    assert len(again) == 12 and len(ids) == len({*ids}) and not again.skipped
    for number in range(4):
        assert [float(again.rows(f"{number}-{turn % 3}")[0, 0]) for turn in (22, 23, 24)] == [
            100 * number + turn for turn in (22, 23, 24)
        ]


# Memory


def test_the_least_recently_used_go_first_and_memory_stays_below_its_limit(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * WIDTH * 4
    bank = fp.PromptBank(tmp_path, base, max_bytes=2 * size + size // 2)
    bank.add_all({name: rows_of(ord(name)) for name in "abcd"})
    reads = list[str]()
    original = BankFolder.read_rows
    monkeypatch.setattr(
        BankFolder, "read_rows", lambda self, entry, width: reads.append(entry.name) or original(self, entry, width)
    )
    for name in "abacab":  # b is read again: a was used after it when c came
        assert bank.rows(name).eq(ord(name)).all()
        assert bank.nbytes() <= bank.max_bytes
    assert "".join(reads) == "abcb"
    held = bank.rows("a")
    bank.prefetch("cd")
    assert "".join(reads) == "abcbcd" and bank.nbytes() == 2 * size
    assert held.eq(ord("a")).all()  # whoever has rows keeps them
    bank.add("wide", rows_of(5.0, 40))
    assert bank.rows("wide").eq(5).all() and bank.nbytes() <= 2 * size + size // 2


def test_eight_readers_and_a_writer_never_see_a_mixture_of_versions(base: Any, tmp_path: Path) -> None:
    """Version v has 2 + v % 5 rows of v: any mixture shows."""
    bank = fp.PromptBank(tmp_path, base, max_bytes=6 * WIDTH * 4)  # one version at most, if at all
    names, wrong, done = ["a", "b"], list[str](), threading.Event()
    for name in names:
        bank.add(name, rows_of(0.0, 2))

    def read(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not done.is_set():
                name = draw.choice(names)
                rows, ids = bank.rows(name), torch.tensor(bank.ids(name))
                time.sleep(draw.random() / 1000)
                found = bank._look_up(ids, torch.device("cpu"))
                for one in (rows, found):
                    value = float(one[0, 0])
                    if not one.eq(value).all() or len(one) != 2 + value % 5:
                        wrong.append(f"{name}: {one[:, 0].tolist()}")
        except Exception as error:
            wrong.append(repr(error))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for reader in readers:
        reader.start()
    for version in range(1, 61):
        bank.add(names[version % 2], rows_of(version, 2 + version % 5))
        if version % 20 == 0:
            bank.add("c", rows_of(version))
            bank.remove("c")
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert bank.rows("a")[0, 0] == 60 and bank.rows("b")[0, 0] == 59


# Files that are damaged, and writers that die

DYING = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import fusedprompt as fp
from fusedprompt.methods import checkpoint
from fusedprompt.bank import folder as files

def value(name, version):
    return torch.full((1 + version % 3, {width}), float(version) + (100.0 if name == "b" else 0.0))

def write(path, die_at):
    calls = [0]
    def counted(function):
        def run(*args, **kwargs):
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return run
    for name in ("replace", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.write_tensors = counted(checkpoint.write_tensors)
    bank = fp.PromptBank(path)
    start = 1 + max([int(bank.rows(name)[0, 0]) % 100 for name in bank.names], default=0)
    for version in range(start, start + (2 if die_at else 10**6)):
        for name in ("a", "b"):
            bank.add(name, value(name, version % 100))
        if version % 4 == 0:
            bank.purge()

path, draw, killed = sys.argv[1], random.Random(0), 0
for attempt in range(1, 41):
    child = os.fork()
    if not child:
        try:
            write(path, 0 if attempt % 4 == 0 else attempt)
        finally:
            os._exit(0)
    if attempt % 4 == 0:
        time.sleep(draw.random() * 0.05)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    bank = fp.PromptBank(path)
    assert not bank.skipped, bank.skipped
    for name in bank.names:
        rows = bank.rows(name)
        version = int(rows[0, 0]) % 100
        assert torch.equal(rows, value(name, version)), (attempt, name, rows)
print(killed, len(bank))
"""


def test_a_folder_whose_writers_are_killed_at_any_point_is_readable_and_can_be_written(
    bank: fp.PromptBank,
) -> None:
    code = DYING.format(root=str(ROOT), width=WIDTH)
    run = subprocess.run([sys.executable, "-c", code, str(bank.folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    killed, count = map(int, run.stdout.split())
    assert killed > 20 and count == 2
    bank.add("after", rows_of(7.0))
    assert fp.PromptBank(bank.folder).rows("after").eq(7).all()
    bank.purge()
    assert len([*(bank.folder / ROWS).iterdir()]) == 3  # nothing of the dead is left


def test_a_line_that_was_cut_off_anywhere_is_left_out_and_the_next_one_is_whole(bank: fp.PromptBank) -> None:
    bank.add("a", rows_of(1.0))
    index = bank.folder / INDEX
    before = index.read_bytes()
    bank.add("b", rows_of(2.0))
    after = index.read_bytes()
    for end in range(len(before), len(after), 7):
        index.write_bytes(after[:end])
        torn = fp.PromptBank(bank.folder)
        assert torn.names == ["a"] and torn.skipped == {}
        torn.add("c", rows_of(3.0))
        again = fp.PromptBank(bank.folder)
        assert again.names == ["a", "c"] and again.rows("c").eq(3).all()


def test_a_damaged_prompt_is_named_and_the_others_are_read(bank: fp.PromptBank) -> None:
    for name in ("short", "gone", "flipped", "whole"):
        bank.add(name, rows_of(1.0))
    for name in ("short", "flipped"):
        data = bytearray(file_of(bank, name).read_bytes())
        data[-9] ^= 64
        file_of(bank, name).write_bytes(data[: len(data) - (name == "short")])
    file_of(bank, "gone").unlink()
    with pytest.warns(UserWarning, match="'short' is left out: .*1.safetensors: expected"):
        again = fp.PromptBank(bank.folder)
    assert again.names == ["flipped", "whole"] and again.skipped.keys() == {"short", "gone"}
    assert again.rows("whole").eq(1).all()
    with pytest.raises(ValueError, match=r"the prompt 'flipped' \(version 3\): expected .*3.safetensors to hold"):
        again.rows("flipped")
    with pytest.raises(ValueError, match=r"'gone': .*2.safetensors: expected .* but it is not there"):
        again.rows("gone")
    again.add("gone", rows_of(4.0))
    assert again.rows("gone").eq(4).all() and again.skipped.keys() == {"short"}


def test_a_line_that_says_nothing_known_is_named_and_the_others_are_read(bank: fp.PromptBank) -> None:
    bank.add("a", rows_of(1.0))
    index = bank.folder / INDEX
    head, line = index.read_text().splitlines()
    evil = json.loads(line)
    for number, fields in enumerate(
        [{"serial": "../../../evil"}, {"name": "\n"}, {"rows": 0}, {"dtype": "object"}, {"more": 1}]
    ):
        broken = {"add": {**evil["add"], "name": f"b{number}", **fields}}
        index.write_text(f"{head}\n{json.dumps(broken)}\n{line}\nnonsense\n")
        with pytest.warns(UserWarning, match="line 2 of index.jsonl"):
            again = fp.PromptBank(bank.folder)
        assert again.names == ["a"] and again.skipped.keys() == {f"line {n} of {INDEX}" for n in (2, 4)}
    index.write_text("{}\n")
    with pytest.raises(ValueError, match="expected a bank's index, but line 1"):
        fp.PromptBank(bank.folder)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "..", "a/../../b", "~/x", "C:\\x", "a@1", "ü 漢字"])
def test_no_name_leads_out_of_the_folder(bank: fp.PromptBank, name: str) -> None:
    parent = bank.folder.parent
    bank.add(name, rows_of(1.0))
    assert {*files_of(parent)} == {"bank/" + file for file in (INDEX, "lock", f"{ROWS}/1.safetensors")}
    assert fp.PromptBank(bank.folder).rows(name).eq(1).all()


@pytest.mark.parametrize("name", ["", "a\nb", "<a>", "__base__", "x" * 201, None, 3])
def test_names_that_could_not_be_told_from_others_are_refused(bank: fp.PromptBank, name: Any) -> None:
    before = files_of(bank.folder)
    with pytest.raises((TypeError, ValueError), match="name: expected"):
        bank.add(name, rows_of(1.0))
    assert files_of(bank.folder) == before


# Where prompts come from

METHODS = ("PROMPT", "MLP", "LSTM", "CPT", "MULTITASK")


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_pefts_folder_are_what_peft_puts_in_front(bank: fp.PromptBank, tmp_path: Path, method: str) -> None:
    theirs, mine = pair("Llama", "CAUSAL_LM", method)
    theirs.save_pretrained(tmp_path / "peft")
    tasks = (0, 2) if method == "MULTITASK" else (None,)
    for task in tasks:
        ids = None if task is None else torch.tensor([task])
        expected = theirs.get_prompt(batch_size=1, **({} if ids is None else {"task_ids": ids}))[0].detach()
        bank.add("folder", tmp_path / "peft", task_id=task)
        if method == "CPT":  # PEFT projects what it has projected once more, which changes last bits
            torch.testing.assert_close(bank.rows("folder"), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(bank.rows("folder"), expected)
        mine.train()  # dropout, if there were any, would not be saved
        bank.add("model", mine, adapter_name="default", task_id=task)
        assert torch.equal(bank.rows("model"), mine.eval().prompt_rows("default", task).detach())


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_our_folder_are_those_of_the_model(bank: fp.PromptBank, tmp_path: Path, method: str) -> None:
    model = ours("Llama", method=method)
    model.save_pretrained(tmp_path / "ours")
    task = 1 if method == "MULTITASK" else None
    bank.add("a", str(tmp_path / "ours"), task_id=task)
    assert torch.equal(bank.rows("a"), model.prompt_rows(None, task).detach())


def test_cpt_rows_that_are_not_seen_are_left_out(bank: fp.PromptBank, tmp_path: Path) -> None:
    _, fields = config_fields("CPT")
    config = fp.CPTConfig(**{**fields, "cpt_mask": [0, 1, 1, 0, 1, 1, 1, 1]}, use_cpt_mask=True)
    model = fp.get_prompt_model(build("Llama"), config)
    model.save_pretrained(tmp_path / "ours")
    bank.add("a", tmp_path / "ours")
    assert bank.rows("a").shape == (6, WIDTH) and torch.equal(bank.rows("a"), model.prompt_rows().detach())


def _template(path: Path) -> None:
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    fp.get_prompt_model(build("Llama"), config, template="[text] [prompt 4]").save_pretrained(path)


def _started(path: Path) -> None:
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    fp.get_prompt_model(build("Llama"), config, prompt_start=1).save_pretrained(path)


def _short_file(path: Path) -> None:
    ours("Llama").save_pretrained(path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prefix": (lambda path: ours("Llama", method="PREFIX").save_pretrained(path), "keys and values of every layer"),
    "cartridge": (lambda path: ours("Llama", method="CARTRIDGE").save_pretrained(path), "keys and values of every"),
    "head": (lambda path: ours("Llama", "SEQ_CLS").save_pretrained(path), "modules of its own: .*score"),
    "template": (_template, "in front of its text, got one with the template"),
    "start": (_started, "in front of its text, got one with prompt_start=1"),
    "tasks": (lambda path: ours("Llama", method="MULTITASK").save_pretrained(path), "tasks, 0 to 2, got None"),
    "width": (lambda path: ours("Llama", hidden_size=64).save_pretrained(path), r"\(P, D = 32\).*\(4, 64\)"),
    "short": (_short_file, "adapter_model.safetensors: expected a whole safetensors file"),
    "empty": (lambda path: path.mkdir(), "adapter_config.json: no such file"),
}


def test_folders_that_hold_more_or_less_than_rows_are_refused_and_skipped(bank: fp.PromptBank, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    for name, (make, _) in REFUSED.items():
        make(root / name) if name != "empty" else (root / name).mkdir(parents=True)
    before = files_of(bank.folder)
    for name, (_, message) in REFUSED.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            bank.add(name, root / name)
    assert files_of(bank.folder) == before
    ours("Llama").save_pretrained(root / "good")
    with pytest.warns(UserWarning, match="'short' is left out"):
        left_out = bank.add_all(root)
    assert bank.names == ["good"] and left_out.keys() == REFUSED.keys() - {"empty"}
    assert "keys and values" in left_out["prefix"]


def test_other_sources_are_refused_by_name(bank: fp.PromptBank, base: Any, tmp_path: Path) -> None:
    nan = rows_of(1.0).index_fill(0, torch.tensor([1]), float("nan"))
    for source, message in (
        (torch.zeros(4, WIDTH, dtype=torch.int64), "one of .*float64.*, got torch.int64"),
        (torch.zeros(4, WIDTH).to(torch.float8_e5m2), "one of .*float64.*, got torch.float8"),
        (torch.zeros(4, WIDTH + 1), "D = 32"),
        (torch.zeros(WIDTH), "D = 32"),
        (torch.zeros(0, WIDTH), "D = 32"),
        (nan, "expected finite rows"),
        ({"rows": 1}, "source: expected a tensor, a folder or a PromptModel, got dict"),
        (tmp_path / "nowhere", "path: expected the folder of an adapter"),
    ):
        with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
            bank.add("a", source)
    model = ours("Llama")
    for given, message in (
        ({"adapter_name": "other"}, "adapter_name: expected one of .*default.*'other'"),
        ({"task_id": 1}, "task_id: expected None for PROMPT_TUNING, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.add("a", model, **given)
    with pytest.raises(ValueError, match="adapter_name: expected None with a tensor"):
        bank.add("a", rows_of(1.0), adapter_name="default")
    assert bank.names == []
    for call in (bank.rows, bank.ids, bank.remove, lambda name: bank.prefetch([name])):
        with pytest.raises(ValueError, match="name: expected one of the bank's 0 prompts, got 'a'"):
            call("a")


def test_a_bank_says_what_it_needs_of_its_base_model(base: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model: expected a transformers model for a new bank"):
        fp.PromptBank(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="base_model: expected a transformers model with a table"):
        fp.PromptBank(tmp_path / "new", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_bytes: expected an int >= 0"):
        fp.PromptBank(None, base, max_bytes=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="folder: expected a folder"):
        fp.PromptBank(tmp_path / "file", base)
    fp.PromptBank(tmp_path / "bank", base)
    with pytest.raises(ValueError, match=r"width 32 and 67 tokens .* got one of width 64"):
        fp.PromptBank(tmp_path / "bank", build("Llama", hidden_size=64))


def test_a_temporary_bank_goes_with_the_object(base: Any) -> None:
    bank = fp.PromptBank(None, base)
    bank.add("a", rows_of(1.0))
    folder = bank.folder
    assert pickle.loads(pickle.dumps(bank)).rows("a").eq(1).all() and repr(bank).endswith("1 prompts of width 32")
    del bank
    assert not folder.exists()


def test_rows_draw_no_random_numbers(bank: fp.PromptBank) -> None:
    bank.add("a", rows_of(1.0))
    before = torch.get_rng_state()
    bank.rows("a"), bank.ids("a")
    assert torch.equal(torch.get_rng_state(), before)
