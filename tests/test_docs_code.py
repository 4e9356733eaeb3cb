"""Every ```python block of README.md and docs/ runs, page by page, and gives what it shows.

A page's blocks share one namespace, which holds what the page takes for granted (`GIVEN`), and run in a folder in which
`from_pretrained("Qwen/Qwen3-0.6B")` finds a small random model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import fusedprompt as fp
from fusedprompt.integrations import peft as integration
from models import PAD, VOCAB
from pages import PAGES, Block, python_blocks, run, text_of
from word_tokenizers import word_tokenizer

# Python blocks of every page that has any. A page that gains or loses one must say so here.
BLOCKS = {
    "README.md": 2,
    "docs/bank.md": 5,
    "docs/faq.md": 14,
    "docs/layouts.md": 7,
    "docs/methods.md": 3,
    "docs/numerics.md": 5,
    "docs/peft.md": 2,
    "docs/prefix-attention.md": 3,
    "docs/prefixes.md": 1,
    "docs/quickstart.md": 9,
    "docs/routes.md": 1,
}
ELSEWHERE = {"docs/layouts.md": "test_layouts_doc.py"}  # with models that have learned what the page asks of them
NAME = "Qwen/Qwen3-0.6B"


def small_model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def byte_tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def batch() -> dict[str, Any]:
    ids = torch.randint(2, 258, (8, 9), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def given_readme() -> dict[str, Any]:
    ids, mask = batch().values()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, pad_token_id=PAD, **sizes))
    names = {"masked_model": masked, "masked_tokenizer": word_tokenizer("bert")}
    return {**names, "base_model": small_model(), "tokenizer": byte_tokenizer(), "ids": ids, "mask": mask}


def given_routes() -> dict[str, Any]:
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    return {"fp": fp, "base": small_model(), "config": config, "batch": batch()}


def given_prefixes() -> dict[str, Any]:
    inputs = batch()
    names = {"fp": fp, "base": small_model(), "tokenizer": byte_tokenizer(), "manual": "How to begin. " * 40}
    return {**names, "batch": {**inputs, "labels": inputs["input_ids"]}, "inputs": inputs}


def given_peft() -> dict[str, Any]:
    import peft

    arguments = transformers.TrainingArguments(output_dir="out", report_to=[], use_cpu=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"]]
    names = {"peft": peft, "transformers": transformers, "fusedprompt": fp}
    return {**names, "base_model": small_model(), "arguments": arguments, "rows": rows}


def given_bank() -> dict[str, Any]:
    names = {"fp": fp, "torch": torch, "base": small_model(), "tokenizer": byte_tokenizer()}
    config = fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    fp.get_prompt_model(small_model(), config).save_pretrained("adapters/translate")
    return {**names, "rows": torch.randn(4, 64), "ids": batch()["input_ids"][:2]}


def given_faq() -> dict[str, Any]:
    return {"fp": fp, "torch": torch, "new_model": small_model, "batch": batch(), "ids": batch()["input_ids"]}


def given_methods() -> dict[str, Any]:
    names = {"fp": fp, "torch": torch, "base_model": small_model(), "tokenizer": byte_tokenizer()}
    return {**names, "ids": batch()["input_ids"]}


def given_numerics() -> dict[str, Any]:
    return {"fp": fp, "torch": torch, "base_model": small_model(), "ids": batch()["input_ids"]}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": given_readme,
    "docs/bank.md": given_bank,
    "docs/faq.md": given_faq,
    "docs/methods.md": given_methods,
    "docs/numerics.md": given_numerics,
    "docs/peft.md": given_peft,
    "docs/prefixes.md": given_prefixes,
    "docs/routes.md": given_routes,
}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    small_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", [page for page, number in BLOCKS.items() if number and page not in ELSEWHERE])
def test_every_block_runs_and_gives_what_it_shows(
    page: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).symlink_to(pretrained)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = GIVEN.get(page, dict)()
    try:
        for block in python_blocks(page):
            run(block, namespace)
    finally:
        integration.disable()


def test_no_block_is_lost() -> None:
    found = {page: len(python_blocks(page)) for page in PAGES}
    assert {page: number for page, number in found.items() if number or page in BLOCKS} == BLOCKS
    for page, test in ELSEWHERE.items():
        assert Path(page).name in Path(__file__).with_name(test).read_text()
    for page in PAGES:  # neither another spelling of the language nor an indented fence hides one
        assert text_of(page).lower().count("```py") == found[page], page


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("1 + 1  # -> 3\n", None),
        ("print('one')  # -> two\n", None),
        ("x = 1  # raises ValueError: no\n", None),
        ("int('x')  # raises ValueError: no\n", None),
        ("if True:\n    1 + 1  # -> 2\n    pass\n", None),
        ("print('one')\n", "two\n"),
    ],
)
def test_a_block_that_shows_something_else_fails(source: str, output: str | None) -> None:
    with pytest.raises(AssertionError, match=r"page\.md"):
        run(Block("page.md", 1, source, output), {})


def test_a_block_that_shows_what_it_does_passes() -> None:
    source = "for i in (1, 2):\n    print(i)\nprint(3)  # -> 3\n[4, 5]  # -> [4, ...\n"
    source += "int('x')  # raises ValueError: ...'x'\n"
    run(Block("page.md", 1, source, "1\n2\n"), {})
