"""Quicker modules for what transformers computes slowly: the same function, the same parameters, fewer large tensors.

BLOOM's attention in transformers is eager only: several tensors of heads x T x T a row, which at 2048 tokens take
longer to be filled than to be computed. ALiBi's bias depends on head and key alone, for softmax does not mind what all
keys of a query have in common (arXiv 2108.12409, section 3); so it is a product of one more channel of query and key,
and the usual fused attention, which never has the scores whole, serves.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu

BIAS_CHANNELS = 8  # of which one is used: fused kernels on GPUs want multiples of 8


class FusedBloomAttention(nn.Module):
    """Causal attention with ALiBi in the place of transformers', for whole rows without padding and without a cache."""

    def __init__(self, slow: BloomAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = slow.num_heads, slow.head_dim
        self.query_key_value, self.dense = slow.query_key_value, slow.dense

    def forward(self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, **_: object) -> tuple[Tensor, None]:
        """As the module that it stands for.

        Args:
            hidden_states: (B, T, hidden_size).
            residual: of the same shape, added to the result.
            alibi: (B * heads, 1, T), the bias of head and key.
        Returns:
            (B, T, hidden_size), and None for the weights that nobody asked for.
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
    """Put quicker modules in the place of those that have one; parameters keep their names and tensors."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BloomAttention):
            model.set_submodule(name, FusedBloomAttention(module))
        elif isinstance(module, BloomGelu):
            model.set_submodule(name, nn.GELU(approximate="tanh"))
