"""`quantize --dry-run`: memory and disk computed from sizes, time measured on one block and one batch of its rows."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptq_belle.formats.gptq_weight import dequantize, pack
from gptq_belle.quantization.activations import InMemoryActivations
from gptq_belle.quantization.block_refinement.block_error import BlockError
from gptq_belle.quantization.block_refinement.quadratic_step import quadratic_step
from gptq_belle.quantization.block_refinement.refinement import rows_per_round
from gptq_belle.quantization.candidate_selection import best_solution
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.memory_estimate import estimate_memory, must_spill, output_bytes
from gptq_belle.quantization.solver import factorize, round_to_nearest
from gptq_belle.quantization.stage_hessians import OriginalWeights, StageHessians, accumulate_hessians

PASSES_PER_STEP = 1.4  # of block refinement, with rejected steps and the first gradient of a round, as measured


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a job.

    Attributes:
        seconds: wall time.
        memory: peak of anonymous memory, in bytes.
        spilled: whether activations are stored on disk only.
        disk: peak size of ``OUT.partial`` and the output, in bytes.
        output: size of the finished weight files, in bytes.
        blocks, linears, tokens: number of blocks, quantized linears and calibration tokens.
    """

    seconds: float
    memory: int
    spilled: bool
    disk: int
    output: int
    blocks: int
    linears: int
    tokens: int


def estimate(job: QuantizationJob, limit: int | None = None) -> Estimate:
    """Estimate the cost of a job from one block.

    Args:
        limit: see `must_spill`.
    Raises:
        HardwareError: see `must_spill`.
    """
    memory, spill = estimate_memory(job), must_spill(job, limit)
    output = output_bytes(job)
    generations = (1 if job.stream.count == 1 else 2) + (1 if spill else 0)  # and the outputs of attention
    disk = output + max(output, generations * memory.activations // 2)
    return Estimate(_seconds(job), memory.floor if spill else memory.total, spill, disk, output,
                    job.stream.count, job.stream.count * len(job.stream.arch.linears),
                    0 if job.tokens is None else job.tokens.numel())


def _seconds(job: QuantizationJob) -> float:
    """Wall time of the job, extrapolated from the work of one block on one batch."""
    stream, hashed = job.stream, _checksum_seconds_per_byte()
    block = stream.load_block(0)
    batch, models = None, 2 if job.config.techniques.full_precision else 1
    if job.tokens is not None:
        batch = next(stream.embed(stream.batches(job.tokens)[0]))
        stream.run(block, batch)  # warm-up
    rows_of = [] if batch is None else [InMemoryActivations(batch), InMemoryActivations(batch.flip(0))][:models]
    rows = solving = 0.0
    for stage in stream.arch.stages:
        if (own := job.config.for_linear(f"{stream.arch.blocks}.0.{stage[0]}")) is None:
            continue
        start = time.perf_counter()
        found = None if batch is None else _hessians(job, block, stage, rows_of)
        rows += time.perf_counter() - start
        solving += _seconds_of_solving(own, block, stage, found)
    start = time.perf_counter()
    for states in rows_of:
        with states.attention.forward_pass(block, stream.arch) as piece_context:
            stream.run(block, states.batches[0], piece_context)
    rows += time.perf_counter() - start
    refining = _seconds_of_refinement(job, block, rows_of) if job.config.techniques.rounds and rows_of else 0.0
    stream.release(block)
    batches = 0.0 if batch is None or job.tokens is None else job.tokens.numel() / math.prod(batch.shape[:2])
    written = 2 * output_bytes(job) + models * stream.count * 4 * batches * math.prod(
        batch.shape if batch is not None else ())
    return stream.count * (solving + batches * rows + refining) + hashed * (2 * stream.reader.bytes_on_disk() + written)


def _hessians(job: QuantizationJob, block: torch.nn.Module, stage: tuple[str, ...],
              rows: Sequence[InMemoryActivations]) -> StageHessians:
    """Hessians of one batch, with as many held-out rows as the job has, for one model or for both models of a job that
    corrects targets."""
    full = (OriginalWeights(), rows[1]) if len(rows) == 2 else None
    seen = len(rows[0].batches[0]) - min(1, job.held_out)
    found = accumulate_hessians(job.stream, block, stage, rows[0], full, seen, lambda: None)
    return found._replace(held_out=[pair for pair in found.held_out for _ in range(job.held_out)])


def _seconds_of_solving(config: QuantConfig, block: torch.nn.Module, stage: tuple[str, ...],
                        found: StageHessians | None) -> float:
    """Solving time of one stage; linears of equal size are measured once."""
    start = time.perf_counter()
    factor = None if found is None else factorize(found.hessian, config)
    total = time.perf_counter() - start
    seen: dict[torch.Size, float] = {}
    for name in stage:
        weight = block.get_parameter(f"{name}.weight").detach()
        if weight.shape not in seen:
            start = time.perf_counter()
            solution = round_to_nearest(weight, config) if found is None or factor is None else best_solution(
                weight, found, factor, config).solution
            dequantize(solution.weight)
            pack(solution.weight, config.bits, config.checkpoint_format)
            seen[weight.shape] = time.perf_counter() - start
        total += seen[weight.shape]
    return total


def _seconds_of_refinement(job: QuantizationJob, block: torch.nn.Module,
                           rows_of: Sequence[InMemoryActivations]) -> float:
    """Time of refining one block, from a round on one batch with Hessians of 1 and weights rounded to nearest."""
    stream, techniques = job.stream, job.config.techniques
    assert job.tokens is not None
    states = rows_of[0].batches[0]
    error, total = BlockError(stream, block, [states], [states]), 0.0
    for name, shape in stream.linear_shapes.items():
        own = job.config.for_linear(f"{stream.arch.blocks}.0.{name}")
        if own is None:
            continue
        weight = round_to_nearest(block.get_parameter(f"{name}.weight").detach(), own).weight
        start = time.perf_counter()
        _, gradient = error.gradient(name)
        batches = rows_per_round(len(job.tokens) - job.held_out, states.shape[1]) / len(states)
        total += PASSES_PER_STEP * batches * (time.perf_counter() - start)
        ones = torch.ones(shape.out_features, device=stream.device)
        start = time.perf_counter()
        quadratic_step(weight, gradient, torch.eye(shape.in_features, device=stream.device), ones, own.bits,
                       positive=own.positive_scales)
        total += time.perf_counter() - start
    return techniques.rounds * total


def _checksum_seconds_per_byte() -> float:
    """Time of a SHA-256 checksum per byte; everything read or written is checksummed."""
    data = bytes(32 << 20)
    start = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - start) / len(data)
