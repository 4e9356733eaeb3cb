"""A bank's prompts elsewhere: in checkpoints that load without this package, and as engines' arguments."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fusedprompt as fp
from models import VOCAB, WIDTH, build
from word_tokenizers import WORDS, word_tokenizer

FAMILIES = ("Llama", "Gemma", "GPT2", "Phi")  # its head's own, a scaled embedding, a tied head, a head with a bias
NAMES, TEXT = ("a", "team/b c"), "paris is the capital of"
TEMPLATE = "{% for m in messages %}the {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}is{% endif %}"

# Without this package: each folder's tokenizer, greedy tokens and samples for each prompt's ids and text.
LOADS = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fusedprompt":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts, table = json.load(open(folder + "/prompts.json")), model.get_input_embeddings().weight
    own = {"size": len(tokenizer), "template": tokenizer.chat_template, "table": list(table.shape)}
    for name, prompt in prompts.items():
        ids = prompt["ids"] + tokenizer("TEXT")["input_ids"]
        own["as text"] = tokenizer(prompt["text"])["input_ids"] == prompt["ids"]
        ids = torch.tensor([ids])
        greedy = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        own[name] = greedy[0, ids.shape[1]:].tolist()
        flat = {"do_sample": True, "temperature": 1e4, "top_k": 0, "eos_token_id": None, "num_return_sequences": 16}
        own["drawn"] = model.generate(ids, max_new_tokens=30, **flat)[:, ids.shape[1]:].max().item()
        own["decoded"] = tokenizer.decode(ids[0], skip_special_tokens=True)
    found[folder] = own
print(json.dumps(found))
"""


def tokenizer() -> Any:
    made = word_tokenizer("gpt2")
    made.chat_template = TEMPLATE
    return made


def bank_of(base: Any) -> fp.PromptBank:
    bank, generator = fp.PromptBank(None, base), torch.Generator("cpu").manual_seed(3)
    for name, count in zip(NAMES, (4, 6)):
        bank.add(name, torch.randn(count, WIDTH, generator=generator, device="cpu"))
    return bank


def test_a_baked_checkpoint_generates_the_prompt_models_tokens_without_this_package(tmp_path: Path) -> None:
    models = {family: build(family) for family in FAMILIES}
    models["bf16"] = build("Gemma").bfloat16()
    for family, base in models.items():
        before = {name: value.clone() for name, value in base.state_dict().items()}
        said = bank_of(base).bake(base, tmp_path / family, tokenizer())
        assert said["a"] == "<prompt:a:0><prompt:a:1><prompt:a:2><prompt:a:3>" and [*said] == [*NAMES]
        after = base.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    code, folders = LOADS.replace("TEXT", TEXT), [str(tmp_path / family) for family in models]
    run = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    ids = torch.tensor([tokenizer()(TEXT)["input_ids"]])
    for (family, base), own in zip(models.items(), json.loads(run.stdout).values()):
        model = fp.PromptModel(base, bank=bank_of(base)).eval()
        for name in NAMES:
            options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
            right = model.generate(ids, adapter_names=[name], **options)[0, ids.shape[1] :]
            assert own[name] == right.tolist(), (family, name)
        assert own["size"] == own["table"][0] == VOCAB + 10 and own["drawn"] < VOCAB
        assert own["template"] == TEMPLATE and own["as text"] and own["decoded"].split() == TEXT.split()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_head_lose_whatever_the_hidden_state_is(family: str, tmp_path: Path) -> None:
    """Also to engines that know nothing of `suppress_tokens`, and where all logits are negative."""
    base = build(family)
    bank_of(base).bake(base, tmp_path / "out", tokenizer())
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert baked.generation_config.suppress_tokens == [*range(VOCAB, VOCAB + 10)]
    hidden = torch.randn(20000, WIDTH) * torch.tensor([0.1, 1.0, 30.0, 300.0]).repeat(5000).unsqueeze(1)
    head = baked.get_output_embeddings()
    logits = head(torch.cat((hidden, -hidden)))
    assert (logits[:, VOCAB:].amax(1) < logits[:, :VOCAB].amax(1)).all()
    right = base.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits[:20000, :VOCAB], right, rtol=1e-5, atol=1e-3)


