"""What a job will take, before it starts: memory and disk by arithmetic, time from one block and one batch of its rows.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gptq_belle.checkpoint.packing import dequantize, pack
from gptq_belle.config import QuantConfig
from gptq_belle.errors import HardwareError
from gptq_belle.measure.memory import anonymous_bytes, available_bytes
from gptq_belle.quantization.candidates import best_of
from gptq_belle.quantization.checks import linear_shapes
from gptq_belle.quantization.contexts import Rows
from gptq_belle.quantization.moments import Moments, Originals, moments
from gptq_belle.quantization.setup import Setup
from gptq_belle.quantization.solver import factorize, round_to_nearest
from gptq_belle.quantization.tuning_cost import check_memory, tuning_seconds
from gptq_belle.quantization.tuning_rows import scratch_bytes

LIBRARIES = 32 << 20  # bytes that torch's and MKL's own buffers grow to during a job
HIDDEN_ATTENTION, HIDDEN_MLP = 10, 3  # hidden states alive at a time in either half of a block, as measured
SHARE = 0.8  # of the memory that is free, which a job without a limit keeps to


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of anonymous memory at the peak, by what they are for.

    Attributes:
        process: what the process holds already.
        block: one block in float32, and its packed tensors.
        work: the larger of a forward pass and the largest solution.
        activations: the calibration rows in front of a block and what its attention makes of them, where they are kept
            in memory.
    """

    process: int
    block: int
    work: int
    activations: int

    @property
    def floor(self) -> int:
        """The peak where activations lie on disk only."""
        return self.process + self.block + self.work

    @property
    def total(self) -> int:
        """The peak where they are in memory too."""
        return self.floor + self.activations


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `quantize --dry-run` prints.

    Attributes:
        seconds: wall time; None where one block already needs more memory than allowed.
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


