"""Accumulate the Hessian of each stage of linears over the calibration rows; some rows are held out of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from gptq_belle.quantization.activations import Activations
from gptq_belle.quantization.attention_outputs import BatchList
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.hessian import CrossProductMean, HessianMean

HELD_OUT_TOKENS = 4096  # at most: enough to tell two solutions apart, and less memory than a second Hessian


class StageHessians(NamedTuple):
    """Of the inputs X that the linears of one stage share, and of the full-precision model's there, F."""

    hessian: Tensor  # (K, K), the mean of x x^T
    cross: Tensor | None = None  # (K, K), the mean of (f - x) x^T; None where there are no targets
    held_out: Sequence[tuple[Tensor, Tensor]] = ()  # X and F (tokens, K) of held-out rows


class OriginalWeights:
    """Full-precision weights of the linears of a block that are quantized already, to be put back for a while."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def keep(self, block: nn.Module, name: str) -> None:
        """Keep a parameter as it is now; what is put in its place must not write over it."""
        self.weights[name] = block.get_parameter(name).data

    @contextmanager
    def in_place(self, block: nn.Module) -> Iterator[None]:
        """The block is the full-precision model's inside, and the quantized one's again behind it."""
        self._swap(block)
        try:
            yield
        finally:
            self._swap(block)

    def _swap(self, block: nn.Module) -> None:
        for name, weight in self.weights.items():
            parameter = block.get_parameter(name)
            self.weights[name], parameter.data = parameter.data, weight


def held_out_rows(rows: int, length: int, *, share: int) -> int:
    """How many rows are held out: one in `share`, but no more than `HELD_OUT_TOKENS`, and none of fewer than `share`.
    """
    return 0 if not share else min(rows // share, max(1, HELD_OUT_TOKENS // length))


def accumulate_hessians(stream: BlockStream, block: nn.Module, stage: tuple[str, ...], batches: Activations | BatchList,
                        full: tuple[OriginalWeights, Activations | BatchList] | None, seen: int,
                        advance: Callable[[], None]) -> StageHessians:
    """Run the calibration rows up to a stage, through the full-precision block too where there are targets.

    Args:
        stream: of the block.
        block: whose linears of earlier stages are quantized already.
        stage: names of linears that see the same input.
        batches: (batch, T, hidden_size) in front of the block, in the quantized model.
        full: the block's original weights, and the batches in the full-precision model.
        seen: how many rows, from the first one on, are summed up; those behind them are held out.
        advance: called once a batch.
    """
    features = block.get_parameter(f"{stage[0]}.weight").shape[1]
    hessian = HessianMean(features, stream.device)
    cross = None if full is None else CrossProductMean(features, stream.device)
    held: list[tuple[Tensor, Tensor]] = []
    for x, f in _inputs(stream, block, stage, batches, full, advance):
        count = max(0, min(len(x), seen))
        seen -= count
        with stream.clock("hessians"):
            if count:
                hessian.add(x[:count])
                if cross is not None:
                    cross.add(f[:count] - x[:count], x[:count])
            if count < len(x):  # copies, so that the rest of the batch can go
                kept = x[count:].flatten(0, 1).clone()
                held.append((kept, kept if f is x else f[count:].flatten(0, 1).clone()))
    return StageHessians(hessian.value, None if cross is None else cross.value, held)


def _inputs(stream: BlockStream, block: nn.Module, stage: tuple[str, ...], batches: Activations | BatchList,
            full: tuple[OriginalWeights, Activations | BatchList] | None, advance: Callable[[], None],
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """A linear's inputs in the quantized and in the full-precision model, (rows, T, K), some rows at a time."""
    pairs = ((states, states) for states in batches) if full is None else zip(batches, full[1], strict=True)
    full_pass = nullcontext(nullcontext) if full is None else full[1].attention.forward_pass(block, stream.arch, stage)
    with batches.attention.forward_pass(block, stream.arch, stage) as piece_context, full_pass as full_context:
        for states, others in pairs:
            rows = stream.max_rows or len(states)
            for piece, other in zip(states.split(rows), others.split(rows), strict=True):
                with piece_context():
                    x = f = stream.linear_input(block, stage[0], piece)
                if full is not None:
                    with full[0].in_place(block), full_context():
                        f = stream.linear_input(block, stage[0], other)
                yield x, f
            advance()
