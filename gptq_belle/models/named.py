"""Configurations of the models that BELLE was tuned from, by name: what can be planned and measured without a download.
"""

from typing import Any

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_act": "silu",
          "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
          "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, dict[str, Any]] = {
    "belle-7b": {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 250880,  # BLOOM-7B1
                 "hidden_size": 4096, "n_layer": 30, "n_head": 32, "seq_length": 2048, "layer_norm_epsilon": 1e-5,
                 "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    "llama-7b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                          "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-13b": _LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                           "num_attention_heads": 40, "num_key_value_heads": 40},
}
