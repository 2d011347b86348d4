"""The quantized model as something to train: codes fixed, scales, biases and norms trainable."""

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
    """Parameters that are (1 + change) times what they were, as float16 holds it.

    Scales of different layers differ by orders of magnitude, and Adam's steps do not: so a scale's change is a share of
    itself, and that of a norm's or a bias's element a share of the root mean square of all of it, for single elements
    may be 0. Rounding to float16 has no gradient; it is passed over (arXiv 1308.3432, section 3: straight through).

    Args:
        parameters: matrices of scales, and vectors.

    Attributes:
        vector: a parameter, the changes; 0 at first.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._begun = torch.cat([part.detach().flatten() for part in self.parameters])
        self._units = torch.cat([_unit(part.detach()).flatten() for part in self.parameters])
        self.vector = nn.Parameter(torch.zeros_like(self._begun))

    @torch.no_grad()
    def apply(self, vector: Tensor | None = None) -> None:
        """Give the parameters the values that `vector` (or another one) stands for."""
        values = torch.addcmul(self._begun, self._units, self.vector if vector is None else vector)
        values = values.to(torch.float16).float()
        for part, value in zip(self.parameters, values.split([part.numel() for part in self.parameters]), strict=True):
            part.copy_(value.view(part.shape))

    @torch.no_grad()
    def collect(self) -> None:
        """Turn the parameters' gradients into the vector's."""
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in self.parameters]
        self.vector.grad = torch.cat([grad.flatten() for grad in grads]).mul_(self._units)
        for part in self.parameters:
            part.grad = None


def _unit(part: Tensor) -> Tensor:
    return part.abs() if part.ndim == 2 else part.square().mean().sqrt().expand(part.shape)


class TrainableLinear(nn.Module):
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


class Student:
    """Blocks and last norm of a model, in float32; scales, biases and norms are trained.

    Args:
        stream: the source; what the blocks get beside hidden states is the student's too.
        blocks: as transformers has them, packed linears replaced by tunable ones.
        after: what comes behind them, in front of the head.
        parameters: what is trained, by the names of the file, in an order that does not change; scales are (N, G).
    """

    def __init__(self, stream: BlockStream, blocks: Sequence[nn.Module], after: Sequence[nn.Module],
                 parameters: dict[str, nn.Parameter]) -> None:
        self.stream, self.blocks, self.after, self.parameters = stream, blocks, after, parameters

    def run(self, states: Tensor) -> Tensor:
        """States (rows, T, hidden_size) from in front of the first block to behind the last norm.

        What a block computes inside is computed again on the way back: memory holds one block's at a time.
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
        """The parameters as the file holds them: float16, scales (G, N)."""
        return {name: (part.detach().t() if part.ndim == 2 else part.detach()).to("cpu", torch.float16).contiguous()
                for name, part in self.parameters.items()}


def read_student(stream: BlockStream, written: Mapping[str, TensorFile], config: QuantConfig) -> Student:
    """The student of a source whose blocks are quantized.

    Args:
        stream: the source.
        written: by name, the file that holds a tensor of the quantized model.
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
    """Read a module's parameters; those that are trained are vectors, and the scales of packed weights."""
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
            weight = _solved(stem, written, config)
            tunable = TrainableLinear(QuantizedWeight(*(part.to(stream.device) for part in weight)), linear.bias)
            parameters[f"{stem}.scales"] = tunable.scales
            module.set_submodule(name, tunable)
    return parameters


def _solved(stem: str, written: Mapping[str, TensorFile], config: QuantConfig) -> QuantizedWeight:
    own = config.of(stem)
    assert own is not None
    packed = PackedWeight(*(written[f"{stem}.{part}"].tensor(f"{stem}.{part}") for part in PackedWeight._fields))
    return unpack(packed, own.bits, config.checkpoint_format)
