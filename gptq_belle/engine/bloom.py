"""BLOOM (arXiv 2211.05100): layer norms, ALiBi, a GELU feed-forward, and an lm_head tied to the embedding."""

from torch import Tensor

from gptq_belle.engine.attention import (
    Attention,
    DecodeAttention,
    PrefillAttention,
    UncachedAttention,
    attention_config,
)
from gptq_belle.engine.linear import LinearOperator
from gptq_belle.engine.lm_head import embedding_and_head
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.kernels.cpu_elementwise import LayerNorm, gelu_
from gptq_belle.models.decoder_config import DecoderConfig


def _norm(weights: WeightLoader, name: str, width: int, eps: float) -> LayerNorm:
    return LayerNorm(weights.tensor(f"{name}.weight", width), weights.tensor(f"{name}.bias", width), eps)


class _BloomBlock:
    def __init__(self, weights: WeightLoader, name: str, config: DecoderConfig) -> None:
        d, eps = config.dimensions, config.eps
        width, inner = d.hidden_size, d.intermediate_size

        def linear(part: str, inputs: int, outputs: int) -> LinearOperator:
            return weights.linear([f"{name}.{part}"], inputs, [outputs], True)

        self.attention_norm = _norm(weights, f"{name}.input_layernorm", width, eps)
        self.qkv = linear("self_attention.query_key_value", width, 3 * width)
        self.out = linear("self_attention.dense", width, width)
        self.mlp_norm = _norm(weights, f"{name}.post_attention_layernorm", width, eps)
        self.up, self.down = linear("mlp.dense_h_to_4h", width, inner), linear("mlp.dense_4h_to_h", inner, width)
        self.linears = self.qkv, self.out, self.up, self.down
        self.heads, self.head_dim, self.normed = d.num_heads, d.head_dim, config.normed_residual

    def __call__(self, x: Tensor, attention: Attention, index: int) -> Tensor:
        normed = self.attention_norm(x)
        x = self.out(self._attend(normed, attention, index), normed if self.normed else x)
        normed = self.mlp_norm(x)
        return self.down(gelu_(self.up(normed)), normed if self.normed else x)

    def _attend(self, x: Tensor, attention: Attention, index: int) -> Tensor:
        # BLOOM interleaves query, key and value per head: (heads, 3, head_dim).
        query, key, value = self.qkv(x).view(len(x), self.heads, 3, self.head_dim).unbind(2)
        return attention(index, query, key, value)


class Bloom:
    """Decoder of BELLE-7B and other BLOOM models.

    Args:
        weights: loader of the checkpoint; all tensors of the model are loaded.
        config: decoder configuration of its config.json.
    """

    uncached, prefill, decode, is_native = UncachedAttention, PrefillAttention, DecodeAttention, True

    def __init__(self, weights: WeightLoader, config: DecoderConfig) -> None:
        d, eps = config.dimensions, config.eps
        self.embedding, self.head = embedding_and_head(weights, "transformer.word_embeddings", d)
        self.embedding_norm = _norm(weights, "transformer.word_embeddings_layernorm", d.hidden_size, eps)
        names = weights.block_names("transformer.h", d.num_layers)
        self.blocks = [_BloomBlock(weights, name, config) for name in names]
        self.norm = _norm(weights, "transformer.ln_f", d.hidden_size, eps)
        self.attention_config = attention_config(config, weights.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (n,) to inputs of the first block (n, width)."""
        return self.embedding_norm(self.embedding(ids))

    def run_blocks(self, x: Tensor, attention: Attention) -> Tensor:
        """Inputs of the first block to outputs of the last one, both (n, width)."""
        for index, block in enumerate(self.blocks):
            x = block(x, attention, index)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, width) to logits (n, vocabulary)."""
        return self.head(self.norm(hidden))
