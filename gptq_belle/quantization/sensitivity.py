"""Measure the loss of each stage in 4 bits: the KL divergence of the model's output with that stage alone in 4 bits.

One pass over the source with one block in memory at a time. Some rows of text run through it in several versions: the
unchanged one, and one for every earlier stage in 4 bits. After the last block, the predictions of all versions are
compared. A pass of `TOKENS` tokens takes TOKENS * (blocks * stages)^2 / (2 * stages) token-blocks:
for a 7B model a tenth of what calibration with 128 rows of 2048 tokens takes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_belle.checkpoint.empty_model import assign
from gptq_belle.formats.gptq_weight import dequantize
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.hessian import HessianMean
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.solver import factorize, gptq

TOKENS, ROW = 2048, 256  # measured tokens, and tokens per row
SOLVER_TOKENS = 16384  # other tokens, for the solver's Hessians
LOW_BITS = 4


def measure_losses(job: QuantizationJob, stages: Sequence[tuple[int, tuple[str, ...]]], scratch: Path,
                   step: Callable[[int], None]) -> list[float]:
    """The mean KL(full || one stage in 4 bits) over the measured tokens, in nats per token.

    Args:
        job: the job, with its calibration rows.
        stages: (block, linears with the same input) of each stage to measure, by block.
        scratch: path of a temporary file for the activations.
        step: called with the index of each block when it starts.
    Returns:
        A loss for each of `stages`.
    """
    stream = job.stream
    rows, seen = _rows(job)
    hidden = int(stream.model.config.hidden_size)
    count = (1 + len(stages)) * rows.numel() * hidden
    try:  # a mapped file: anonymous memory stays that of one block
        states = torch.from_file(str(scratch), shared=True, size=count + seen.numel() * hidden, dtype=torch.float32)
        versions = states[:count].view(1 + len(stages), *rows.shape, hidden)
        solved = states[count:].view(*seen.shape, hidden)
        for place, tokens in ((versions[0], rows), (solved, seen)):
            for part, batch in zip(place.split(len(stream.batches(tokens)[0])), stream.embed(tokens), strict=True):
                part.copy_(batch)
        for index in range(stream.count):
            step(index)
            _advance(job.config, stream, index, stages, versions, solved)
        return _divergences(stream, versions)
    finally:
        scratch.unlink(missing_ok=True)


def scratch_bytes(job: QuantizationJob, stages: int) -> int:
    """Size of the temporary file for this number of stages."""
    rows, seen = _rows(job)
    return 4 * int(job.stream.model.config.hidden_size) * ((1 + stages) * rows.numel() + seen.numel())


def _rows(job: QuantizationJob) -> tuple[Tensor, Tensor]:
    """Rows to measure, from the end of the calibration rows, and rows for the solver, from their beginning."""
    assert job.tokens is not None
    length = min(ROW, job.tokens.shape[1])
    pieces = job.tokens[:, : job.tokens.shape[1] // length * length].reshape(-1, length)
    measured = max(1, min(TOKENS // length, len(pieces) // 4))
    return pieces[-measured:], pieces[: max(1, min(SOLVER_TOKENS // length, len(pieces) - measured))]


def _advance(config: QuantConfig, stream: BlockStream, index: int, stages: Sequence[tuple[int, tuple[str, ...]]],
             versions: Tensor, solved: Tensor) -> None:
    """Replace all versions and the solver's rows by the outputs of block `index`; start the versions of its stages."""
    block = stream.load_block(index)
    stream.prefetch(index + 1)
    for place, (owner, stage) in enumerate(stages):
        if owner < index:
            versions[1 + place] = stream.run(block, versions[1 + place])
        elif owner == index:
            with _in_few_bits(config, stream, block, stage, solved):
                versions[1 + place] = stream.run(block, versions[0])
    versions[0] = stream.run(block, versions[0])
    for batch in solved.split(_batch(stream, solved)):
        batch.copy_(stream.run(block, batch))
    stream.release(block)


@contextmanager
def _in_few_bits(config: QuantConfig, stream: BlockStream, block: nn.Module, stage: Sequence[str],
                 solved: Tensor) -> Iterator[None]:
    """The block with one stage in 4 bits, by plain GPTQ."""
    own = replace(config, bits=LOW_BITS, preset="fast", without=(), overrides=(), auto_bits=None)
    total = HessianMean(block.get_parameter(f"{stage[0]}.weight").shape[1], stream.device)
    for batch in solved.split(_batch(stream, solved)):
        total.add(stream.linear_input(block, stage[0], batch))
    hessian = total.value
    factor = factorize(hessian, own)
    before = {name: block.get_parameter(f"{name}.weight") for name in stage}
    for name, weight in before.items():
        assign(block, f"{name}.weight", dequantize(gptq(weight, hessian, own, factor).weight))
    yield
    for name, weight in before.items():
        assign(block, f"{name}.weight", weight.detach())


def _batch(stream: BlockStream, states: Tensor) -> int:
    return len(stream.batches(torch.empty(states.shape[:2], device="meta"))[0])


def _divergences(stream: BlockStream, versions: Tensor) -> list[float]:
    """KL of each version's predictions from the first one's, with some rows of the head in memory at a time."""
    with stream.final_norm() as normalize:
        for version in versions:
            version.copy_(normalize(version))
    states = versions.flatten(1, 2)
    full, *others = states.to(stream.device) if stream.device.type == "cuda" else states
    clean = torch.full((len(full),), -torch.inf, device=full.device)
    for head in stream.head():
        clean = torch.logaddexp(clean, (full @ head.t()).logsumexp(1))
    cross = torch.zeros(len(others), len(full), dtype=torch.float64)
    norms = torch.full((len(others), len(full)), -torch.inf, dtype=torch.float64)
    for head in stream.head():
        logits = full @ head.t()
        chances = (logits - clean[:, None]).exp()
        for place, other in enumerate(others):
            theirs = other @ head.t()
            cross[place] += ((logits - theirs) * chances).sum(1, dtype=torch.float64).cpu()
            norms[place] = torch.logaddexp(norms[place], theirs.logsumexp(1).double().cpu())
    return [max(0.0, value) for value in (cross + norms - clean.double().cpu()).mean(1).tolist()]