def estimate(setup: Setup, limit: int | None = None) -> Estimate:
    """Measure one block and do the arithmetic for the rest.

    Args:
        setup: the job.
        limit: see `spills`.
    Raises:
        HardwareError: see `spills` and `tuning_cost.check_memory`.
    """
    memory, spill = memory_needed(setup), spills(setup, limit)
    output = output_bytes(setup)
    generations = (1 if setup.stream.count == 1 else 2) + (1 if spill else 0)  # and what attention has made of one
    tuning = check_memory(setup, limit) if setup.config.recipe.steps else 0
    disk = output + max(output, generations * memory.activations // 2, scratch_bytes(setup) if tuning else 0)
    return Estimate(_seconds(setup), max(memory.floor if spill else memory.total, tuning), spill, disk, output,
                    setup.stream.count, setup.stream.count * len(setup.stream.arch.linears),
                    0 if setup.tokens is None else setup.tokens.numel())


def spills(setup: Setup, limit: int | None) -> bool:
    """Whether activations have to be on disk only.

    Args:
        setup: the job.
        limit: bytes of anonymous memory to keep to; None for four fifths of what is free.
    Raises:
        HardwareError: not even that suffices for a limit that was named.
    """
    memory = memory_needed(setup)
    if limit is not None and memory.floor > limit:
        raise HardwareError(
            f"one block of this model takes {_mib(memory.floor)} to quantize, {_mib(limit)} are allowed: "
            f"{_mib(memory.process)} for the program, {_mib(memory.block)} for the block, {_mib(memory.work)} for its "
            "largest Hessian or its activations", f"Allow --memory {math.ceil(memory.floor / 2**20)}MiB or more.")
    free = available_bytes()
    allowed = limit if limit is not None else None if free is None else memory.process + int(SHARE * free)
    return allowed is not None and memory.total > allowed


def memory_needed(setup: Setup) -> Memory:
    """The peak of a job's memory by arithmetic."""
    stream, config, recipe = setup.stream, setup.config, setup.config.recipe
    shapes = linear_shapes(stream)
    block = stream.blocks.get_submodule("0")
    weights = sum(4 * parameter.numel() for parameter in block.parameters())
    if config.auto_bits is not None:
        config = replace(config, bits=8)  # which a whole block may get
    packed = max(sum(linear_bytes(config.of(f"{stream.arch.blocks}.{index}.{name}"), n, k)
                     for name, (n, k) in shapes.items()) for index in range(stream.count))
    full = bool(recipe.alpha) and setup.tokens is not None
    originals = sum(4 * n * k for n, k in shapes.values()) if full else 0
    work = max([_forward(setup, full), *(_solution(setup, n, k, full) for n, k in shapes.values())])
    return Memory((anonymous_bytes() or 0) + LIBRARIES, weights + packed + originals, work,
                  (4 if full else 2) * sum(4 * math.prod(shape) for shape in setup.shapes))


def _solution(setup: Setup, n: int, k: int, full: bool) -> int:
    """Bytes that the solution of a linear takes beside its weight."""
    recipe, squares = setup.config.recipe, 2 + full  # the Hessian, its factor, and what the targets follow from
    if setup.tokens is None:
        return 6 * n * k
    if setup.config.act_order:
        squares += 2  # permuted
    weights = 4 + 4 * bool(recipe.sweeps or recipe.static_order) + 4 * full  # in order of solving, of inputs, target
    codes = 2 + bool(recipe.sweeps) + bool(setup.held_out)  # with their transpose, and those of earlier candidates
    return (weights + codes) * n * k + 4 * squares * k * k + _held_out(setup, k, full)


def _held_out(setup: Setup, k: int, full: bool) -> int:
    """Bytes of a linear's inputs in the rows that are held out."""
    return 0 if setup.tokens is None else (2 if full else 1) * 4 * setup.held_out * setup.tokens.shape[1] * k


def _forward(setup: Setup, full: bool) -> int:
    """Bytes that a forward pass of a batch takes, as it ends in the sums of the widest linear's inputs."""
    stream = setup.stream
    batch = max(setup.shapes, key=math.prod, default=None)
    if batch is None:
        return 0
    inner = linear_shapes(stream)[stream.arch.linears[-1]][1]
    tokens = batch[0] * batch[1]
    attention = HIDDEN_ATTENTION * batch[2] * tokens
    mlp = (HIDDEN_MLP * batch[2] + (stream.arch.inner_copies + full) * inner) * tokens
    return 4 * max(attention, mlp + (1 + full) * inner * inner) + _held_out(setup, inner, full)


def output_bytes(setup: Setup) -> int:
    """Size of the weight files that the job will write."""
    stream, config = setup.stream, setup.config
    block = stream.blocks.get_submodule("0")
    shapes = linear_shapes(stream)
    linears = sum(linear_bytes(config.of(f"{stream.arch.blocks}.{index}.{name}"), n, k)
                  for index in range(stream.count) for name, (n, k) in shapes.items())
    plain = sum(2 * parameter.numel() for name, parameter in block.named_parameters()
                if name.removesuffix(".weight") not in shapes)
    return linears + stream.count * plain + sum(2 * math.prod(stream.shape(name)) for name in stream.rest())


def linear_bytes(config: QuantConfig | None, n: int, k: int) -> int:
    """Of a linear's tensors in the file; without settings it is in float16."""
    if config is None:
        return 2 * n * k
    groups = 1 if config.group_size == -1 else k // config.group_size
    return (n * k + groups * n) * config.bits // 8 + 2 * groups * n + 4 * k


def _seconds(setup: Setup) -> float:
    """One block's work on one batch, and what follows from it for all."""
    stream, hashed = setup.stream, _seconds_a_byte()
    block = stream.block(0)
    batch, models = None, 2 if setup.config.recipe.alpha else 1
    if setup.tokens is not None:
        batch = next(stream.embed(stream.batches(setup.tokens)[0]))
        stream.run(block, batch)  # the first run of anything takes longer
    rows_of = [] if batch is None else [Rows(batch), Rows(batch.flip(0))][:models]
    rows = solving = 0.0
    for stage in stream.arch.stages:
        if (own := setup.config.of(f"{stream.arch.blocks}.0.{stage[0]}")) is None:
            continue
        began = time.perf_counter()
        found = None if batch is None else _moments(setup, block, stage, rows_of)
        rows += time.perf_counter() - began
        solving += _seconds_of_solving(own, block, stage, found)
    began = time.perf_counter()
    for states in rows_of:
        with states.contexts.during(block, stream.arch) as turn:
            stream.run(block, states.batches[0], turn)
    rows += time.perf_counter() - began
    tuning = tuning_seconds(setup, block) if setup.config.recipe.steps else 0.0
    stream.drop(block)
    batches = 0.0 if batch is None or setup.tokens is None else setup.tokens.numel() / math.prod(batch.shape[:2])
    written = 2 * output_bytes(setup) + models * stream.count * 4 * batches * math.prod(
        batch.shape if batch is not None else ())
    return tuning + stream.count * (solving + batches * rows) + hashed * (2 * stream.reader.bytes_on_disk() + written)


def _moments(setup: Setup, block: torch.nn.Module, stage: tuple[str, ...], rows: Sequence[Rows]) -> Moments:
    """Of one batch, for one model or two; as many rows are held out as the job will hold out, and targets differ from
    a layer's own."""
    full = (Originals(), rows[1]) if len(rows) == 2 else None
    seen = len(rows[0].batches[0]) - min(1, setup.held_out)
    found = moments(setup.stream, block, stage, rows[0], full, seen, lambda: None)
    return found._replace(held=[pair for pair in found.held for _ in range(setup.held_out)])


def _seconds_of_solving(config: QuantConfig, block: torch.nn.Module, stage: tuple[str, ...],
                        found: Moments | None) -> float:
    """Of one stage; linears of one size are solved once and counted as often as they are."""
    began = time.perf_counter()
    factor = None if found is None else factorize(found.hessian, config)
    total = time.perf_counter() - began
    seen: dict[torch.Size, float] = {}
    for name in stage:
        weight = block.get_parameter(f"{name}.weight").detach()
        if weight.shape not in seen:
            began = time.perf_counter()
            solution = round_to_nearest(weight, config) if found is None or factor is None else best_of(
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


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
