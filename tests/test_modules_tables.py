"""PromptEmbedding and CPTEmbedding against PEFT's classes, and what holds for every prompt module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.cpt.model import CPTEmbedding as PeftCPTEmbedding
from torch import Tensor, nn

import fusedprompt as fp
import oracle
from test_modules import INDICES, ROWS, WIDTH, assert_close, encoder_fields, values_and_gradients
from tolerance import assert_identical, generator, normal, one_thread  # noqa: F401

# Prompt tuning


def word_embeddings(dtype: torch.dtype = torch.float32, vocabulary: int = 23) -> nn.Embedding:
    return nn.Embedding(vocabulary, WIDTH, _weight=normal((vocabulary, WIDTH), dtype, generator(3)))


def embedding_pair(words: nn.Module, **changes: Any) -> tuple[fp.PromptEmbedding, nn.Module]:
    fields = {"num_virtual_tokens": ROWS, "token_dim": WIDTH, "num_transformer_submodules": 1, **changes}
    torch.manual_seed(1)
    ours = fp.PromptEmbedding(fp.PromptTuningConfig(**copy.deepcopy(fields)), words)
    torch.manual_seed(1)
    return ours, peft.PromptEmbedding(peft.PromptTuningConfig(**copy.deepcopy(fields)), words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_prompt_embedding_has_the_weights_values_and_gradients_of_peft_for_a_seed(
    init: str, dtype: torch.dtype
) -> None:
    words = word_embeddings(dtype)
    ours, theirs = embedding_pair(words, prompt_tuning_init=init)
    assert_identical(ours.state_dict(), theirs.state_dict())
    assert ours.embedding.weight.dtype == torch.float32 and ours.embedding.weight.requires_grad
    assert_identical(values_and_gradients(ours, INDICES["mixed"]), values_and_gradients(theirs, INDICES["mixed"]))
    if init == "SAMPLE_VOCAB":
        distances = torch.cdist(ours.embedding.weight.detach(), words.weight.detach().float())
        assert bool((distances.min(dim=1).values == 0).all())


def test_prompt_embedding_does_not_share_memory_with_the_word_embeddings() -> None:
    words = word_embeddings()
    before = words.weight.detach().clone()
    ours, _ = embedding_pair(words, prompt_tuning_init="SAMPLE_VOCAB")
    with torch.no_grad():
        ours.embedding.weight.fill_(7.0)
    assert torch.equal(words.weight, before)


def test_prompt_embedding_copies_what_a_scaled_word_embedding_returns() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 10 * super().forward(ids)

    words = Scaled(1, WIDTH)  # one word, so that every row is that word
    ours, _ = embedding_pair(words, prompt_tuning_init="SAMPLE_VOCAB")
    assert torch.equal(ours.embedding.weight, 10 * words.weight.expand(ROWS, -1))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer that ends each text with </s>, saved under <folder>/inner."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "is": 2, "it": 3, "good": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "inner")
    return folder


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("is it good", [2, 3, 4, 0, 2, 3, 4]),  # repeated and cut
        ("good", [4, 0, 4, 0, 4, 0, 4]),
        ("is it good it is bad", [2, 3, 4, 3, 2, 1, 0]),  # exactly as long
        ("it it it it it it it it it", [3] * 7),  # cut
    ],
)
def test_text_init_has_the_weights_of_peft_and_the_words_of_the_text(
    text: str, ids: list[int], tokenizer_folder: Path
) -> None:
    words = word_embeddings(torch.bfloat16)
    ours, theirs = embedding_pair(
        words,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tokenizer_folder / "inner"),
    )
    assert_identical(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.embedding.weight, words.weight[ids].float())


def test_text_init_passes_tokenizer_kwargs_without_trust_remote_code_and_leaves_the_caller_s_alone(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    seen: dict[str, Any] = {}
    load = AutoTokenizer.from_pretrained

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", recorded)
    kwargs = {"subfolder": "inner", "trust_remote_code": True}
    config = fp.PromptTuningConfig(
        num_virtual_tokens=ROWS,
        token_dim=WIDTH,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="good",
        tokenizer_name_or_path=str(tokenizer_folder),
        tokenizer_kwargs=kwargs,
    )
    words = word_embeddings()
    module = fp.PromptEmbedding(config, words)
    assert torch.equal(module.embedding.weight, words.weight[[4, 0, 4, 0, 4, 0, 4]])
    assert seen["subfolder"] == "inner" and not seen.get("trust_remote_code")
    assert kwargs == config.tokenizer_kwargs == {"subfolder": "inner", "trust_remote_code": True}


def test_text_init_of_a_text_without_tokens_raises_value_error_naming_the_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: lambda text: {"input_ids": []})
    with pytest.raises(ValueError, match=r"prompt_tuning_init_text: expected text with at least one token, got ' '"):
        embedding_pair(
            word_embeddings(), prompt_tuning_init="TEXT", prompt_tuning_init_text=" ", tokenizer_name_or_path="x"
        )


# CPT

TYPES = [1, 2, 2, 3, 4, 0, 5, 6, 7, 8, 8]


def cpt_fields(**changes: Any) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "cpt_token_ids": list(range(5, 5 + len(TYPES))),
        "cpt_mask": [1] * len(TYPES),
        "cpt_tokens_type_mask": TYPES,
        "opt_projection_epsilon": 3.0,
        "opt_projection_format_epsilon": 1.5,
        **changes,
    }


def cpt_pair(words: nn.Embedding, **changes: Any) -> tuple[fp.CPTEmbedding, PeftCPTEmbedding]:
    modules = []
    for package in (fp, peft):
        config = package.CPTConfig(**cpt_fields(**changes))
        config.token_dim = words.embedding_dim  # CPTConfig resets it; a model fills it in
        torch.manual_seed(1)
        modules.append(fp.CPTEmbedding(config, words) if package is fp else PeftCPTEmbedding(config, words))
    return modules[0], modules[1]


def change_deltas(*modules: nn.Module) -> None:
    """Changes of which some are longer than their epsilon, some shorter, and one 0."""
    size = (len(TYPES), WIDTH)
    delta = normal(size, torch.float32, generator(5)) * torch.tensor([0.3, 0.01, 0.0] * 4)[: len(TYPES), None]
    for module in modules:
        with torch.no_grad():
            module.delta_embedding.weight.copy_(delta)


CONTEXT = torch.arange(len(TYPES)).unsqueeze(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpt_embedding_has_the_weights_and_keys_of_peft(dtype: torch.dtype) -> None:
    words = word_embeddings(dtype)
    ours, theirs = cpt_pair(words)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["embedding.weight", "delta_embedding.weight"]
    assert_identical(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.embedding.weight, words.weight[5 : 5 + len(TYPES)].float())
    assert not ours.embedding.weight.requires_grad and ours.delta_embedding.weight.requires_grad
    assert ours.embedding.weight.dtype == ours.delta_embedding.weight.dtype == torch.float32


def test_cpt_embedding_has_the_values_projection_and_gradients_of_peft() -> None:
    ours, theirs = cpt_pair(word_embeddings())
    for _ in range(2):  # 0 at first, then changed
        assert_close(values_and_gradients(ours, CONTEXT), values_and_gradients(theirs, CONTEXT))
        torch.testing.assert_close(ours.delta_embedding.weight, theirs.delta_embedding.weight)
        change_deltas(ours, theirs)
    gradient = ours.delta_embedding.weight.grad
    frozen = torch.tensor([code % 4 == 0 for code in TYPES])
    assert not gradient[frozen].any() and bool(gradient[~frozen].any(dim=1).all())


@pytest.mark.parametrize("width", [1, 12, 2048, 3072])
def test_cpt_epsilon_is_that_of_peft_and_of_the_oracle(width: int) -> None:
    words = nn.Embedding(23, width)
    ours, theirs = cpt_pair(words)
    epsilon = ours.get_epsilon()
    assert epsilon.dtype == torch.float32
    torch.testing.assert_close(epsilon, theirs.get_epsilon(), rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    expected = torch.tensor(oracle.cpt_epsilon(TYPES, 3.0, 1.5, width), dtype=torch.float64)
    torch.testing.assert_close(epsilon.double(), expected, rtol=torch.finfo(torch.float32).eps, atol=0)


def test_cpt_projection_is_written_back_in_place() -> None:
    ours, _ = cpt_pair(word_embeddings())
    change_deltas(ours)
    parameter, storage = ours.delta_embedding.weight, ours.delta_embedding.weight.data_ptr()
    before = parameter.detach().clone()
    rows = ours.encode()
    assert ours.delta_embedding.weight is parameter and parameter.data_ptr() == storage
    assert not torch.equal(parameter, before)
    assert torch.equal(rows, ours.embedding.weight + parameter)
    assert bool((parameter.detach().norm(dim=1) <= ours.get_epsilon() * (1 + 1e-6)).all())
    rows.sum().backward()  # the parameter was changed after it was used
    projected = parameter.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(), rows.detach())
    torch.testing.assert_close(parameter.detach(), projected)


def test_cpt_projection_without_gradients_leaves_the_parameter_alone() -> None:
    ours, _ = cpt_pair(word_embeddings())
    change_deltas(ours)
    before = ours.delta_embedding.weight.detach().clone()
    with torch.no_grad():
        rows = ours.encode()
    assert torch.equal(ours.delta_embedding.weight, before)
    assert torch.equal(rows, ours.encode())


def test_cpt_embedding_in_inference_mode_returns_the_table_alone() -> None:
    ours, theirs = cpt_pair(word_embeddings(), inference_mode=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    change_deltas(ours)
    assert torch.equal(ours.encode(), ours.embedding.weight)
    assert torch.equal(ours(CONTEXT)[0], ours.embedding.weight)


# All modules


def every_module() -> dict[str, nn.Module]:
    tuning = fp.PromptTuningConfig(num_virtual_tokens=ROWS, token_dim=WIDTH)
    return {
        "MLP": fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("MLP"))),
        "LSTM": fp.PromptEncoder(fp.PromptEncoderConfig(**encoder_fields("LSTM"))),
        "embedding": fp.PromptEmbedding(tuning, word_embeddings()),
        "CPT": cpt_pair(word_embeddings())[0],
    }


@pytest.mark.parametrize("name", list(every_module()))
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_or_pickled_module_has_the_same_bits_and_its_own_memory(name: str, duplicate: Any) -> None:
    module = every_module()[name]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    copied = duplicate(module)
    assert_identical(copied.state_dict(), before)
    assert torch.equal(copied.encode(), module.encode())
    copied.encode().sum().backward()
    with torch.no_grad():
        for value in copied.parameters():
            value.add_(1)
    assert_identical(module.state_dict(), before)
    assert all(value.grad is None for value in module.parameters())


@pytest.mark.parametrize("name", list(every_module()))
def test_a_module_in_double_precision_encodes_in_double_precision(name: str) -> None:
    module = every_module()[name]
    single = module.encode().detach()
    rows = module.double().encode()
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows.detach().float(), single)


BUILD = {
    "encoder": (fp.PromptEncoder, fp.PromptEncoderConfig, ()),
    "embedding": (fp.PromptEmbedding, fp.PromptTuningConfig, (word_embeddings(),)),
}


@pytest.mark.parametrize("field", ["token_dim", "num_virtual_tokens"])
@pytest.mark.parametrize("name", list(BUILD))
def test_a_module_without_a_needed_field_raises_value_error_naming_it(name: str, field: str) -> None:
    module, config, words = BUILD[name]
    fields = {"num_virtual_tokens": ROWS, "token_dim": WIDTH, field: None}
    with pytest.raises(ValueError, match=rf"{field}: expected a positive int to build {module.__name__}, got None"):
        module(config(**fields), *words)


def test_cpt_embedding_without_token_dim_raises_value_error_naming_it() -> None:
    with pytest.raises(ValueError, match=r"token_dim: expected a positive int to build CPTEmbedding, got None"):
        fp.CPTEmbedding(fp.CPTConfig(**cpt_fields()), word_embeddings())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda c: fp.PromptEncoder(c["tuning"]), "expected a PromptEncoderConfig, got PromptTuningConfig"),
        (lambda c: fp.PromptEmbedding(c["cpt"], word_embeddings()), "expected a PromptTuningConfig, got CPTConfig"),
        (lambda c: fp.CPTEmbedding(c["encoder"], word_embeddings()), "expected a CPTConfig, got PromptEncoderConfig"),
        (lambda c: fp.PromptEncoder(3), "expected a prompt-learning configuration, got int"),
    ],
)
def test_a_module_refuses_the_configuration_of_another(build: Any, message: str) -> None:
    configs = {
        "tuning": fp.PromptTuningConfig(num_virtual_tokens=ROWS, token_dim=WIDTH),
        "encoder": fp.PromptEncoderConfig(**encoder_fields("MLP")),
        "cpt": fp.CPTConfig(**cpt_fields()),
    }
    with pytest.raises(TypeError, match=f"config: {message}"):
        build(configs)


def test_word_embeddings_of_another_width_raise_value_error_naming_token_dim() -> None:
    words = nn.Embedding(23, WIDTH + 1)
    config = fp.PromptTuningConfig(num_virtual_tokens=ROWS, token_dim=WIDTH, prompt_tuning_init="SAMPLE_VOCAB")
    with pytest.raises(ValueError, match=r"token_dim: expected the word embeddings' width, 13, got 12"):
        fp.PromptEmbedding(config, words)
