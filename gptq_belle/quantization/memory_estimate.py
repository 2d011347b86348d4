"""Memory and disk that a quantization job needs, computed from its sizes."""

import math
from dataclasses import dataclass, replace

from gptq_belle.common.memory import anonymous_bytes, available_bytes, format_bytes
from gptq_belle.errors import HardwareError
from gptq_belle.models.dimensions import LinearShape
from gptq_belle.models.sizes import UNPACKED, linear_file_bytes
from gptq_belle.quantization.block_refinement.refinement import rows_per_round
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.job import QuantizationJob

LIBRARY_BYTES = 32 << 20  # buffers of torch and MKL that grow during a job, as measured
ATTENTION_COPIES, MLP_COPIES = 10, 3  # hidden states alive at a time in each half of a block, as measured
BACKWARD_FACTOR = 2.5  # memory of a block's forward and backward pass, relative to its forward pass, as measured
CODE_COPIES, STEP_COPIES = 3, 8  # of a block's codes (current, best, changed), and of a weight during a step
FREE_MEMORY_SHARE = 0.8  # of the free memory, the limit of a job without --memory


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak of anonymous memory by purpose, in bytes."""

    process: int  # memory of the process before the job
    block: int  # one block in float32, and its packed tensors
    work: int  # the larger of a forward pass and the largest GPTQ solution
    activations: int  # inputs of a block and outputs of its attention for all calibration rows, if kept in memory

    @property
    def floor(self) -> int:
        """The peak if activations are stored on disk only."""
        return self.process + self.block + self.work

    @property
    def total(self) -> int:
        """The peak if activations are in memory too."""
        return self.floor + self.activations


def must_spill(job: QuantizationJob, limit: int | None) -> bool:
    """Whether activations must be stored on disk only.

    Args:
        limit: limit of anonymous memory in bytes; None for four fifths of the free memory.
    Raises:
        HardwareError: the job exceeds `limit` even with activations on disk.
    """
    memory = estimate_memory(job)
    if limit is not None and memory.floor > limit:
        raise HardwareError(
            f"one block of this model takes {format_bytes(memory.floor)} to quantize, {format_bytes(limit)} are "
            f"allowed: {format_bytes(memory.process)} for the program, {format_bytes(memory.block)} for the block, "
            f"{format_bytes(memory.work)} for its largest Hessian or its activations",
            f"Allow --memory {math.ceil(memory.floor / 2**20)}MiB or more.")
    free = available_bytes()
    allowed = limit if limit is not None else None if free is None else memory.process + int(FREE_MEMORY_SHARE * free)
    return allowed is not None and memory.total > allowed


def estimate_memory(job: QuantizationJob) -> MemoryEstimate:
    """Compute the peak memory of a job."""
    stream, config, techniques = job.stream, job.config, job.config.techniques
    shapes = stream.linear_shapes
    block = stream.blocks.get_submodule("0")
    weights = sum(4 * parameter.numel() for parameter in block.parameters())
    if config.auto_bits is not None:
        config = replace(config, bits=8)  # a whole block may get 8 bits
    packed = max(sum(written_bytes(config.for_linear(f"{stream.arch.blocks}.{index}.{name}"), shape)
                     for name, shape in shapes.items()) for index in range(stream.count))
    full = techniques.full_precision and job.tokens is not None
    hessians = sum(4 * shapes[stage[0]].in_features ** 2 for stage in stream.arch.stages) if techniques.rounds else 0
    originals = sum(4 * math.prod(shape) for shape in shapes.values()) if full else 0
    work = max([_forward(job, full), _refinement(job), *(_solution(job, shape, full) for shape in shapes.values())])
    return MemoryEstimate((anonymous_bytes() or 0) + LIBRARY_BYTES, weights + packed + originals + hessians, work,
                  (4 if full else 2) * sum(4 * math.prod(shape) for shape in job.shapes))


def _solution(job: QuantizationJob, shape: LinearShape, full: bool) -> int:
    """Bytes that the solution of a linear takes in addition to its weight."""
    k, n = shape
    techniques, squares = job.config.techniques, 2 + full  # Hessian and factor, and the cross term of the targets
    if job.tokens is None:
        return 6 * n * k
    if job.config.act_order:
        squares += 2  # permuted
    # weights in the order of solving, in the order of inputs, and the target
    weights = 4 + 4 * bool(techniques.sweeps or techniques.static_order) + 4 * full
    codes = 2 + bool(techniques.sweeps) + bool(job.held_out)  # with their transpose, and those of other candidates
    return (weights + codes) * n * k + 4 * squares * k * k + _held_out(job, k, full)


def _held_out(job: QuantizationJob, k: int, full: bool) -> int:
    """Bytes of a linear's inputs for the held-out rows."""
    return 0 if job.tokens is None else (2 if full else 1) * 4 * job.held_out * job.tokens.shape[1] * k


def _refinement(job: QuantizationJob) -> int:
    """Bytes that block refinement takes besides the Hessians: states of a round, a backward pass, codes, one step."""
    if not job.config.techniques.rounds or job.tokens is None:
        return 0
    sizes, length = [math.prod(shape) for shape in job.stream.linear_shapes.values()], job.tokens.shape[1]
    rows = rows_per_round(len(job.tokens) - job.held_out, length) + job.held_out
    states = 2 * 4 * rows * length * int(job.stream.model.config.hidden_size)
    return states + int(BACKWARD_FACTOR * _forward(job, full=False)) + CODE_COPIES * sum(sizes) + STEP_COPIES * 4 * max(
        sizes)


def _forward(job: QuantizationJob, full: bool) -> int:
    """Bytes that a forward pass of a batch takes, with the Hessian of the widest linear."""
    stream = job.stream
    batch = max(job.shapes, key=math.prod, default=None)
    if batch is None:
        return 0
    inner = stream.linear_shapes[stream.arch.linears[-1]].in_features
    tokens = batch[0] * batch[1]
    attention = ATTENTION_COPIES * batch[2] * tokens
    mlp = (MLP_COPIES * batch[2] + (stream.arch.inner_copies + full) * inner) * tokens
    return 4 * max(attention, mlp + (1 + full) * inner * inner) + _held_out(job, inner, full)


def output_bytes(job: QuantizationJob) -> int:
    """Size in bytes of the weight files that the job will write."""
    stream, config = job.stream, job.config
    block = stream.blocks.get_submodule("0")
    shapes = stream.linear_shapes
    linears = sum(written_bytes(config.for_linear(f"{stream.arch.blocks}.{index}.{name}"), shape)
                  for index in range(stream.count) for name, shape in shapes.items())
    plain = sum(2 * parameter.numel() for name, parameter in block.named_parameters()
                if name.removesuffix(".weight") not in shapes)
    outside = sum(2 * math.prod(stream.shape(name)) for name in stream.tensors_outside_blocks())
    return linears + stream.count * plain + outside


def written_bytes(config: QuantConfig | None, shape: LinearShape) -> int:
    """Bytes of a linear's tensors in the output; float16 without a config."""
    return linear_file_bytes(shape, UNPACKED) if config is None else linear_file_bytes(
        shape, config.bits, config.group_size)
