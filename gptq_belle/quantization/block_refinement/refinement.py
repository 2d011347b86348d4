"""Refine a block after all its linears are quantized: steps on one linear after the other, held-out rows decide.

GPTQ minimizes the error of each linear's own output. Here the error is that of the block's output, on inputs from the
quantized model, against the full-precision model: linears compensate each other's errors. Rounding is learned for the
same objective by AdaRound, BRECQ (arXiv 2102.05426) and auto-round (arXiv 2309.05516), with gradient descent on
relaxed codes. A step here is coordinate descent on the codes themselves, which the Hessian of the inputs preconditions:
with strongly correlated inputs the sign of a gradient says little about the code that lowers the error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.formats.gptq_weight import PackedWeight, QuantizedWeight, dequantize, unpack
from gptq_belle.models.architectures import Architecture
from gptq_belle.quantization.activations import ActivationPair
from gptq_belle.quantization.block_refinement.block_error import BlockError, block_error
from gptq_belle.quantization.block_refinement.quadratic_step import Step, quadratic_step
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.hessian import output_error
from gptq_belle.quantization.stage_hessians import OriginalWeights, StageHessians

TOKENS_PER_ROUND = 1 << 15  # at most; each round takes the following rows
# First damping of a step, by place of the linear. `BlockError.curvature` takes tokens as independent, but attention
# adds up their errors; and it takes outputs as independent, but those of the feed-forward's first linears share inputs.
# 1 is exact where the block's output is linear in the weight. Measured on the demo models.
BEFORE_ATTENTION, ATTENTION_OUTPUT, FEED_FORWARD, LAST = 16.0, 1.5, 6.0, 1.0
LEAST_DAMPING = 0.3
LARGEST_INCREASE, LARGEST_DECREASE = 10.0, 3.0  # of the damping, from one step to the next


def first_dampings(arch: Architecture) -> list[float]:
    """First damping of a step for each stage of a block's linears."""
    found = [BEFORE_ATTENTION if index < arch.output_stage else ATTENTION_OUTPUT if index == arch.output_stage else
             FEED_FORWARD for index in range(len(arch.stages))]
    return [*found[:-1], LAST]


@dataclass(frozen=True, slots=True)
class RefinedLinear:
    """A quantized linear of the block, and what its steps need."""

    weight: QuantizedWeight
    inputs: StageHessians
    config: QuantConfig
    damping: float  # factor on the measured curvature

    def step(self, gradient: Tensor, curvature: Tensor) -> Step:
        """`quadratic_step` with the linear's settings."""
        return quadratic_step(self.weight, gradient, self.inputs.hessian, self.damping * curvature, self.config.bits,
                              positive=self.config.positive_scales or not self.config.sym)

    def error(self, original: Tensor) -> float:
        """`output_error` against the full-precision weight (N, K)."""
        scales = self.inputs.scales
        return output_error(original if scales is None else original * scales, self.weight, self.inputs.hessian)

    def with_damping_of(self, step: Step, change: float) -> "RefinedLinear":
        """The linear with the damping that would have predicted the change of the error, within bounds."""
        measured = self.damping * (change - step.slope) / step.bend if step.bend > 0 else self.damping
        least = max(LEAST_DAMPING, self.damping / LARGEST_DECREASE)
        return replace(self, damping=min(max(measured, least), self.damping * LARGEST_INCREASE))


def rows_per_round(rows: int, length: int) -> int:
    """Number of calibration rows that a round reads, of `rows` with `length` tokens each."""
    return min(rows, max(1, TOKENS_PER_ROUND // length))


def refined_linear(packed: PackedWeight, inputs: StageHessians, config: QuantConfig, damping: float) -> RefinedLinear:
    """The linear before its first step."""
    weight = unpack(packed, config.bits, config.checkpoint_format)
    return RefinedLinear(weight, inputs, config, damping)


@dataclass(slots=True)
class RefinementResult:
    """Result of the refinement of one block, for the report.

    Attributes:
        block: index of the block.
        before, after: relative error of the block's output on held-out rows; without them on the first round's rows.
        kept: round whose weights are written; 0 where no round lowered that error.
        rejected: number of steps that raised the error of their round and were undone.
    """

    block: int
    before: float
    after: float
    kept: int = 0
    rejected: int = 0


class BlockRefinement:
    """Refines one block.

    Args:
        stream: the stream that has loaded the block.
        block: the block, with its quantized weights.
        linears: its quantized linears in execution order, by path inside the block; replaced by the refined ones.
        originals: the block's full-precision weights.
        activations: inputs of the block in both models.
    """

    def __init__(self, stream: BlockStream, block: nn.Module, linears: dict[str, RefinedLinear],
                 originals: OriginalWeights, activations: ActivationPair) -> None:
        self.stream, self.block, self.linears = stream, block, linears
        self.originals, self.activations = originals, activations
        self.rejected = 0

    def run(self, index: int, rounds: int, advance: Callable[[], None]) -> RefinementResult:
        """Run all rounds, and keep the weights with the smallest error on held-out rows.

        Args:
            index: index of the block.
            rounds: number of rounds; each makes one step on every linear.
            advance: progress callback, called after each step.
        """
        rows = sum(shape[0] for shape in self.activations.quantized.shapes)
        seen = self.activations.hessian_rows
        error = self._error(self._rows(0))
        held_out = self._error(set(range(seen, rows))) if seen < rows else error
        curvature = {name: error.curvature(name) for name in self.linears}
        before = held_out.value()
        result, best = RefinementResult(index, before, before), dict(self.linears)
        for number in range(1, rounds + 1):
            self._round(error, curvature, advance)
            if (after := held_out.value()) < result.after:
                result.after, result.kept, best = after, number, dict(self.linears)
            if number < rounds and self._rows(number) != self._rows(number - 1):
                error = self._error(self._rows(number))
        for name, linear in best.items():
            self._set(name, linear)
        result.rejected = self.rejected
        return result

    def _round(self, error: BlockError, curvature: dict[str, Tensor], advance: Callable[[], None]) -> None:
        """One step on every linear. A step that raises the error is undone; the next one is damped as measured."""
        names = list(self.linears)
        before, gradient = error.gradient(names[0])
        for name, following in zip(names, [*names[1:], None], strict=True):
            linear = self.linears[name]
            step = linear.step(gradient, curvature[name])
            self._set(name, replace(linear, weight=step.weight))
            after, gradient = (error.value(), gradient) if following is None else error.gradient(following)
            accepted = after < before
            self._set(name, replace(linear, weight=step.weight if accepted else linear.weight).with_damping_of(
                step, after - before))
            if accepted:
                before = after
            elif step.bend > 0:
                self.rejected += 1
                if following is not None:
                    _, gradient = error.gradient(following)
            advance()

    def _set(self, name: str, linear: RefinedLinear) -> None:
        self.linears[name] = linear
        assign(self.block, f"{name}.weight", dequantize(linear.weight))

    def _rows(self, number: int) -> set[int]:
        """Calibration rows of a round."""
        seen = self.activations.hessian_rows
        count = rows_per_round(seen, self.activations.quantized.shapes[0][1])
        return {(number * count + place) % seen for place in range(count)}

    def _error(self, rows: set[int]) -> BlockError:
        return block_error(self.stream, self.block, self.originals, self.activations, rows)
