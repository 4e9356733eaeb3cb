"""Every family of transformers as a tiny model with random weights, made from its own configuration class.

A configuration's fields are set by their names: there are a few dozen words for "width", "layers" and "heads". What a
name does not say stands in `OVERRIDES`, by model type.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

VOCABULARY, PAD, BOS, EOS = 80, 0, 1, 2
TEXT = 76  # the ids from here on stand for pictures and the like
WIDTH, HEADS = 32, 4

_NAMES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size n_vocab entity_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim attention_hidden_size emb_dim "
        "encoder_hidden_size decoder_hidden_size d_embed hidden_dim model_dim n_embed d_attn lru_width",
    ),
    (
        48,
        "intermediate_size ffn_dim n_inner d_ff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim dff feed_forward_size "
        "ffn_hidden_size mlp_hidden_size shared_intermediate_size moe_intermediate_size decoder_intermediate_size "
        "moe_shared_expert_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "dense_intermediate_size encoder_intermediate_size n_inner_dim inner_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads heads mamba_num_heads index_n_heads linear_num_heads "
        "swa_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads n_kv_heads num_kv_heads multi_query_group_num swa_num_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k top_k_experts moe_num_active_primary_experts num_selected_experts top_k "
        "num_active_experts router_top_k num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_encoder_layers num_decoder_layers num_encoder_blocks num_attention_layers zero_expert_num o_groups",
    ),
    (
        8,
        "head_dim kv_channels attention_head_dim attention_head_size mamba_head_dim qk_nope_head_dim v_head_dim "
        "q_lora_rank kv_lora_rank qk_rope_head_dim d_kv global_head_dim attention_key_size linear_key_head_dim "
        "linear_value_head_dim rotary_dim hidden_size_per_layer_input mamba_d_head dim_head index_head_dim d_rel "
        "linear_head_dim swa_head_dim laurel_rank o_lora_rank chunk_size mamba_chunk_size hc_lowrank",
    ),
    (
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts mamba_d_state state_size ssm_state_size "
        "mamba_n_heads num_expert num_linear_heads linear_num_key_heads linear_num_value_heads mamba_dt_rank",
    ),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length context_length"),
    (64, "sliding_window sliding_window_size attention_window_size"),
    (
        1,
        "num_shared_experts n_shared_experts n_group topk_group first_k_dense_replace num_mtp_modules mamba_n_groups "
        "n_groups num_nextn_predict_layers",
    ),
    (TEXT, "image_token_id image_token_index"),
    (TEXT + 1, "video_token_id video_token_index"),
    (TEXT + 2, "audio_token_id audio_token_index"),
    (PAD, "pad_token_id"),
    (BOS, "bos_token_id"),
    (EOS, "eos_token_id decoder_start_token_id"),
    (
        0.0,
        "attention_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout hidden_dropout_prob layerdrop "
        "activation_dropout attention_probs_dropout_prob classifier_dropout summary_first_dropout qa_dropout "
        "classifier_dropout_prob summary_last_dropout ffn_dropout_rate dropout_rate seq_classif_dropout "
        "encoder_layerdrop decoder_layerdrop router_jitter_noise embd_dropout embedding_dropout pooler_dropout "
        "activation_dropout_prob classif_dropout",
    ),
)
FIELDS = {name: value for value, names in _NAMES for name in names.split()}

_MAMBA = {"mamba_n_heads": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "": {"attn_pdrop": 0},  # MPT's attention
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "dots3_note_text": {"per_layer_config": None},
    "encoder-decoder/decoder": {"is_decoder": True, "add_cross_attention": True},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma4_assistant/text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 2,
    },
    "gemma3n_text": {**_SLIDING, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 20},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "inkling2_text": {"rel_extent": 16},
    "inkling_text": {"rel_extent": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "kimi_linear": _LINEAR,
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 40,
        "shape_embed_dim": 8,
        "shape_vocab_size": 40,
    },
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"chunk_size": 64, "num_heads": 2, "qk_dim_factor": 1.0},
    "zamba": {
        "num_hidden_layers": 5,
        "attention_head_dim": 16,
        "attention_hidden_size": 2 * WIDTH,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}
WINDOWS = {"sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size"}
NARROW = {"use_sliding_window": True, "max_window_layers": 0}
MAPPINGS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "MASKED_LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


def classes(task: str) -> list[str]:
    """The names of the classes in one of transformers' mappings, each once."""
    names = MAPPINGS[task].values()
    return list(dict.fromkeys(one for name in names for one in ((name,) if isinstance(name, str) else name)))


def window_fields(kind: Any) -> set[str]:
    """The fields of a configuration class, and of its parts, that say how far attention looks."""
    found = WINDOWS & set(inspect.signature(kind.__init__).parameters)
    for name, part in getattr(kind, "sub_configs", {}).items():
        if "text" in name or "decoder" in name:
            found |= window_fields(_part_of(kind, name, part))
    return found


def _part_of(kind: Any, name: str, part: Any) -> Any:
    if part is not transformers.AutoConfig:
        return part
    default: Any = getattr(kind, "sub_configs_defaults", {}).get(name)
    if getattr(default, "model_type", None) in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[default.model_type]
    return type(getattr(kind(), name))


def configuration(kind: Any, causal: bool, window: int | None = None, **fields: Any) -> Any:
    """A tiny configuration of a class. causal: of a language model that reads from left to right."""
    parameters = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in FIELDS.items() if name in parameters}
    if "kv_lora_rank" in parameters and "num_key_value_heads" in parameters:
        given["num_key_value_heads"] = HEADS  # latent attention has a key for each head
    for name, part in getattr(kind, "sub_configs", {}).items():
        part = _part_of(kind, name, part)
        if part is not type(None):
            own = OVERRIDES.get(f"{kind.model_type}/{name}", {})
            given[name] = configuration(part, causal, window, **own)
    if causal and "is_decoder" in parameters:
        given["is_decoder"] = True
    given.update(OVERRIDES.get(kind.model_type, {}))
    if window is not None:
        given.update(dict.fromkeys(WINDOWS & set(parameters), window))
        given.update({name: value for name, value in NARROW.items() if name in parameters})
    config = kind(**{**given, **fields})
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = EOS
    return config


def build(name: str, seed: int = 0, scale: float = 4, **fields: Any) -> Any:
    """A model of a class in evaluation mode, with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    model = kind(configuration(kind.config_class, name in classes("CAUSAL_LM"), **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif parameter.is_floating_point():  # zeros and ones would hide what they are multiplied with, or added to
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for field in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, field, None)  # so that what is generated has one length
    return model
