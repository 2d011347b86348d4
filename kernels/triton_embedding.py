"""The launch that looks up the embeddings of a decode step. Imports Triton."""

import torch
from torch import Tensor

from .tensor_checks import check_tensors
from .triton_embedding_kernel import embedding_kernel
from .triton_launch import Launch
from .triton_layout import SlicedWeight
from .triton_matmul import OPTIONS
from .triton_norm import NextNorm

TILE = 64  # columns of a tile of the moments that are written for the first norm
COMPILED = {"num_warps": 8, "maxnreg": 128, **OPTIONS}  # left to itself, ptxas spills to use fewer registers
DENSE = {"BITS": 16, "RUN": 1, "BLOCK": 1, "ZERO": 0}


def embedding_launch(tokens: Tensor, embedding: SlicedWeight | Tensor, norm: tuple[Tensor, Tensor, float] | None,
                     stream: Tensor, next_norm: NextNorm, *, pdl: bool = False) -> Launch:
    """Prepare the lookup of the embeddings of one step.

    Args:
        tokens: (M,) int32.
        embedding: a packed matrix with a row per token as output, or a dense table (V, width).
        norm: weight, bias and epsilon of the layer norm of BLOOM's embeddings.
        stream: (M, width) float16 or bfloat16, written.
        next_norm: of the first block, written; its moments are (2, ceil(width / TILE), M).
    Raises:
        ValueError: tensors that do not fit together, or a packed matrix in act-order.
    """
    rows, width = stream.shape
    check_tensors((rows,), torch.int32, device=stream.device, tokens=tokens)
    check_tensors((rows, width), torch.float16, torch.bfloat16, device=stream.device, stream=stream)
    check_tensors((2, -(-width // TILE), rows), torch.float32, device=stream.device, moments=next_norm.moments)
    if isinstance(embedding, Tensor):
        check_tensors((None, width), device=stream.device, embedding=embedding)
        words, scales, zeros, columns, constants = embedding, None, None, embedding.shape[0], DENSE
    else:
        if embedding.order is not None or embedding.in_features != width:
            raise ValueError(f"the packed embedding has {embedding.in_features} columns, sorted by group or padded; "
                             f"required: {width} in order")
        words, scales, zeros, columns = embedding.words, embedding.scales, embedding.zeros, embedding.words.shape[1]
        constants = {"BITS": embedding.bits, "RUN": embedding.run, "BLOCK": embedding.block, "ZERO": embedding.zero}
    weight, bias, eps = norm or (None, None, 0.0)
    arguments = {
        "tokens": tokens, "words": words, "scales": scales, "zeros": zeros, "norm_weight": weight, "norm_bias": bias,
        "eps": eps, "out": stream, "gamma": next_norm.gamma, "places": next_norm.places, "x": next_norm.x,
        "moments": next_norm.moments, "columns": columns, "row": next_norm.x.shape[1]}
    options = COMPILED | {"launch_pdl": True} if pdl else COMPILED
    return Launch(embedding_kernel, (rows,), arguments,
                  constants | {"WIDTH": width, "TILE": TILE, "PDL": pdl} | options)
