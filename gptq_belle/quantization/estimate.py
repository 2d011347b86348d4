"""What a job will take, before it starts: memory and disk by arithmetic, time from one block and one batch of its rows.
"""

import hashlib
import math
import time
from dataclasses import dataclass, replace

import torch

from gptq_belle.checkpoint.packing import dequantize, pack
from gptq_belle.config import QuantConfig
from gptq_belle.errors import HardwareError
from gptq_belle.measure.memory import anonymous_bytes, available_bytes
from gptq_belle.quantization.checks import linear_shapes
from gptq_belle.quantization.contexts import Contexts
from gptq_belle.quantization.setup import Setup
from gptq_belle.quantization.solver import factorize, gptq, round_to_nearest

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
        HardwareError: see `spills`.
    """
    memory, spill = memory_needed(setup), spills(setup, limit)
    output = output_bytes(setup)
    generations = (1 if setup.stream.count == 1 else 2) + (1 if spill else 0)  # and what attention has made of one
    disk = output + max(output, generations * memory.activations // 2)
    return Estimate(_seconds(setup, disk), memory.floor if spill else memory.total, spill, disk, output,
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
    stream, config = setup.stream, setup.config
    shapes = linear_shapes(stream)
    block = stream.blocks.get_submodule("0")
    weights = sum(4 * parameter.numel() for parameter in block.parameters())
    if config.auto_bits is not None:
        config = replace(config, bits=8)  # which a whole block may get
    packed = max(sum(linear_bytes(config.of(f"{stream.arch.blocks}.{index}.{name}"), n, k)
                     for name, (n, k) in shapes.items()) for index in range(stream.count))
    solutions = [4 * n * k + 2 * n * k + (0 if setup.tokens is None else (4 if config.act_order else 2) * 4 * k * k)
                 for n, k in shapes.values()]
    batch = max(setup.shapes, key=math.prod, default=(1, 1, 0))
    inner = shapes[stream.arch.linears[-1]][1]
    tokens = batch[0] * batch[1]
    attention = HIDDEN_ATTENTION * batch[2] * tokens
    mlp = (HIDDEN_MLP * batch[2] + stream.arch.inner_copies * inner) * tokens
    forward = 4 * max(attention, mlp + inner * inner) if batch[2] else 0
    return Memory((anonymous_bytes() or 0) + LIBRARIES, weights + packed, max([*solutions, forward]),
                  2 * sum(4 * math.prod(shape) for shape in setup.shapes))


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


def _seconds(setup: Setup, disk: int) -> float:
    """One block's work on one batch, and what follows from it for all."""
    stream, hashed = setup.stream, _seconds_a_byte()
    block = stream.block(0)
    batch = None
    if setup.tokens is not None:
        batch = next(stream.embed(stream.batches(setup.tokens)[0]))
        stream.run(block, batch)  # the first run of anything takes longer
    stream.clock.restart()
    contexts = Contexts()
    began = time.perf_counter()
    solving = 0.0
    for stage in stream.arch.stages:
        if (own := setup.config.of(f"{stream.arch.blocks}.0.{stage[0]}")) is None:
            continue
        with contexts.during(block, stream.arch, stage):
            hessian = None if batch is None else stream.hessian(block, stage, [batch], lambda: None)
        solving += _seconds_of_solving(own, block, stage, hessian)
    rows = time.perf_counter() - began - solving
    if batch is not None:
        with contexts.during(block, stream.arch):
            stream.run(block, batch)
        rows = time.perf_counter() - began - solving
    stream.drop(block)
    batches = 0.0 if batch is None or setup.tokens is None else setup.tokens.numel() / math.prod(batch.shape[:2])
    written = 2 * output_bytes(setup) + stream.count * 4 * math.prod(batch.shape if batch is not None else ()) * batches
    return stream.count * (solving + batches * rows) + hashed * (2 * stream.reader.bytes_on_disk() + written)


def _seconds_of_solving(config: QuantConfig, block: torch.nn.Module, stage: tuple[str, ...],
                        hessian: torch.Tensor | None) -> float:
    """Of one stage; linears of one size are solved once and counted as often as they are."""
    began = time.perf_counter()
    factor = None if hessian is None else factorize(hessian, config)
    total = time.perf_counter() - began
    seen: dict[torch.Size, float] = {}
    for name in stage:
        weight = block.get_parameter(f"{name}.weight")
        if weight.shape not in seen:
            began = time.perf_counter()
            solution = round_to_nearest(weight, config) if hessian is None else gptq(
                weight, hessian, config, factor)
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
