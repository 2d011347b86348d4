"""The quantized model as a trainable model: codes are fixed; scales, biases and norms are trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptq_belle.checkpoint.empty_model import assign, empty_model
from gptq_belle.checkpoint.safetensors_file import TensorFile
from gptq_belle.formats.gptq_weight import PackedWeight, QuantizedWeight, dequantize, unpack
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.bloom_attention import use_fused_modules
from gptq_belle.quantization.config import QuantConfig


class RelativeChanges:
    """Parameters as initial value + unit * change, rounded to float16, with one vector of changes to train.

    Scales of different layers differ by orders of magnitude, but Adam's steps do not. So the unit of a scale is its
    magnitude, and the unit of a norm or a bias is its root mean square, because single elements may be 0. Rounding to
    float16 has no gradient and is ignored by it (straight-through estimator, arXiv 1308.3432, section 3).

    Args:
        parameters: matrices of scales, and vectors.

    Attributes:
        vector: the trained parameter, all changes in one vector; initially 0.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._initial = torch.cat([part.detach().flatten() for part in self.parameters])
        self._units = torch.cat([_unit(part.detach()).flatten() for part in self.parameters])
        self.vector = nn.Parameter(torch.zeros_like(self._initial))

    @torch.no_grad()
    def apply(self, vector: Tensor | None = None) -> None:
        """Set the parameters from the changes in `vector`, by default the trained ones."""
        values = torch.addcmul(self._initial, self._units, self.vector if vector is None else vector)
        values = values.to(torch.float16).float()
        for part, value in zip(self.parameters, values.split([part.numel() for part in self.parameters]), strict=True):
            part.copy_(value.view(part.shape))

    @torch.no_grad()
    def collect(self) -> None:
        """Move the gradients of the parameters to the vector of changes."""
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in self.parameters]
        self.vector.grad = torch.cat([grad.flatten() for grad in grads]).mul_(self._units)
        for part in self.parameters:
            part.grad = None


def _unit(part: Tensor) -> Tensor:
    return part.abs() if part.ndim == 2 else part.square().mean().sqrt().expand(part.shape)


class TrainableLinear(nn.Module):
    """A quantized linear with gradients for its input, its scales and its bias.

    Args:
        weight: codes (N, K), scales and zero points (N, G), g_idx (K,).
        bias: (N,) float32, or None.

    Attributes:
        scales: (N, G) float32, trainable.
        bias: (N,) float32, or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.quantized = weight
        self.scales = nn.Parameter(weight.scales)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) float32 to (..., N) float32."""
        y: Tensor = _DequantizedMatmul.apply(x, self.scales, self.quantized)
        return y if self.bias is None else y + self.bias


class _DequantizedMatmul(torch.autograd.Function):
    """x @ W^T with W = scales * (codes - zeros), dequantized again in the backward pass to keep only codes in memory.

    With D = grad^T x, the gradient of W, the gradient of scale (n, g) is the sum of D[n, k] (codes[n, k] - zeros[n, g])
    over the inputs k of group g.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, quantized: QuantizedWeight) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.quantized = quantized
        return x @ dequantize(quantized._replace(scales=scales)).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scales = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        weight = dequantize(ctx.quantized._replace(scales=scales))
        grad_x = (grad @ weight).view(x.shape)
        steps = dequantize(ctx.quantized._replace(scales=torch.ones_like(scales)), out=weight)
        steps *= grad.t() @ x.flatten(0, -2)
        grad_scales = torch.zeros_like(scales).index_add_(1, ctx.quantized.g_idx.long(), steps)
        return grad_x, grad_scales, None


class Student:
    """The blocks and the last norm of the quantized model, in float32.

    Args:
        stream: the source, which provides the blocks' arguments besides hidden states.
        blocks: transformers' blocks, with `TrainableLinear` in place of quantized linears.
        after: modules between the last block and the head.
        parameters: trained parameters by their names in the file, in a fixed order; scales are (N, G).
    """

    def __init__(self, stream: BlockStream, blocks: Sequence[nn.Module], after: Sequence[nn.Module],
                 parameters: dict[str, nn.Parameter]) -> None:
        self.stream, self.blocks, self.after, self.parameters = stream, blocks, after, parameters

    def run(self, states: Tensor) -> Tensor:
        """Map inputs of the first block (rows, T, hidden_size) to outputs of the last norm.

        Each block is recomputed in the backward pass (activation checkpointing), so that memory holds the intermediate
        results of one block at a time.
        """
        args, kwargs = self.stream.block_arguments(states.shape[:2])
        states = states.to(self.stream.device)
        for block in self.blocks:
            output = checkpoint(block, states, *args, use_reentrant=False, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
        for module in self.after:
            states = module(states)
        return states

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as the file stores them: float16, scales (G, N)."""
        return {name: (part.detach().t() if part.ndim == 2 else part.detach()).to("cpu", torch.float16).contiguous()
                for name, part in self.parameters.items()}


def read_student(stream: BlockStream, written: Mapping[str, TensorFile], config: QuantConfig) -> Student:
    """Read the student from the written parts of the quantized model.

    Args:
        stream: the source.
        written: the file of each tensor of the quantized model, by tensor name.
        config: the job's settings.
    """
    model = empty_model(stream.reader.path)
    use_fused_modules(model)
    blocks = list(model.get_submodule(stream.arch.blocks).children())
    after = {root: model.get_submodule(root) for root in stream.arch.modules_after}
    parameters: dict[str, nn.Parameter] = {}
    for root, module in [*((f"{stream.arch.blocks}.{index}", block) for index, block in enumerate(blocks)),
                         *after.items()]:
        parameters |= _fill(stream, root, module, written, config)
    return Student(stream, blocks, list(after.values()), parameters)


def _fill(stream: BlockStream, root: str, module: nn.Module, written: Mapping[str, TensorFile],
          config: QuantConfig) -> dict[str, nn.Parameter]:
    """Read a module's parameters; returns the trained ones: vectors, and the scales of quantized linears."""
    parameters = {}
    for name, _ in list(module.named_parameters()):
        if (full_name := f"{root}.{name}") in written:
            tensor = written[full_name].tensor(full_name).to(stream.device, torch.float32)
            assign(module, name, tensor)
            if tensor.ndim == 1:
                parameters[full_name] = module.get_parameter(name)
                parameters[full_name].requires_grad_()
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and (stem := f"{root}.{name}") + ".qweight" in written:
            weight = _read_quantized(stem, written, config)
            trainable = TrainableLinear(QuantizedWeight(*(part.to(stream.device) for part in weight)), linear.bias)
            parameters[f"{stem}.scales"] = trainable.scales
            module.set_submodule(name, trainable)
    return parameters


def _read_quantized(stem: str, written: Mapping[str, TensorFile], config: QuantConfig) -> QuantizedWeight:
    own = config.for_linear(stem)
    assert own is not None
    packed = PackedWeight(*(written[f"{stem}.{part}"].tensor(f"{stem}.{part}") for part in PackedWeight._fields))
    return unpack(packed, own.bits, config.checkpoint_format)
