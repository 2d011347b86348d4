"""Choose 4 or 8 bits for each stage of a model by its measured loss in 4 bits, within a budget.

The loss of each stage is measured alone (see `sensitivity`). On the two demo models these losses add up to 0.8 and 1.2
times the loss with all stages in 4 bits, and the loss in 8 bits is 1/300 of that in 4 bits. So the choice is a knapsack
problem in which 8 bits avoid the loss in 4 bits.
"""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptq_belle.common.memory import parse_bytes
from gptq_belle.errors import UsageError
from gptq_belle.quantization.config import Override, QuantConfig
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.journal import Journal
from gptq_belle.quantization.memory_estimate import output_bytes, written_bytes
from gptq_belle.quantization.overrides import resolve_overrides
from gptq_belle.quantization.report import JobProgress
from gptq_belle.quantization.sensitivity import LOW_BITS, measure_losses, sensitivity_scratch_bytes

HIGH_BITS = 8
FLOAT_BITS = 16  # bits per weight of linears that are not quantized
MAX_UNITS = 100_000  # size of the knapsack's table
BUDGET_REMEDY = "Give average bits per weight, such as 4.5, or a file size, such as 3.2GB."
HEADER_BYTES = 160  # upper bound per tensor in a safetensors header


@dataclass(frozen=True, slots=True)
class FreeStage:
    """A stage whose number of bits is chosen."""

    block: int  # index of its block
    linears: tuple[str, ...]  # names inside the block
    weights: int  # number of weights
    extra: int  # size in 8 bits minus size in 4 bits, in the unit of the budget: bits of codes, or bytes of the file


def stages_and_budget(job: QuantizationJob) -> tuple[list[FreeStage], int]:
    """The stages that no override matches, and what remains of the budget when all of them have 4 bits.

    Returns:
        The stages, and the remaining budget in the unit of `FreeStage.extra`.
    Raises:
        UsageError: an invalid budget, a budget too small for 4 bits, or settings that exclude a choice.
    """
    config, text = job.config, str(job.config.auto_bits)
    if config.bits != LOW_BITS or config.method != "gptq":
        raise UsageError(f"auto-bits chooses between {LOW_BITS} and {HIGH_BITS} bits by GPTQ, not with {config.bits} "
                         f"bits, method {config.method}", "Omit --bits and --method.")
    shapes, blocks = job.stream.linear_shapes, range(job.stream.count)
    sized = _bits_of(text) is None
    stages = []
    for index, linears in ((index, stage) for index in blocks for stage in job.stream.arch.stages):
        if _is_free(job, index, linears[0]):
            weights = sum(math.prod(shapes[name]) for name in linears)
            extra = (HIGH_BITS - LOW_BITS) * weights
            if sized:
                extra = sum(written_bytes(replace(config, bits=HIGH_BITS, auto_bits=None), shapes[name]) -
                            written_bytes(config, shapes[name]) for name in linears)
            stages.append(FreeStage(index, linears, weights, extra))
    room = _room_in_bytes(job, text) if sized else _room_in_bits(job, float(text))
    if room < 0:
        raise UsageError(f"auto-bits {text} is too small for {LOW_BITS} bits and the overrides",
                         f"Allow {_smallest_budget(job, text, room)} or more.")
    return stages, room


def check_budget(job: QuantizationJob) -> None:
    """Raise where a job has a budget that cannot be met, see `stages_and_budget`."""
    if job.config.auto_bits is not None:
        stages_and_budget(job)


def choose_bits(job: QuantizationJob, journal: Journal,
                progress: JobProgress) -> tuple[QuantizationJob, dict[str, Any] | None]:
    """Measure losses and choose bits, or use those that an interrupted run of the same job has saved.

    Returns:
        The job with the chosen bits as overrides; and the bit allocation for the report, None without a budget:
        {"budget", "average_bits", "stages": [{"block", "linears", "weights", "loss" (nats per token), "bits"}]}.
    Raises:
        UsageError: see `stages_and_budget`.
    """
    if job.config.auto_bits is None:
        return job, None
    stages, room = stages_and_budget(job)
    if journal.bit_allocation is None:
        def step(index: int) -> None:
            progress.phase(f"measuring the loss of {LOW_BITS} bits in each stage: block {index + 1} of "
                           f"{job.stream.count}")

        losses = measure_losses(job, [(stage.block, stage.linears) for stage in stages],
                                journal.folder / "versions.f32", step)
        in_high_bits = knapsack(losses, [stage.extra for stage in stages], room)
        journal.save_bit_allocation({"budget": job.config.auto_bits, "stages": [
            {"block": stage.block, "linears": list(stage.linears), "weights": stage.weights, "loss": loss,
             "bits": HIGH_BITS if place in in_high_bits else LOW_BITS}
            for place, (stage, loss) in enumerate(zip(stages, losses, strict=True))]})
    assert journal.bit_allocation is not None
    high = {(row["block"], row["linears"][0]) for row in journal.bit_allocation["stages"] if row["bits"] == HIGH_BITS}
    chosen = replace(job, config=config_with_bits(job, high))
    average = average_bits(chosen)
    progress.phase(f"{HIGH_BITS} bits for {len(high)} of {len(stages)} stages, "
                   f"{average:.3f} bits per weight on average")
    return chosen, journal.bit_allocation | {"average_bits": average}


