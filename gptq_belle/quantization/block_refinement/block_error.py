"""The error of a block's output on some calibration rows, and its gradient for one linear at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gptq_belle.quantization.activations import ActivationPair
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.stage_hessians import OriginalWeights

LEAST_CURVATURE = 0.1  # of the mean: outputs that one sample of the curvature shows as irrelevant are not


class BlockError:
    """Mean squared difference between the block's output in the quantized and in the full-precision model.

    It is relative to the variance of the latter. The quantized weights are the parameters of the block.

    Args:
        stream: the stream that has loaded the block.
        block: the block.
        inputs, targets: inputs in the quantized model and outputs in the full-precision model, one tensor
            (rows, T, hidden_size) float32 on the CPU per batch.
    """

    def __init__(self, stream: BlockStream, block: nn.Module, inputs: Sequence[Tensor],
                 targets: Sequence[Tensor]) -> None:
        self.stream, self.block, self.inputs, self.targets = stream, block, inputs, targets
        self._elements = sum(part.numel() for part in targets)
        mean = sum(float(part.sum(dtype=torch.float64)) for part in targets) / self._elements
        square = sum(float(part.square().sum(dtype=torch.float64)) for part in targets) / self._elements
        self._scale = 1 / max(square - mean * mean, 1e-30) / self._elements

    @torch.no_grad()
    def value(self) -> float:
        """The error."""
        return sum(float(self._of(*pair)) for pair in self._pieces())

    def gradient(self, linear: str) -> tuple[float, Tensor]:
        """The error, and its gradient (N, K) float32 for the weight of one linear.

        The backward pass ends at the linear, and memory holds one gradient.
        """
        weight = self.block.get_parameter(f"{linear}.weight")
        error = 0.0
        weight.requires_grad_()
        try:
            for pair in self._pieces():
                part = self._of(*pair)
                part.backward()
                error += float(part.detach())
            assert weight.grad is not None
            return error, weight.grad
        finally:
            weight.grad = None
            weight.requires_grad_(False)

    def curvature(self, linear: str) -> Tensor:
        """How much the error grows with the square of each of a linear's outputs (N,), if it differs at one token.

        One sample, on the first piece of rows, of the diagonal of the Gauss-Newton matrix: the squared derivatives of
        the block's output times random signs (Hutchinson's estimator). It sums over tokens as if each was alone.
        """
        generator = torch.Generator().manual_seed(0)
        outputs: list[Tensor] = []

        def watch(_: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs.append(output.detach().requires_grad_())
            return outputs[0] + 0  # the block may write into it

        states, target = next(self._pieces())
        hook = self.block.get_submodule(linear).register_forward_hook(watch)
        try:
            result = self.stream.forward(self.block, states)
        finally:
            hook.remove()
        signs = torch.randint(0, 2, target.shape, generator=generator).float().mul_(2).sub_(1)
        result.backward(signs.to(result.device))
        assert outputs[0].grad is not None
        squares = outputs[0].grad.flatten(0, -2).square().mean(0)
        return (squares + LEAST_CURVATURE * squares.mean()) * (self._scale * self._elements / target.shape[-1])

    def _of(self, states: Tensor, target: Tensor) -> Tensor:
        output = self.stream.forward(self.block, states)
        return (output - target.to(output.device)).square().sum() * self._scale

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        for states, target in zip(self.inputs, self.targets, strict=True):
            rows = self.stream.max_rows or len(states)
            yield from zip(states.split(rows), target.split(rows), strict=True)


def block_error(stream: BlockStream, block: nn.Module, originals: OriginalWeights, activations: ActivationPair,
                rows: set[int]) -> BlockError:
    """The error on some calibration rows.

    Args:
        stream, block: as for `BlockError`.
        originals: the block's full-precision weights.
        activations: inputs of the block in both models.
        rows: indices of calibration rows.
    """
    assert activations.full is not None
    inputs, targets, first = [], [], 0
    for states, full in zip(activations.quantized, activations.full, strict=True):
        chosen = [place for place in range(len(states)) if first + place in rows]
        first += len(states)
        if chosen:
            inputs.append(states[chosen])
            with originals.restored(block):
                targets.append(stream.run(block, full[chosen]))
    return BlockError(stream, block, inputs, targets)
