"""Faster equivalents of transformers' BLOOM modules, with the same parameters and fewer large tensors.

BLOOM's attention in transformers is eager only, with several tensors of heads x T x T per row; at 2048 tokens writing
them takes longer than computing them. ALiBi's bias can be written as a function of head and key, because softmax is
invariant to a constant per query (arXiv 2108.12409, section 3). So the bias is the product of an additional channel of
query and key, and fused attention applies, which never stores all scores.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu

BIAS_CHANNELS = 8  # one is used; fused kernels on GPUs need a multiple of 8


class FusedBloomAttention(nn.Module):
    """Causal attention with ALiBi for whole rows, without padding and without a cache."""

    def __init__(self, eager: BloomAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = eager.num_heads, eager.head_dim
        self.query_key_value, self.dense = eager.query_key_value, eager.dense

    def forward(self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, **_: object) -> tuple[Tensor, None]:
        """The interface of `BloomAttention`.

        Args:
            hidden_states: (B, T, hidden_size).
            residual: (B, T, hidden_size), added to the result.
            alibi: (B * heads, 1, T), the bias by head and key.
        Returns:
            Output (B, T, hidden_size), and None in place of the attention weights.
        """
        B, T, _width = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(B, T, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        query, key, value = (F.pad(part, (0, BIAS_CHANNELS)) for part in fused)
        query[..., : self.head_dim] *= self.head_dim**-0.5
        query[..., self.head_dim] = 1
        key[..., self.head_dim] = alibi.view(B, self.num_heads, T)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        context = context[..., : self.head_dim].transpose(1, 2).reshape(B, T, -1)
        return self.dense(context).add_(residual), None


def use_fused_modules(model: PreTrainedModel) -> None:
    """Replace modules by their faster equivalents; parameters keep their names and tensors."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BloomAttention):
            model.set_submodule(name, FusedBloomAttention(module))
        elif isinstance(module, BloomGelu):
            model.set_submodule(name, nn.GELU(approximate="tanh"))
