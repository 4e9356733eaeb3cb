"""Small transformers models of many families, built from configurations, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedprompt.ops.head_loss import reference as head_loss

VOCAB, WIDTH, PAD, EOS = 67, 32, 0, 1
_ROPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
}
_BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
}
_SIZES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 96, "bos_token_id": 2},
    "Llama": _ROPE,
    "Qwen2": _ROPE,
    "Mistral": {**_ROPE, "sliding_window": 64},
    "Gemma": {**_ROPE, "head_dim": 8},
    "Gemma2": {**_ROPE, "head_dim": 8, "sliding_window": 64},
    "Cohere": _ROPE,
    "Qwen3": {**_ROPE, "head_dim": 8},
    "Phi": _ROPE,
    "Mixtral": {**_ROPE, "num_local_experts": 4},
    "GPTNeoX": {name: value for name, value in _ROPE.items() if name != "num_key_value_heads"},
    "Falcon": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
    },
    "Bloom": {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    "OPT": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": 96,
    },
    "T5": {"d_model": WIDTH, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8, "decoder_start_token_id": PAD},
    "Bart": {
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 96,
        "decoder_start_token_id": PAD,
        "forced_eos_token_id": None,
    },
    "Bert": _BERT,
    "Roberta": _BERT,
}
DECODERS = ("GPT2", "Llama", "Qwen2", "Mistral", "Gemma", "OPT")
ENCODERS = ("Bert", "Roberta")
ENCODER_DECODERS = ("T5", "Bart")
_SUFFIX = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}


def build(family: str, task: str = "CAUSAL_LM", seed: int = 0, **overrides: Any) -> Any:
    """A random model in eval mode, with weights large enough for outputs to differ visibly."""
    config_class = getattr(transformers, f"{family}Config")
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    config = config_class(**{**_SIZES[family], **ids, "num_labels": 2 if task == "QUESTION_ANS" else 3, **overrides})
    suffix = _SUFFIX.get(task) or ("LMHeadModel" if family == "GPT2" else "ForCausalLM")
    torch.manual_seed(seed)
    model = getattr(transformers, family + suffix)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Random ids without padding or end-of-text tokens."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator, device="cpu")


def pad(ids: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """`ids` with padding on both sides, and the mask."""
    padded = torch.nn.functional.pad(ids, (left, right), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right), value=0)
    return padded, mask


CPT_FIELDS: dict[str, Any] = {
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12],
    "cpt_mask": [1] * 8,
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
}


def config_fields(method: str, task: str = "CAUSAL_LM", rows: int = 4) -> tuple[str, dict[str, Any]]:
    """The name of a configuration class (in this package and in PEFT) and fields for it."""
    if method == "CPT":
        return "CPTConfig", {"task_type": task, **CPT_FIELDS}
    if method in ("PREFIX", "PROJECTED"):
        fields = {"task_type": task, "num_virtual_tokens": rows, "prefix_projection": method == "PROJECTED"}
        return "PrefixTuningConfig", {**fields, "encoder_hidden_size": 24}
    if method == "CARTRIDGE":
        return "CartridgeConfig", {"task_type": task, "num_virtual_tokens": rows, "num_frozen_tokens": 1}
    if method == "PROMPT":
        return "PromptTuningConfig", {"task_type": task, "num_virtual_tokens": rows}
    if method == "MULTITASK":
        sizes = {"num_virtual_tokens": rows, "num_tasks": 3, "num_ranks": 2}
        return "MultitaskPromptTuningConfig", {"task_type": task, **sizes}
    fields = {"task_type": task, "num_virtual_tokens": rows, "encoder_reparameterization_type": method}
    return "PromptEncoderConfig", {**fields, "encoder_hidden_size": 24}


def pair(family: str, task: str, method: str, **overrides: Any) -> tuple[Any, Any]:
    """The same adapter on the same base model: PEFT's and this package's."""
    import peft

    import fusedprompt

    name, fields = config_fields(method, task)
    theirs_base, ours_base = build(family, task, **overrides), build(family, task, **overrides)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(theirs_base, getattr(peft, name)(**fields))
    torch.manual_seed(7)
    ours = fusedprompt.get_prompt_model(ours_base, getattr(fusedprompt, name)(**fields))
    if method == "CPT":  # a zero change would hide the projection
        torch.manual_seed(8)
        change = torch.randn(8, WIDTH) * 0.02
        with torch.no_grad():
            theirs.prompt_encoder["default"].delta_embedding.weight.copy_(change)
            ours.prompt_encoder["default"].delta_embedding.weight.copy_(change)
    return theirs.eval(), ours.eval()


def ours(
    family: str, task: str = "CAUSAL_LM", method: str = "PROMPT", rows: int = 4, seed: int = 7, **overrides: Any
) -> Any:
    """This package's model alone."""
    import fusedprompt

    name, fields = config_fields(method, task, rows)
    base = build(family, task, **overrides)
    torch.manual_seed(seed)
    return fusedprompt.get_prompt_model(base, getattr(fusedprompt, name)(**fields)).eval()


def task_inputs(task: str, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments of a forward call with labels, as the task takes them."""
    batch, length = ids.shape
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    generator = torch.Generator("cpu").manual_seed(5)
    if task in ("CAUSAL_LM", "TOKEN_CLS"):
        labels = ids if task == "CAUSAL_LM" else torch.randint(0, 3, ids.shape, generator=generator, device="cpu")
        inputs["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    elif task == "SEQ_2_SEQ_LM":
        inputs["labels"] = torch.randint(3, VOCAB, (batch, 5), generator=generator, device="cpu")
    elif task == "SEQ_CLS":
        inputs["labels"] = torch.arange(batch) % 3
    elif task == "QUESTION_ANS":
        inputs["start_positions"] = torch.arange(batch) % length
        inputs["end_positions"] = (torch.arange(batch) + 2) % length
    return inputs


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returned, and how many products had V columns or rows."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.head_products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "fusedprompt::head_loss":
            with self:  # an op of ours counts for what it dispatches itself
                return head_loss.IMPLEMENTATION.run(*args)
        result = func(*args, **(kwargs or {}))
        given = [t.data_ptr() for t in args if isinstance(t, Tensor)]
        if isinstance(result, Tensor) and all(result.stride()) and result.data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear)
        if func.overloadpacket in products and any(VOCAB in t.shape for t in args if isinstance(t, Tensor)):
            self.head_products += 1
        return result
