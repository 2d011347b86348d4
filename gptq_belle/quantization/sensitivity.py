"""Measure the loss of each stage in 4 bits: the KL divergence of the model's output with that stage alone in 4 bits.

It takes one pass over the source, with one block in memory at a time. The measured rows run through it in several
versions: unchanged, and with each earlier stage alone in 4 bits. After the last block, the predictions of all versions
are compared. A pass of `TOKENS` tokens computes TOKENS * (blocks * stages)^2 / (2 * stages) token-blocks. For a 7B
model this is a tenth of what calibration with 128 rows of 2048 tokens computes.
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

TOKENS, ROW_TOKENS = 2048, 256  # measured tokens, and tokens per row
SOLVER_TOKENS = 16384  # other tokens, for the solver's Hessians
LOW_BITS = 4


def measure_losses(job: QuantizationJob, stages: Sequence[tuple[int, tuple[str, ...]]], scratch: Path,
                   step: Callable[[int], None]) -> list[float]:
    """Measure the mean KL(full || one stage in 4 bits) of each stage, in nats per token.

    Args:
        job: the job, with its calibration rows.
        stages: block index and linears of each stage to measure, ordered by block.
        scratch: path of a temporary file for the activations.
        step: called with the index of each block when it starts.
    Returns:
        The loss of each of `stages`.
    """
    stream = job.stream
    measured_rows, solver_rows = _split_rows(job)
    hidden = int(stream.model.config.hidden_size)
    count = (1 + len(stages)) * measured_rows.numel() * hidden
    total = count + solver_rows.numel() * hidden
    try:  # a mapped file: anonymous memory stays that of one block
        states = torch.from_file(str(scratch), shared=True, size=total, dtype=torch.float32)
        versions = states[:count].view(1 + len(stages), *measured_rows.shape, hidden)
        solver_states = states[count:].view(*solver_rows.shape, hidden)
        for place, tokens in ((versions[0], measured_rows), (solver_states, solver_rows)):
            for part, batch in zip(place.split(len(stream.batches(tokens)[0])), stream.embed(tokens), strict=True):
                part.copy_(batch)
        for index in range(stream.count):
            step(index)
            _run_block(job.config, stream, index, stages, versions, solver_states)
        return _divergences(stream, versions)
    finally:
        scratch.unlink(missing_ok=True)


def sensitivity_scratch_bytes(job: QuantizationJob, stages: int) -> int:
    """Size of the temporary file for this number of stages, in bytes."""
    measured_rows, solver_rows = _split_rows(job)
    return 4 * int(job.stream.model.config.hidden_size) * ((1 + stages) * measured_rows.numel() + solver_rows.numel())


def _split_rows(job: QuantizationJob) -> tuple[Tensor, Tensor]:
    """Rows to measure, from the end of the calibration rows, and rows for the solver, from their beginning."""
    assert job.tokens is not None
    length = min(ROW_TOKENS, job.tokens.shape[1])
    pieces = job.tokens[:, : job.tokens.shape[1] // length * length].reshape(-1, length)
    measured = max(1, min(TOKENS // length, len(pieces) // 4))
    return pieces[-measured:], pieces[: max(1, min(SOLVER_TOKENS // length, len(pieces) - measured))]


def _run_block(config: QuantConfig, stream: BlockStream, index: int, stages: Sequence[tuple[int, tuple[str, ...]]],
               versions: Tensor, solver_states: Tensor) -> None:
    """Replace versions and solver states by the outputs of block `index`, and start the versions of its stages."""
    block = stream.load_block(index)
    stream.prefetch(index + 1)
    for place, (quantized_block, stage) in enumerate(stages):
        if quantized_block < index:
            versions[1 + place] = stream.run(block, versions[1 + place])
        elif quantized_block == index:
            with _in_low_bits(config, stream, block, stage, solver_states):
                versions[1 + place] = stream.run(block, versions[0])
    versions[0] = stream.run(block, versions[0])
    for batch in solver_states.split(_rows_per_batch(stream, solver_states)):
        batch.copy_(stream.run(block, batch))
    stream.release(block)


@contextmanager
def _in_low_bits(config: QuantConfig, stream: BlockStream, block: nn.Module, stage: Sequence[str],
                 solver_states: Tensor) -> Iterator[None]:
    """A context in which one stage of the block is quantized to 4 bits by plain GPTQ."""
    low_bits = replace(config, bits=LOW_BITS, preset="fast", without=(), overrides=(), auto_bits=None)
    total = HessianMean(block.get_parameter(f"{stage[0]}.weight").shape[1], stream.device)
    for batch in solver_states.split(_rows_per_batch(stream, solver_states)):
        total.add(stream.linear_input(block, stage[0], batch))
    hessian = total.value
    factor = factorize(hessian, low_bits)
    before = {name: block.get_parameter(f"{name}.weight") for name in stage}
    for name, weight in before.items():
        assign(block, f"{name}.weight", dequantize(gptq(weight, hessian, low_bits, factor).weight))
    yield
    for name, weight in before.items():
        assign(block, f"{name}.weight", weight.detach())


def _rows_per_batch(stream: BlockStream, states: Tensor) -> int:
    return len(stream.batches(torch.empty(states.shape[:2], device="meta"))[0])


def _divergences(stream: BlockStream, versions: Tensor) -> list[float]:
    """KL(first version || version) of each other version, with some rows of the head in memory at a time."""
    with stream.final_norm() as normalize:
        for version in versions:
            version.copy_(normalize(version))
    states = versions.flatten(1, 2)
    full, *others = states.to(stream.device) if stream.device.type == "cuda" else states
    full_normalizers = torch.full((len(full),), -torch.inf, device=full.device)
    for head in stream.head():
        full_normalizers = torch.logaddexp(full_normalizers, (full @ head.t()).logsumexp(1))
    differences = torch.zeros(len(others), len(full), dtype=torch.float64)
    normalizers = torch.full((len(others), len(full)), -torch.inf, dtype=torch.float64)
    for head in stream.head():
        logits = full @ head.t()
        probabilities = (logits - full_normalizers[:, None]).exp()
        for place, other in enumerate(others):
            other_logits = other @ head.t()
            differences[place] += ((logits - other_logits) * probabilities).sum(1, dtype=torch.float64).cpu()
            normalizers[place] = torch.logaddexp(normalizers[place], other_logits.logsumexp(1).double().cpu())
    return [max(0.0, value) for value in (differences + normalizers - full_normalizers.double().cpu()).mean(1).tolist()]
