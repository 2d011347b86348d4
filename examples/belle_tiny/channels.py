"""Give a small model input channels of very different magnitude, as large models have.

Some channels of large language models have activations many times larger than the others (Dettmers et al., LLM.int8(),
arXiv 2208.07339, section 4). Rounding damages the weights of these channels most, and calibration protects them. Models
of four million parameters hardly have such channels: rounding to 3 bits cost the BLOOM model 2 of 99 points. So every
channel of a norm is multiplied by a random factor, and the weights that read it are divided by the same factor. The
full-precision model computes the same function, but the cost of 3 and 4 bits and the benefit of GPTQ become visible.
"""

from __future__ import annotations

from typing import Any

import torch

SPREAD = {"bloom": 0.3, "llama": 0.3}  # standard deviation of the logarithm of the factors
READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "bloom": {
        "input_layernorm": ("self_attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
    "llama": {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
}


@torch.no_grad()
def spread_channels(model: Any, deviation: float, seed: int = 0) -> None:
    """Multiply the channels of all norms in blocks by exp(deviation * normal), and divide their readers, in place.

    Args:
        model: BloomForCausalLM or LlamaForCausalLM in float32; its outputs change only by rounding.
        deviation: standard deviation of the natural logarithm of the factors.
        seed: random seed of the factors.
    """
    arch = model.config.model_type
    blocks = model.transformer.h if arch == "bloom" else model.model.layers
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        for norm_name, readers in READERS[arch].items():
            factors = torch.exp(deviation * torch.randn(model.config.hidden_size, generator=generator))
            for parameter in block.get_submodule(norm_name).parameters():
                parameter.mul_(factors)
            for reader in readers:
                block.get_parameter(f"{reader}.weight").div_(factors)
