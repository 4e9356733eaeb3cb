"""Causal families of transformers, others every day: rows behind a prompt are those that were joined by hand."""

from __future__ import annotations

import datetime
import random
import zlib

import pytest
import torch
from torch import Tensor

import fusedprompt
from families.tiny import HEADS, PAD, VOCABULARY, build, classes

# They do not take embeddings alone (per-layer inputs, hashes of ids, segments, codebooks), or cannot be built so small.
LEFT_OUT = {
    "BltForCausalLM",
    "CohereCompassForCausalLM",
    "CpmAntForCausalLM",
    "DeepseekV4ForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma4AssistantForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedAssistantForCausalLM",
    "Gemma4UnifiedForConditionalGeneration",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
    "ProphetNetForCausalLM",
    "Qwen4ExpForCausalLM",
    "ReformerModelWithLMHead",
    "Zamba2ForCausalLM",
    "ZambaForCausalLM",
    "xLSTMForCausalLM",
}
FAMILIES = [name for name in classes("CAUSAL_LM") if name not in LEFT_OUT]
SAMPLE = random.Random(str(datetime.date.today())).sample(FAMILIES, 12)


def test_most_families_are_there() -> None:
    assert len(FAMILIES) >= 160


@pytest.mark.parametrize("name", SAMPLE)
@torch.no_grad()
def test_a_row_behind_a_prompt_is_that_joined_by_hand(name: str) -> None:
    base = build(name, seed=zlib.crc32(name.encode()))
    config = fusedprompt.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=30, num_attention_heads=HEADS, num_layers=2
    )
    model = fusedprompt.get_prompt_model(base, config).eval()
    ids, mask = torch.randint(3, VOCABULARY, (4, 14)), torch.ones(4, 14, dtype=torch.int64)
    mask[1, 8:] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    rows, embed = model.prompt_rows().clone(), base.get_input_embeddings()

    def alone(text: Tensor) -> Tensor:
        joined = torch.cat((rows, embed(text)))
        return base(inputs_embeds=joined.unsqueeze(0)).logits[0, len(rows) :]  # type: ignore[no-any-return]

    for route in ("auto", "splice"):
        for given in ({"input_ids": ids[2:]}, {"input_ids": ids, "attention_mask": mask}):
            found = model(**given, route=route, logits="text").logits
            for text, logits in zip(given["input_ids"], found):
                length = 8 if text[-1] == PAD else 14
                right = alone(text[:length])
                error = (logits[:length] - right).abs().max() / right.abs().max()
                assert error <= 2e-4, f"{name}, route {route}: {error:.1e}"
    assert torch.equal(model.prompt_rows(), rows)
