"""A decoder as the fused decode step on a GPU reads it: every norm is folded into the product that follows it.

The weights are those of the decoder, not copies. `kernels.triton_norm` has the formulas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_belle.engine.attention import AttentionConfig
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.linear import ConcatenatedLinear, DenseLinear, LinearOperator, PackedLinear
from gptq_belle.engine.llama import Llama
from gptq_belle.engine.lm_head import Embedding
from gptq_belle.engine.transformers_decoder import TransformersDecoder
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.cpu_elementwise import LayerNorm, RmsNorm
from gptq_belle.kernels.triton_config import TENSOR_CORES
from gptq_belle.kernels.triton_layout import SlicedWeight, input_places, lookup_rows

OUTPUTS_AT_A_TIME = 1024  # of a weight that is multiplied by a norm's gamma: 64 MB in float32 with 16,384 inputs


@dataclass(frozen=True, slots=True)
class FusedProduct:
    """A packed weight (K, N), with what the norm before it adds.

    Attributes:
        bias: (N,), or None; with beta @ W of a layer norm before the product.
        places: (K,) int32, where the kernel reads each input; None: in order.
        gamma_product: gamma @ W (N,) float32 of a layer norm before the product, else None.
    """

    weight: SlicedWeight
    bias: Tensor | None
    places: Tensor | None
    gamma_product: Tensor | None = None


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """The four products of a decoder block, and the gammas (width,) of its two norms."""

    attention_gamma: Tensor
    qkv: FusedProduct
    out: FusedProduct
    mlp_gamma: Tensor
    up: FusedProduct  # gates and values interleaved, if the model has gates
    down: FusedProduct


@dataclass(frozen=True, slots=True)
class FusedHead:
    """The last norm and the lm_head (V, width), packed or dense."""

    gamma: Tensor
    weight: SlicedWeight | Tensor
    bias: Tensor | None
    gamma_product: Tensor | None


@dataclass(frozen=True, slots=True)
class FusedDecoder:
    """Everything that a fused decode step reads, except the KV cache.

    Attributes:
        embedding: the packed matrix of a tied lm_head, or a table (V, width).
        embedding_norm: weight, bias and epsilon of the layer norm of BLOOM's embeddings, else None.
        eps: epsilon of all other norms.
        activation: "gelu" or "silu_mul".
        attention: heads and positions.
        interleaved_heads: whether qkv is (heads, 3, head_dim) as in BLOOM.
    """

    blocks: list[FusedBlock]
    embedding: SlicedWeight | Tensor
    embedding_norm: tuple[Tensor, Tensor, float] | None
    head: FusedHead
    eps: float
    activation: str
    attention: AttentionConfig
    interleaved_heads: bool

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return len(self.head.gamma)


def fusion_obstacle(decoder: Bloom | Llama | TransformersDecoder) -> str | None:
    """Why a decoder has no fused decode step; None if it has one.

    In act-order, query, key and value must have the same order of inputs, and gate and up, too. GPTQ gives them the
    same one: it sorts by the Hessian of their input, which they share.
    """
    if isinstance(decoder, TransformersDecoder):
        return "this architecture runs with transformers' forward pass"
    linears = [linear for block in decoder.blocks for linear in block.linears]
    if any(isinstance(linear, ConcatenatedLinear) for linear in linears):
        return "linears with the same input differ in bits, format or groups of inputs (g_idx)"
    if not all(isinstance(linear, PackedLinear) and isinstance(linear.weight, SlicedWeight) for linear in linears):
        return "not every linear is one packed weight in the layout of the Triton kernels"
    if isinstance(decoder, Bloom) and any(block.normed for block in decoder.blocks):
        return "the residual is the output of a norm"
    if isinstance(decoder, Llama) and not all(block.has_interleaved_gates for block in decoder.blocks):
        return "the outputs of the gates cannot be interleaved with the values that they multiply"
    weight = getattr(decoder.head, "weight", None)
    if not isinstance(weight, (Tensor, SlicedWeight)) or getattr(weight, "order", None) is not None:
        return "the lm_head has another layout"
    if decoder.norm.weight.dtype not in triton_matmul.DTYPES:
        return f"activations are {decoder.norm.weight.dtype}"
    if triton_matmul.device_properties(decoder.norm.weight.device)[0] < TENSOR_CORES:
        return f"the compute capability is below {TENSOR_CORES / 10}"
    return None


@torch.inference_mode()
def fuse(decoder: Bloom | Llama) -> FusedDecoder:
    """Fold the norms of a decoder, for which `fusion_obstacle` returns None, into its products."""
    blocks = []
    for block in decoder.blocks:
        qkv, out, up, down = block.linears
        blocks.append(FusedBlock(block.attention_norm.weight, _product(qkv, block.attention_norm), _product(out),
                                 block.mlp_norm.weight, _product(up, block.mlp_norm), _product(down)))
    embedding, head_weight = decoder.embedding, _packed_or_dense(decoder.head)
    norm = getattr(decoder, "embedding_norm", None)
    bias, gamma_product = _folded(head_weight, None, decoder.norm)
    return FusedDecoder(
        blocks=blocks, embedding=embedding.table if isinstance(embedding, Embedding) else head_weight,
        embedding_norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
        head=FusedHead(decoder.norm.weight, head_weight, bias, gamma_product), eps=decoder.norm.eps,
        activation="gelu" if isinstance(decoder, Bloom) else "silu_mul", attention=decoder.attention_config,
        interleaved_heads=isinstance(decoder, Bloom))


def _product(linear: LinearOperator, norm: RmsNorm | LayerNorm | None = None) -> FusedProduct:
    assert isinstance(linear, PackedLinear)
    assert isinstance(linear.weight, SlicedWeight)
    bias, gamma_product = _folded(linear.weight, linear.bias, norm)
    return FusedProduct(linear.weight, bias, input_places(linear.weight), gamma_product)


def _packed_or_dense(head: LinearOperator) -> SlicedWeight | Tensor:
    assert isinstance(head, (PackedLinear, DenseLinear))
    assert isinstance(head.weight, (SlicedWeight, Tensor))
    return head.weight


def _folded(weight: SlicedWeight | Tensor, bias: Tensor | None,
            norm: RmsNorm | LayerNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias with beta @ W added, and gamma @ W, of a layer norm before the product; both (N,) float32."""
    if not isinstance(norm, LayerNorm):
        return bias, None
    found = []
    outputs = weight.shape[0] if isinstance(weight, Tensor) else weight.out_features
    vectors = torch.stack((norm.weight, norm.bias), 1).float()
    for start in range(0, outputs, OUTPUTS_AT_A_TIME):
        ids = torch.arange(start, min(start + OUTPUTS_AT_A_TIME, outputs), device=vectors.device)
        rows = weight[ids].float() if isinstance(weight, Tensor) else lookup_rows(weight, ids)
        found.append(rows @ vectors)
    gamma_product, beta_product = torch.cat(found).unbind(1)
    return (beta_product if bias is None else bias.float() + beta_product).contiguous(), gamma_product.contiguous()
