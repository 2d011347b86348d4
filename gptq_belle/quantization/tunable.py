"""A linear whose codes are fixed and whose scales can be trained."""

from typing import Any

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.packing import QuantizedWeight, dequantize


class TunableLinear(nn.Module):
    """A quantized linear with a gradient to its input, its scales and its bias.

    Args:
        weight: codes (N, K), scales and zero points (N, G), g_idx (K,).
        bias: (N,) float32, or None.

    Attributes:
        scales: (N, G) float32, a parameter.
        bias: a parameter, or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.solved = weight
        self.scales = nn.Parameter(weight.scales)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) float32; (..., N) float32."""
        y: Tensor = _Product.apply(x, self.scales, self.solved)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x @ W^T with W = scales * (codes - zeros), expanded anew for the way back, so that memory holds codes alone.

    With D the gradient to W, which is grad^T x, the gradient to scale (n, g) is the sum of D[n, k] (codes[n, k] -
    zeros[n, g]) over the inputs k of group g.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, solved: QuantizedWeight) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.solved = solved
        return x @ dequantize(solved._replace(scales=scales)).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scales = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        weight = dequantize(ctx.solved._replace(scales=scales))
        to_x = (grad @ weight).view(x.shape)
        steps = dequantize(ctx.solved._replace(scales=torch.ones_like(scales)), out=weight)
        steps *= grad.t() @ x.flatten(0, -2)
        to_scales = torch.zeros_like(scales).index_add_(1, ctx.solved.g_idx.long(), steps)
        return to_x, to_scales, None
