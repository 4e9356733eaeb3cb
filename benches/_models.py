"""Whole models as contenders: a Llama with random weights, with a prompt, without one, and with LoRA."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ._compiled import COMPILED_ONLY
from ._interleave import COMPILED, Case, Contender, check
from ._memory import counted_flops
from ._work import BACKWARD, STEP, Work

SMALL, LARGE = (2, 256, 8000), (6, 512, 32000)  # layers, D, V
NO_PROMPT, LORA = "no prompt", "PEFT LoRA 32"


def llama(layers: int, width: int, vocabulary: int) -> LlamaForCausalLM:
    """Random weights, the same on every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=vocabulary,
            max_position_embeddings=1024,
        )
    ).train()


def batch_of(size: int, length: int, vocabulary: int = LARGE[2]) -> dict[str, Tensor]:
    """(B, T) ids, labels and a mask without padding."""
    torch.manual_seed(0)
    ids = torch.randint(0, vocabulary, (size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def contender(name: str, model: nn.Module, call: Any, batch: dict[str, Any], comparable: bool = True) -> Contender:
    """Training with AdamW. call: the model, compiled or not. batch: its arguments; each call gets its own
    input_type_mask, which PEFT changes in place."""
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    length = batch["input_ids"].shape[1]

    def forward() -> Any:
        own = dict(batch)
        if "input_type_mask" in own:
            own["input_type_mask"] = own["input_type_mask"].clone()
        return call(**own)

    return Contender(
        name,
        forward=forward,
        backward=lambda output: output.loss.backward(),
        outputs=lambda output: {"loss": output.loss, "text logits": output.logits[:, -length:]},
        parameters=parameters,
        update=optimizer.step,
        comparable=comparable,
        **(COMPILED_ONLY if name == COMPILED else {}),
    )


def no_prompt(size: tuple[int, int, int], batch: dict[str, Tensor]) -> Contender:
    """The base model on the text alone, whose gradient goes as far as a prompt's would: to the embeddings."""
    base = llama(*size).requires_grad_(False)
    arguments = {name: batch[name] for name in ("attention_mask", "labels")}
    leaf = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return Contender(
        NO_PROMPT,
        forward=lambda: base(inputs_embeds=leaf, **arguments),
        backward=lambda output: output.loss.backward(),
        outputs=lambda output: {"loss": output.loss},
        parameters={"embeddings": leaf},
        update=lambda: None,
        comparable=False,
    )


def lora(size: tuple[int, int, int], batch: dict[str, Tensor]) -> Contender:
    """LoRA of rank 32 on all linear layers, through PEFT."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=32, lora_alpha=64, target_modules=linear, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(*size), config)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return contender(LORA, model, model, plain, comparable=False)


def step_case(group: str, name: str, contenders: list[Contender], truth: Contender, **others: Any) -> Case:
    """Training steps in fp32, checked against `truth`. others: further fields of the case, or other values of these."""
    fields = {"dtype": "fp32", "tolerance": (1e-5, 1e-4), "work": step_work(contenders[0]), **others}
    return check(Case(group=group, name=name, contenders=contenders, truth=truth, **fields))


def encoder_config(kind: str, rows: int, width: int, hidden: int) -> peft.PromptEncoderConfig:
    """P-tuning with P rows of width D and hidden size H, complete without a base model."""
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=rows,
        token_dim=width,
        num_transformer_submodules=1,
        num_attention_heads=1,
        num_layers=1,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=hidden,
        encoder_num_layers=2,
    )


def step_work(ours: Contender) -> dict[str, Work]:
    """The operations of our own training step, counted: what any contender must do that shares as much."""
    ours.work(BACKWARD)()  # a model's first step makes logits, to see whether it can do without them
    flops = counted_flops(ours.work(BACKWARD))  # without the update, so that it still has the peers' parameters
    ours.clear()
    return {STEP: Work(0.0, flops)}