def test_ids_that_the_tokenizer_lacks_are_filled_and_some_prompts_may_be_left_out(tmp_path: Path) -> None:
    base, short = build("Llama"), tokenizer()
    known = len(short)
    large = build("Llama", vocab_size=known + 5)
    bank_of(large).bake(large, tmp_path / "out", short, names=["team/b c"])
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(short), len(again)) == (known, known + 5 + 6)
    assert again.convert_ids_to_tokens(known) == f"<unused:{known}>"
    assert again("<prompt:team/b c:5>")["input_ids"] == [known + 10]
    with pytest.raises(ValueError, match=rf"tokenizer: expected at most the {VOCAB} tokens of the base model"):
        short.add_tokens([str(number) for number in range(100)])
        bank_of(base).bake(base, tmp_path / "more", short)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_cannot_be_baked_is_refused_and_nothing_is_half_written(tmp_path: Path) -> None:
    base, words = build("Llama"), tokenizer()
    bank, full = bank_of(base), tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(ValueError, match="folder: expected a new or an empty folder"):
        bank.bake(base, full, words)
    with bank.attach(base), pytest.raises(ValueError, match="without a bank that is attached"):
        bank.bake(base, tmp_path / "out", words)
    with pytest.raises(ValueError, match="tokenizer: expected the base model's"):
        bank.bake(base, tmp_path / "out")
    with pytest.raises(ValueError, match="names: expected at least one prompt"):
        bank.bake(base, tmp_path / "out", words, names=[])
    with pytest.raises(ValueError, match="name: expected one of the bank's 2 prompts, got 'x'"):
        bank.bake(base, tmp_path / "out", words, names=["x"])
    bart = build("Bart", "SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match=r"base: expected a decoder .* got a BartForConditionalGeneration"):
        bank_of(bart).bake(bart, tmp_path / "out", words)
    odd = build("Llama")
    odd.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="base: expected input embeddings that are rows of a table"):
        bank_of(odd).bake(odd, tmp_path / "out", words)
    taken, large = tokenizer(), build("Llama", vocab_size=VOCAB + 3)
    taken.add_tokens(["<prompt:a:1>"])
    with pytest.raises(ValueError, match="tokenizer: expected to give new tokens the ids from 70 on"):
        bank_of(large).bake(large, tmp_path / "out", taken)

    class Fails(type(words)):  # type: ignore[misc]
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("the disk is full")

    words.__class__ = Fails
    with pytest.raises(OSError, match="the disk is full"):
        bank.bake(base, tmp_path / "out", words)
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_an_empty_folder_and_a_base_model_by_its_folder_are_taken(tmp_path: Path) -> None:
    base = build("Llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    bank_of(base).bake(str(tmp_path / "base"), tmp_path / "out")
    assert {"prompts.json", "config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


# Payloads


def decoded(text: str) -> Tensor:
    """As vLLM reads it."""
    tensor: Tensor = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    return tensor


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_payloads_are_the_prompts_rows_before_the_texts_embeddings(family: str) -> None:
    base, words = build(family), tokenizer()
    bank = bank_of(base)
    ids = words(TEXT)["input_ids"]
    right = torch.cat((bank.rows("a"), base.get_input_embeddings()(torch.tensor(ids)).detach()))
    payload = bank.payload("a", TEXT, base, words)
    assert torch.equal(payload.vllm()["prompt_embeds"], right) and [*payload.vllm()] == ["prompt_embeds"]
    assert torch.equal(decoded(payload.vllm_completions()["prompt_embeds"]), right)
    assert torch.equal(torch.tensor(payload.sglang()["input_embeds"]), right)
    mixed = payload.vllm_mixed()
    mask = torch.tensor(mixed["prompt_is_token_ids"])
    assert mask.tolist() == [False] * 4 + [True] * len(ids) and torch.equal(mixed["prompt_embeds"], right)
    # What vLLM makes of it: ids where the mask has them, embeddings elsewhere.
    of_ids = base.get_input_embeddings()(torch.tensor(mixed["prompt_token_ids"]))
    assert torch.equal(torch.where(mask.unsqueeze(1), of_ids, mixed["prompt_embeds"]), right)
    model = fp.PromptModel(base, bank=bank).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    found = base.generate(**payload.transformers(), **options)
    assert found.tolist() == model.generate(torch.tensor([ids]), adapter_names=["a"], **options)[:, len(ids) :].tolist()
    assert payload.differs == {} and payload.embeds.dtype == base.dtype
    with pytest.raises(ValueError, match="text: expected messages for a chat"):
        payload.vllm_chat()


def test_messages_get_the_chat_template_behind_the_prompt_and_a_chat_says_where_it_differs() -> None:
    base, words = build("Llama"), tokenizer()
    bank = bank_of(base)
    messages = [{"role": "system", "content": "paris"}, {"role": "user", "content": "rome"}]
    payload = bank.payload("a", messages, base, words)
    assert payload.ids == tuple(words("the paris the rome is")["input_ids"])
    assert torch.equal(payload.embeds[:4], bank.rows("a"))
    chat = payload.vllm_chat()["messages"]
    part, text = chat[0]["content"]
    assert part["type"] == "prompt_embeds" and torch.equal(decoded(part["data"]), bank.rows("a"))
    assert (text, chat[1]) == ({"type": "text", "text": "paris"}, messages[1])
    assert messages[0]["content"] == "paris"
    assert payload.differs == {"vllm_chat": "the rows stand behind 'the ', and not in front of all"}
    words.chat_template = TEMPLATE.replace("the ", "")
    assert bank.payload("a", messages, base, words).differs == {}


def test_payloads_of_anything_else_are_refused() -> None:
    base, words = build("Llama"), tokenizer()
    bank = bank_of(base)
    for text in (3, [], ["paris"], [{"role": "user"}]):
        with pytest.raises(TypeError, match="text: expected a string or messages"):
            bank.payload("a", text, base, words)
    with pytest.raises(ValueError, match="base_model: expected the bank's"):
        bank.payload("a", TEXT, build("Llama", hidden_size=64), words)
    with pytest.raises(ValueError, match="name: expected one of the bank's 2 prompts"):
        bank.payload("x", TEXT, base, words)


def test_half_precision_embeddings_make_half_precision_payloads() -> None:
    base = build("Llama").bfloat16()
    bank = bank_of(base)
    payload = bank.payload("a", " ".join(WORDS[:3]), base, tokenizer())
    assert payload.embeds.dtype == torch.bfloat16 and torch.equal(payload.rows, bank.rows("a").bfloat16())
    assert decoded(payload.vllm_completions()["prompt_embeds"]).dtype == torch.bfloat16
