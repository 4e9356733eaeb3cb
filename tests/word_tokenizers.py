"""Small fast tokenizers made from word lists, with the special tokens of several families."""

from __future__ import annotations

from typing import Any

from models import VOCAB

WORDS = [
    "paris",
    "rome",
    "france",
    "italy",
    "is",
    "the",
    "capital",
    "of",
    "a",
    "big",
    "city",
    "no",
    "yes",
    "cats",
    "purr",
]
# Ids of the special tokens; models.PAD and models.EOS are 0 and 1.
_SPECIALS = {
    "bert": ["[PAD]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<pad>", "</s>", "<unk>", "<s>", "<x>", "<mask>"],
    "llama": ["<pad>", "</s>", "<unk>", "<s>"],
    "gpt2": ["<pad>", "</s>", "<unk>"],
}


def word_tokenizer(family: str = "gpt2", **options: Any) -> Any:
    """A tokenizer of words between spaces, which puts the family's special tokens around a text or a pair."""
    import tokenizers
    import transformers

    specials = _SPECIALS[family]
    words = [*specials, *WORDS]
    words += [f"w{index}" for index in range(VOCAB - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=specials[2])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    shapes = {
        "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "llama": ("<s> $A", "<s> $A <s> $B:1"),
    }
    if family in shapes:
        single, pair = shapes[family]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(word, vocabulary[word]) for word in specials]
        )
    names = {"pad_token": specials[0], "eos_token": specials[1], "unk_token": specials[2]}
    if family in ("bert", "roberta"):
        names["mask_token"] = specials[5]
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"padding_side": "right", **names, "model_input_names": inputs, **options}
    )
