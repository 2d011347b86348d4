"""LLaMA (arXiv 2302.13971), Llama 2 and 3, Mistral and Qwen2: RMS norms, RoPE and a gated feed-forward."""

from torch import Tensor

from gptq_belle.engine.attention import (
    Attention,
    DecodeAttention,
    PrefillAttention,
    UncachedAttention,
    attention_config,
)
from gptq_belle.engine.linear import LinearOperator, interleave_gates, silu_and_mul_interleaved
from gptq_belle.engine.lm_head import embedding_and_head
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.kernels.cpu_elementwise import RmsNorm, silu_and_mul
from gptq_belle.models.decoder_config import DecoderConfig


class _LlamaBlock:
    def __init__(self, weights: WeightLoader, name: str, config: DecoderConfig) -> None:
        d = config.dimensions
        width, inner, head_dim = d.hidden_size, d.intermediate_size, d.head_dim
        self.heads = [d.num_heads, d.num_kv_heads, d.num_kv_heads]
        outputs = [heads * head_dim for heads in self.heads]

        def named(*parts: str) -> tuple[list[str], bool]:
            return [f"{name}.{part}" for part in parts], parts[0] in d.biased

        def linear(names: tuple[list[str], bool], inputs: int, *outputs: int) -> LinearOperator:
            return weights.linear(names[0], inputs, outputs, names[1])

        self.attention_norm = RmsNorm(weights.tensor(f"{name}.input_layernorm.weight", width), config.eps)
        self.qkv = linear(named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), width, *outputs)
        self.out = linear(named("self_attn.o_proj"), outputs[0], width)
        self.mlp_norm = RmsNorm(weights.tensor(f"{name}.post_attention_layernorm.weight", width), config.eps)
        gate_up = linear(named("mlp.gate_proj", "mlp.up_proj"), width, inner, inner)
        self.gate_up, self.has_interleaved_gates = interleave_gates(gate_up)
        self.down = linear(named("mlp.down_proj"), inner, width)
        self.linears = self.qkv, self.out, self.gate_up, self.down
        self.head_dim = head_dim

    def __call__(self, x: Tensor, attention: Attention, index: int) -> Tensor:
        x = self.out(self._attend(self.attention_norm(x), attention, index), x)
        activation = silu_and_mul_interleaved if self.has_interleaved_gates else silu_and_mul
        return self.down(activation(self.gate_up(self.mlp_norm(x))), x)

    def _attend(self, x: Tensor, attention: Attention, index: int) -> Tensor:
        qkv = self.qkv(x).view(len(x), -1, self.head_dim)
        query, key, value = qkv.split_with_sizes(self.heads, 1)
        return attention(index, query, key, value)


class Llama:
    """Decoder of BELLE-LLaMA and other models of the LLaMA family.

    Args:
        weights: loader of the checkpoint; all tensors of the model are loaded.
        config: decoder configuration of its config.json.
    """

    uncached, prefill, decode, is_native = UncachedAttention, PrefillAttention, DecodeAttention, True

    def __init__(self, weights: WeightLoader, config: DecoderConfig) -> None:
        d = config.dimensions
        self.embedding, self.head = embedding_and_head(weights, "model.embed_tokens", d)
        names = weights.block_names("model.layers", d.num_layers)
        self.blocks = [_LlamaBlock(weights, name, config) for name in names]
        self.norm = RmsNorm(weights.tensor("model.norm.weight", d.hidden_size), config.eps)
        self.attention_config = attention_config(config, weights.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (n,) to inputs of the first block (n, width)."""
        return self.embedding(ids)

    def run_blocks(self, x: Tensor, attention: Attention) -> Tensor:
        """Inputs of the first block to outputs of the last one, both (n, width)."""
        for index, block in enumerate(self.blocks):
            x = block(x, attention, index)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, width) to logits (n, vocabulary)."""
        return self.head(self.norm(hidden))
