"""Tiny random models of many architectures from transformers' configurations, for the tests of discovery."""

from pathlib import Path

import torch
from conftest import VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1}
HEADS = {"head_dim": 16}
OLDER = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                     "num_attention_heads", "max_position_embeddings", "initializer_range")}
GPTJ = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96,
        "initializer_range": 0.1}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA_NAMES = {  # LLaMA's seven linears, with an unusual feature each
    "qwen3": HEADS,  # norms of queries and keys
    "gemma": HEADS,  # scaled embedding, tied
    "gemma2": HEADS | WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
                                "final_logit_softcapping": 3.0},
    "gemma3_text": HEADS | WINDOW | {"query_pre_attn_scalar": 16},
    "olmo": {"clip_qkv": 1.0},  # norms without weights
    "olmo2": {},
    "olmo3": WINDOW,
    "granite": {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.3,
                "attention_multiplier": 0.1, "attention_bias": True},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.25},  # parallel attention
    "cohere2": WINDOW | {"logit_scale": 0.25},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "use_parallel_residual": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "internlm3": {"qkv_bias": True, "bias": True, "head_dim": 16},
    "exaone4": WINDOW,
    "hunyuan_v1_dense": HEADS,
    "ernie4_5": HEADS | {"use_bias": True},
    "seed_oss": HEADS,
    "helium": HEADS,
}
OTHER_NAMES = {  # fused or other linears
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"sliding_window": 8},
    "glm": HEADS | {"attention_bias": True},
    "glm4": HEADS | {"partial_rotary_factor": 0.5},
    "starcoder2": {"use_bias": True},
    "nemotron": HEADS | {"partial_rotary_factor": 0.5},
    "gpt_neox": {"use_parallel_residual": True, "rotary_pct": 0.25},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": {"rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "falcon": {"ffn_hidden_size": 96, "alibi": False, "multi_query": True},
    "arcee": HEADS,
}
BASES = {"gptj": GPTJ, "mpt": {"vocab_size": VOCABULARY, "initializer_range": 0.1},
         **dict.fromkeys(("gpt_neox", "opt", "falcon"), OLDER)}
KINDS = LLAMA_NAMES | OTHER_NAMES


def tiny(kind: str, folder: Path) -> Path:
    """Write a tiny random model of a model_type in float16, with biases and norms that are not their default."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(BASES.get(kind, SIZES) | IDS | KINDS[kind]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.half().save_pretrained(folder / kind)
    tiny_tokenizer().save_pretrained(folder / kind)
    return folder / kind
