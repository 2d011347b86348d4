"""What a small model lacks to be hurt like a large one: input channels of very different strength.

Large language models have channels whose activations are many times those of the others (Dettmers et al., LLM.int8(),
arXiv 2208.07339, section 4): the weights behind those are what rounding damages and what calibration protects. Models
of four million parameters trained for an hour hardly have any: rounding the BLOOM one to 3 bits cost it 2 of 99 points.
So every channel of a norm is multiplied by a factor of its own, and the weights that read it are divided by the same:
the full-precision model computes what it did before, but what 3 and 4 bits cost, and what GPTQ saves, can be seen.
"""

from __future__ import annotations

from typing import Any

import torch

SPREAD = {"bloom": 0.3, "llama": 0.3}  # standard deviation of the factors' logarithm
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
    """Multiply the channels of every block's norms by exp(deviation * normal), and divide what reads them (in place).

    Args:
        model: BloomForCausalLM or LlamaForCausalLM in float32; its outputs stay the same but for rounding.
        deviation: of the factors' natural logarithm.
        seed: of the factors.
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
