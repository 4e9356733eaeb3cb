"""A tiny untrained Llama with a tokenizer of bytes, saved as a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

BEGIN, END, FIRST = 0, 1, 2  # ids of <s> and </s>, and of the first byte's symbol


def save_byte_model(folder: Path, positions: int = 64) -> Path:
    """Texts begin with <s>, and end with </s> where somebody puts it there; every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BEGIN, "</s>": END, **{symbol: FIRST + index for index, symbol in enumerate(symbols)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=BEGIN,
        eos_token_id=END,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
