"""What a job will take, before it starts: memory and disk by arithmetic, time from one block and one batch of its rows.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptq_belle.formats.gptq_weight import dequantize, pack
from gptq_belle.quantization.activations import InMemoryActivations
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.end_to_end.tuning_estimate import check_tuning, tuning_seconds
from gptq_belle.quantization.end_to_end.tuning_rows import tuning_scratch_bytes
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.memory_estimate import estimate_memory, must_spill, output_bytes
from gptq_belle.quantization.solution_choice import best_solution
from gptq_belle.quantization.solver import factorize, round_to_nearest
from gptq_belle.quantization.stage_hessians import OriginalWeights, StageHessians, accumulate_hessians


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `quantize --dry-run` prints.

    Attributes:
        seconds: wall time.
        memory: peak of anonymous memory, in bytes.
        spilled: activations are kept on disk only.
        disk: bytes that ``OUT.partial`` and the output hold at their fullest.
        output: bytes of the weight files at the end.
        blocks, linears, tokens: what there is to do.
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
    """Measure one block and do the arithmetic for the rest.

    Args:
        job: the job.
        limit: see `must_spill`.
    Raises:
        HardwareError: see `must_spill` and `tuning_cost.check_tuning`.
    """
    memory, spill = estimate_memory(job), must_spill(job, limit)
    output = output_bytes(job)
    generations = (1 if job.stream.count == 1 else 2) + (1 if spill else 0)  # and what attention has made of one
    tuning, scratch = check_tuning(job, limit), tuning_scratch_bytes(job) if job.config.techniques.tuning_steps else 0
    disk = output + max(output, generations * memory.activations // 2, scratch)
    return Estimate(_seconds(job), max(memory.floor if spill else memory.total, tuning), spill, disk, output,
                    job.stream.count, job.stream.count * len(job.stream.arch.linears),
                    0 if job.tokens is None else job.tokens.numel())


def _seconds(job: QuantizationJob) -> float:
    """One block's work on one batch, and what follows from it for all."""
    stream, hashed = job.stream, _seconds_a_byte()
    block = stream.load_block(0)
    batch, models = None, 2 if job.config.techniques.alpha else 1
    if job.tokens is not None:
        batch = next(stream.embed(stream.batches(job.tokens)[0]))
        stream.run(block, batch)  # the first run of anything takes longer
    rows_of = [] if batch is None else [InMemoryActivations(batch), InMemoryActivations(batch.flip(0))][:models]
    rows = solving = 0.0
    for stage in stream.arch.stages:
        if (own := job.config.for_linear(f"{stream.arch.blocks}.0.{stage[0]}")) is None:
            continue
        began = time.perf_counter()
        found = None if batch is None else _hessians(job, block, stage, rows_of)
        rows += time.perf_counter() - began
        solving += _seconds_of_solving(own, block, stage, found)
    began = time.perf_counter()
    for states in rows_of:
        with states.attention.forward_pass(block, stream.arch) as piece_context:
            stream.run(block, states.batches[0], piece_context)
    rows += time.perf_counter() - began
    tuning = tuning_seconds(job, block) if job.config.techniques.tuning_steps else 0.0
    stream.release(block)
    batches = 0.0 if batch is None or job.tokens is None else job.tokens.numel() / math.prod(batch.shape[:2])
    written = 2 * output_bytes(job) + models * stream.count * 4 * batches * math.prod(
        batch.shape if batch is not None else ())
    return tuning + stream.count * (solving + batches * rows) + hashed * (2 * stream.reader.bytes_on_disk() + written)


def _hessians(job: QuantizationJob, block: torch.nn.Module, stage: tuple[str, ...],
              rows: Sequence[InMemoryActivations]) -> StageHessians:
    """Of one batch, for one model or two; as many rows are held out as the job will hold out, and targets differ from
    a layer's own."""
    full = (OriginalWeights(), rows[1]) if len(rows) == 2 else None
    seen = len(rows[0].batches[0]) - min(1, job.held_out)
    found = accumulate_hessians(job.stream, block, stage, rows[0], full, seen, lambda: None)
    return found._replace(held_out=[pair for pair in found.held_out for _ in range(job.held_out)])


def _seconds_of_solving(config: QuantConfig, block: torch.nn.Module, stage: tuple[str, ...],
                        found: StageHessians | None) -> float:
    """Of one stage; linears of one size are solved once and counted as often as they are."""
    began = time.perf_counter()
    factor = None if found is None else factorize(found.hessian, config)
    total = time.perf_counter() - began
    seen: dict[torch.Size, float] = {}
    for name in stage:
        weight = block.get_parameter(f"{name}.weight").detach()
        if weight.shape not in seen:
            began = time.perf_counter()
            solution = round_to_nearest(weight, config) if found is None or factor is None else best_solution(
                weight, found, factor, config).solution
            dequantize(solution.weight)
            pack(solution.weight, config.bits, config.checkpoint_format)
            seen[weight.shape] = time.perf_counter() - began
        total += seen[weight.shape]
    return total


def _seconds_a_byte() -> float:
    """Of a checksum; what is read or written goes through one."""
    data = bytes(32 << 20)
    began = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - began) / len(data)
