"""Small models of both architectures, and a BLOOM forward pass that is faster than transformers' on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from .tokenizer import EOS, PAD, VOCABULARY

ARCHITECTURES = ("bloom", "llama")


def bloom_config(**ids: Any) -> BloomConfig:
    """Four blocks of width 256."""
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        n_layer=4,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=True,
        tie_word_embeddings=True,
        **ids,
    )
    config.seq_length = 512  # as in the published BLOOM configurations; not a limit
    return config


def llama_config(**ids: Any) -> LlamaConfig:
    """Four blocks of width 256 with an untied lm_head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **ids,
    )


def build(arch: str, seed: int = 0) -> Any:
    """Create a float32 model with random weights: BLOOM with 3.9, LLaMA with 5.0 million parameters."""
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    if arch == "bloom":
        return BloomForCausalLM(bloom_config(**ids))
    model = LlamaForCausalLM(llama_config(**ids))
    enlarge_embedding(model.model.embed_tokens.weight.data)
    return model


def enlarge_embedding(weight: Tensor) -> None:
    """Initialize the embedding with standard deviation 0.5 around a common vector, in place.

    LLaMA has neither BLOOM's embedding norm nor biases. With the usual standard deviation of 0.02, the outputs of the
    blocks soon dominate the token; and attention to a relative position needs a component that all tokens share.
    """
    common = 0.5 * torch.randn(weight.shape[1])
    weight.copy_(0.5 * torch.randn(weight.shape) + common)


def bloom_bias(heads: int, length: int, device: torch.device) -> Tensor:
    """ALiBi bias with causal mask (heads, length, length); the number of heads must be a power of two."""
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]
    bias = slopes[:, None, None] * distance
    return bias.masked_fill(distance > 0, float("-inf"))


def bloom_block(block: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Run one BLOOM block: (B, T, C) to (B, T, C)."""
    b, t, c = x.shape
    attention = block.self_attention
    fused = attention.query_key_value(block.input_layernorm(x)).view(b, t, attention.num_heads, 3, attention.head_dim)
    q, k, v = fused.permute(3, 0, 2, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])
    x = x + attention.dense(mixed.transpose(1, 2).reshape(b, t, c))
    hidden = block.mlp.dense_h_to_4h(block.post_attention_layernorm(x))
    return x + block.mlp.dense_4h_to_h(F.gelu(hidden, approximate="tanh"))


def bloom_hidden(model: Any, ids: Tensor) -> Tensor:
    """Run BLOOM with scaled_dot_product_attention, which transformers does not use for it; a test compares both."""
    body = model.transformer
    x = body.word_embeddings_layernorm(body.word_embeddings(ids))
    bias = bloom_bias(body.config.n_head, ids.shape[1], ids.device)
    for block in body.h:
        x = bloom_block(block, x, bias)
    return body.ln_f(x)


def logits_at(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (n, V) of rows (B, T) at n positions of the flattened rows: the lm_head is expensive."""
    if model.config.model_type == "bloom":
        hidden = bloom_hidden(model, ids)
    else:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[positions])