def describe_estimate(job: QuantizationJob) -> str:
    """The estimate of measuring and choosing for a dry run; "" without a budget.

    Raises:
        UsageError: see `stages_and_budget`.
    """
    if job.config.auto_bits is None:
        return ""
    stages, room = stages_and_budget(job)
    most = min(room, sum(stage.extra for stage in stages)) / (1 if _bits_of(str(job.config.auto_bits)) is None else 8)
    scratch = sensitivity_scratch_bytes(job, len(stages)) / 1e6
    return (f"{len(stages)} stages are measured first, with {scratch:,.1f} MB on disk and a time that is not included "
            f"above; those that get {HIGH_BITS} bits then add up to {most / 1e6:,.1f} MB")


def config_with_bits(job: QuantizationJob, in_high_bits: set[tuple[int, str]]) -> QuantConfig:
    """The config with 8 bits for some stages, each given by its block and its first linear."""
    arch, overrides = job.stream.arch, list(job.config.overrides)
    for stage in arch.stages:
        blocks = [str(index) for index in range(job.stream.count) if (index, stage[0]) in in_high_bits]
        if blocks:
            names = "|".join(map(re.escape, stage))
            pattern = rf"{re.escape(arch.blocks)}\.(?:{'|'.join(blocks)})\.(?:{names})$"
            overrides.append(Override(pattern, bits=HIGH_BITS))
    return resolve_overrides(replace(job.config, overrides=tuple(overrides)), arch, job.stream.count)


def knapsack(values: Sequence[float], costs: Sequence[int], room: int) -> set[int]:
    """Indices of the items with the largest total value whose total cost is at most `room`, by dynamic programming.

    The result is exact unless the greatest common divisor of the costs gives more than `MAX_UNITS` units. Then costs
    are rounded up to larger units.
    """
    unit = max(math.gcd(*costs), -(-room // MAX_UNITS), 1)
    size = room // unit
    best = np.zeros(size + 1)
    taken = np.zeros((len(values), size + 1), dtype=bool)
    for place, (value, cost) in enumerate(zip(values, costs, strict=True)):
        units = -(-cost // unit)
        if units <= size:
            with_it = best[: size + 1 - units] + value
            taken[place, units:] = with_it > best[units:]
            best[units:] = np.maximum(best[units:], with_it)
    found, left = set(), size
    for place in reversed(range(len(values))):
        if taken[place, left]:
            found.add(place)
            left -= -(-costs[place] // unit)
    return found


def average_bits(job: QuantizationJob) -> float:
    """Average bits per weight of the linears of all blocks, without scales and zero points."""
    bits, weights = _code_bits(job)
    return bits / weights


def _bits_of(text: str) -> float | None:
    """The budget in average bits per weight; None where it is a file size."""
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        with suppress(UsageError):
            parse_bytes(text)
            return None
        raise UsageError(f"auto-bits {text!r} is neither a number of bits nor a size", BUDGET_REMEDY)
    if not LOW_BITS <= float(text) <= HIGH_BITS:
        raise UsageError(f"auto-bits {text} is not between {LOW_BITS} and {HIGH_BITS}", BUDGET_REMEDY)
    return float(text)


def _is_free(job: QuantizationJob, index: int, name: str) -> bool:
    full_name = f"{job.stream.arch.blocks}.{index}.{name}"
    return not any(re.match(override.pattern, full_name) for override in job.config.overrides)


def _code_bits(job: QuantizationJob) -> tuple[int, int]:
    """Total bits of codes, and number of weights."""
    bits = weights = 0
    for name, shape in job.stream.linear_shapes.items():
        for index in range(job.stream.count):
            own = job.config.for_linear(f"{job.stream.arch.blocks}.{index}.{name}")
            weights += math.prod(shape)
            bits += math.prod(shape) * (FLOAT_BITS if own is None else own.bits)
    return bits, weights


def _room_in_bits(job: QuantizationJob, average: float) -> int:
    bits, weights = _code_bits(job)
    return math.floor(average * weights) - bits


def _room_in_bytes(job: QuantizationJob, text: str) -> int:
    stream = job.stream
    tensors = stream.count * (5 * len(stream.arch.linears) + 8) + len(stream.tensors_outside_blocks())
    return parse_bytes(text) - output_bytes(job) - HEADER_BYTES * tensors


def _smallest_budget(job: QuantizationJob, text: str, room: int) -> str:
    return f"{parse_bytes(text) - room:,} bytes" if _bits_of(text) is None else f"{average_bits(job):.3f} bits"
