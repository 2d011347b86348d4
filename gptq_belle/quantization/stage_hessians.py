"""Accumulate the Hessian of each stage of linears over the calibration rows, of which some are held out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from gptq_belle.quantization.activations import BatchSource
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.hessian import CrossProductMean, HessianMean

HELD_OUT_TOKENS = 4096  # at most: enough to distinguish two solutions, with less memory than a second Hessian


class StageHessians(NamedTuple):
    """Statistics of a stage's inputs: X in the quantized model, and F in the full-precision model."""

    hessian: Tensor  # (K, K), the mean of x x^T
    cross: Tensor | None = None  # (K, K), the mean of (f - x) x^T; None without targets
    held_out: Sequence[tuple[Tensor, Tensor]] = ()  # X and F (tokens, K) of held-out rows; F is X without targets
    scales: Tensor | None = None  # (K,), what inputs are divided and weights multiplied by (`channel_scales`)


class OriginalWeights:
    """Parameters of a block in the full-precision model, where the quantized model's differ."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def save(self, block: nn.Module, stage: tuple[str, ...], norm: str) -> None:
        """Keep the weights of a stage and the parameters of its norm, without copies: do not write them in place."""
        names = [f"{norm}.{name}" for name, _ in block.get_submodule(norm).named_parameters()] if norm else []
        for name in (*names, *(f"{linear}.weight" for linear in stage)):
            self.weights[name] = block.get_parameter(name).data

    @contextmanager
    def restored(self, block: nn.Module) -> Iterator[None]:
        """A context in which the block has its full-precision weights."""
        self._swap(block)
        try:
            yield
        finally:
            self._swap(block)

    def _swap(self, block: nn.Module) -> None:
        for name, weight in self.weights.items():
            parameter = block.get_parameter(name)
            self.weights[name], parameter.data = parameter.data, weight


def held_out_rows(rows: int, length: int, *, every: int) -> int:
    """Number of rows to hold out: one in `every` (0 for none), at most `HELD_OUT_TOKENS` or one row."""
    return 0 if not every else min(rows // every, max(1, HELD_OUT_TOKENS // length))


def accumulate_hessians(stream: BlockStream, block: nn.Module, stage: tuple[str, ...], batches: BatchSource,
                        full: tuple[OriginalWeights, BatchSource] | None, hessian_rows: int,
                        advance: Callable[[], None]) -> StageHessians:
    """Run the calibration rows up to a stage and accumulate its Hessians, with targets in both models.

    Args:
        stream: the stream that has loaded the block.
        block: the block; linears of earlier stages are already quantized.
        stage: names of linears with the same input.
        batches: inputs of the block (batch, T, hidden_size) in the quantized model.
        full: the block's original weights, and its inputs in the full-precision model; None without targets.
        hessian_rows: number of rows to accumulate, from the first one on; the others are held out.
        advance: progress callback, called after each batch.
    """
    features = block.get_parameter(f"{stage[0]}.weight").shape[1]
    hessian = HessianMean(features, stream.device)
    cross = None if full is None else CrossProductMean(features, stream.device)
    held_out: list[tuple[Tensor, Tensor]] = []
    for x, f in _inputs(stream, block, stage, batches, full, advance):
        count = max(0, min(len(x), hessian_rows))
        hessian_rows -= count
        with stream.clock("hessians"):
            if count:
                hessian.add(x[:count])
                if cross is not None:
                    cross.add(f[:count] - x[:count], x[:count])
            if count < len(x):  # copies, so that the rest of the batch can be freed
                kept = x[count:].flatten(0, 1).clone()
                held_out.append((kept, kept if f is x else f[count:].flatten(0, 1).clone()))
    return StageHessians(hessian.value, None if cross is None else cross.value, held_out)


def _inputs(stream: BlockStream, block: nn.Module, stage: tuple[str, ...], batches: BatchSource,
            full: tuple[OriginalWeights, BatchSource] | None, advance: Callable[[], None],
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """The stage's inputs (rows, T, K) in the quantized and in the full-precision model, some rows at a time."""
    pairs = ((states, states) for states in batches) if full is None else zip(batches, full[1], strict=True)
    full_pass = nullcontext(nullcontext) if full is None else full[1].attention.forward_pass(block, stream.arch, stage)
    with batches.attention.forward_pass(block, stream.arch, stage) as piece_context, full_pass as full_context:
        for states, full_states in pairs:
            rows = stream.max_rows or len(states)
            for piece, full_piece in zip(states.split(rows), full_states.split(rows), strict=True):
                with piece_context():
                    x = f = stream.linear_input(block, stage[0], piece)
                if full is not None:
                    with full[0].restored(block), full_context():
                        f = stream.linear_input(block, stage[0], full_piece)
                yield x, f
            advance()
