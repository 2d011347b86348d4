"""What end-to-end tuning takes: memory by arithmetic, time from one step through one block."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gptq_belle.common.memory import anonymous_bytes, available_bytes, format_bytes
from gptq_belle.errors import HardwareError
from gptq_belle.quantization.end_to_end.rows import cut
from gptq_belle.quantization.end_to_end.student import Student, TrainableLinear
from gptq_belle.quantization.end_to_end.tuning import BATCH, CHUNK, EVERY, learn
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.solver import round_to_nearest

COPIES = 11  # of a trained figure: itself, how it began, unit, change, gradients, moments, the best, and passing ones
PREDICTIONS = 5  # matrices of CHUNK x vocabulary alive at a time
FORWARD = 0.3  # of a step's time is its way forward
INNER = 2.5  # times what a forward pass of a block keeps, on the way back


def tuning_bytes(job: QuantizationJob) -> int:
    """Peak beside the program's own memory, in bytes."""
    stream, config = job.stream, job.config
    shapes, block = stream.linear_shapes, stream.blocks.get_submodule("0")
    vectors = sum(parameter.numel() for name, parameter in block.named_parameters()
                  if name.removesuffix(".weight") not in shapes)
    total = 4 * COPIES * stream.count * vectors
    for index in range(stream.count):
        for name, (k, n) in shapes.items():
            if (own := config.of(f"{stream.arch.blocks}.{index}.{name}")) is None:
                total += 4 * n * k
            else:
                groups = 1 if own.group_size == -1 else k // own.group_size
                total += n * k + 4 * (COPIES + 1) * n * groups  # and the zero points
    vocabulary, hidden = stream.embedding_shape
    widest = max(k * n for k, n in shapes.values())
    inner = max(max(shape) for shape in shapes.values())
    states = 4 * BATCH * int(hidden * (stream.count + 2) + INNER * (10 * hidden + stream.arch.inner_copies * inner))
    return total + 4 * vocabulary * (hidden + PREDICTIONS * CHUNK) + states + 3 * 4 * widest


def check_tuning(job: QuantizationJob, limit: int | None) -> int:
    """Refuse a job whose model cannot be tuned here, before anything else is done.

    Args:
        job: the job.
        limit: bytes of anonymous memory to keep to; None for what is free. Of a GPU it is what is free there.
    Returns:
        The peak of the process's anonymous memory in bytes, where it tunes on the CPU; 0 where on a GPU or not at all.
    Raises:
        HardwareError: the model does not fit; what it needs is said.
        UsageError: too little text to calibrate on.
    """
    if not job.config.techniques.tuning_steps or job.tokens is None:
        return 0
    cut(job.tokens)
    device, needed, process = job.stream.device, tuning_bytes(job), anonymous_bytes() or 0
    free = available_bytes() if limit is None else limit - process
    if device.type == "cuda":
        process, free = 0, torch.cuda.mem_get_info(device)[0]
    if free is not None and needed > free:
        raise HardwareError(
            f"tuning this model as a whole takes {format_bytes(process + needed)}, "
            f"{format_bytes(process + max(0, free))} are "
            f"{'allowed' if limit is not None and device.type == 'cpu' else 'free'}",
            "Take --preset best, which keeps one block in memory at a time, or a machine with more.")
    return process + needed if device.type == "cpu" else 0


def tuning_seconds(job: QuantizationJob, block: nn.Module) -> float:
    """Time of all steps, from one through a single block and one through two.

    Args:
        job: the job.
        block: its first one, in full precision.
    """
    assert job.tokens is not None
    stream, steps = job.stream, job.config.techniques.tuning_steps
    learnt, held = cut(job.tokens)
    length = learnt.shape[1]
    vocabulary, hidden = stream.embedding_shape
    states = torch.randn(max(1, BATCH // length), length, hidden)
    head = torch.randn(vocabulary, hidden, device=stream.device)
    with _tunable(job, block) as tunable:
        seconds = []
        for blocks in ([tunable], [tunable], [tunable] * 2):  # the first time of anything takes longer
            began = time.perf_counter()
            learn(Student(stream, blocks, [], {}), head, states, states)
            seconds.append(time.perf_counter() - began)
    step = seconds[1] + (stream.count - 1) * max(0.0, seconds[2] - seconds[1])
    looks = (1 + steps / EVERY) * held.numel() / states[..., 0].numel()
    return step * (steps + FORWARD * looks) + FORWARD * step * (learnt.numel() + held.numel()) / states[..., 0].numel()


@contextmanager
def _tunable(job: QuantizationJob, block: nn.Module) -> Iterator[nn.Module]:
    """The block with tunable linears, of weights that are rounded to nearest, for a while."""
    stream = job.stream
    before = {}
    for name in stream.arch.linears:
        if (own := job.config.of(f"{stream.arch.blocks}.0.{name}")) is not None:
            linear: Any = block.get_submodule(name)
            before[name] = linear
            block.set_submodule(name, TrainableLinear(round_to_nearest(linear.weight, own).weight, linear.bias))
    try:
        yield block
    finally:
        for name, linear in before.items():
            block.set_submodule(name, linear)
