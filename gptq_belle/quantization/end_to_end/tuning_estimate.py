"""Estimate the memory and the time of end-to-end tuning."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gptq_belle.common.memory import anonymous_bytes, available_bytes, format_bytes
from gptq_belle.errors import HardwareError
from gptq_belle.quantization.end_to_end.student import Student, TrainableLinear
from gptq_belle.quantization.end_to_end.tuning import BATCH_TOKENS, CHUNK_TOKENS, VALIDATE_EVERY, accumulate_gradients
from gptq_belle.quantization.end_to_end.tuning_rows import split_rows
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.solver import round_to_nearest

COPIES = 11  # floats per trained value: itself, initial value, unit, change, gradients, moments, best, temporaries
LOGIT_MATRICES = 5  # matrices (CHUNK_TOKENS, vocabulary) alive at a time
FORWARD_SHARE = 0.3  # share of the forward pass in the time of a step
BACKWARD_FACTOR = 2.5  # memory of a block's backward pass, relative to its forward pass


def tuning_bytes(job: QuantizationJob) -> int:
    """Peak memory of tuning in bytes, without what the process uses already."""
    stream, config = job.stream, job.config
    shapes, block = stream.linear_shapes, stream.blocks.get_submodule("0")
    vectors = sum(parameter.numel() for name, parameter in block.named_parameters()
                  if name.removesuffix(".weight") not in shapes)
    total = 4 * COPIES * stream.count * vectors
    for index in range(stream.count):
        for name, (k, n) in shapes.items():
            if (own := config.for_linear(f"{stream.arch.blocks}.{index}.{name}")) is None:
                total += 4 * n * k
            else:
                groups = 1 if own.group_size == -1 else k // own.group_size
                total += n * k + 4 * (COPIES + 1) * n * groups  # and the zero points
    vocabulary, hidden = stream.embedding_shape
    widest = max(k * n for k, n in shapes.values())
    inner = max(max(shape) for shape in shapes.values())
    in_block = int(BACKWARD_FACTOR * (10 * hidden + stream.arch.inner_copies * inner))
    states = 4 * BATCH_TOKENS * (hidden * (stream.count + 2) + in_block)
    return total + 4 * vocabulary * (hidden + LOGIT_MATRICES * CHUNK_TOKENS) + states + 3 * 4 * widest


def check_tuning(job: QuantizationJob, limit: int | None) -> int:
    """Refuse a job whose model does not fit into memory for tuning, before any work is done.

    Args:
        limit: limit of anonymous memory in bytes, by default the free memory. On a GPU its free memory counts.
    Returns:
        Peak anonymous memory of the process in bytes; 0 for tuning on a GPU, and without tuning.
    Raises:
        HardwareError: the model does not fit.
        UsageError: too little calibration text.
    """
    if not job.config.techniques.tuning_steps or job.tokens is None:
        return 0
    split_rows(job.tokens)
    device, needed, process = job.stream.device, tuning_bytes(job), anonymous_bytes() or 0
    free = available_bytes() if limit is None else limit - process
    if device.type == "cuda":
        process, free = 0, torch.cuda.mem_get_info(device)[0]
    if free is not None and needed > free:
        raise HardwareError(
            f"tuning the whole model needs {format_bytes(process + needed)}, "
            f"{format_bytes(process + max(0, free))} are "
            f"{'allowed' if limit is not None and device.type == 'cpu' else 'free'}", "Use --preset best, which keeps "
            "one block in memory at a time, or a machine with more memory.")
    return process + needed if device.type == "cpu" else 0


def tuning_seconds(job: QuantizationJob, block: nn.Module) -> float:
    """Estimate the time of tuning from one step through one block and one step through two.

    Args:
        block: the first block, in full precision.
    """
    assert job.tokens is not None
    stream, steps = job.stream, job.config.techniques.tuning_steps
    training, held_out = split_rows(job.tokens)
    length = training.shape[1]
    vocabulary, hidden = stream.embedding_shape
    states = torch.randn(max(1, BATCH_TOKENS // length), length, hidden)
    head = torch.randn(vocabulary, hidden, device=stream.device)
    with _trainable(job, block) as trainable:
        seconds = []
        for blocks in ([trainable], [trainable], [trainable] * 2):  # the first one is a warm-up
            started = time.perf_counter()
            accumulate_gradients(Student(stream, blocks, [], {}), head, states, states)
            seconds.append(time.perf_counter() - started)
    step = seconds[1] + (stream.count - 1) * max(0.0, seconds[2] - seconds[1])
    tokens = states[..., 0].numel()
    validation_steps = (1 + steps / VALIDATE_EVERY) * held_out.numel() / tokens
    target_steps = (training.numel() + held_out.numel()) / tokens
    return step * (steps + FORWARD_SHARE * (validation_steps + target_steps))


@contextmanager
def _trainable(job: QuantizationJob, block: nn.Module) -> Iterator[nn.Module]:
    """A context in which the linears of the block are trainable, with weights rounded to nearest."""
    stream = job.stream
    before = {}
    for name in stream.arch.linears:
        if (own := job.config.for_linear(f"{stream.arch.blocks}.0.{name}")) is not None:
            linear: Any = block.get_submodule(name)
            before[name] = linear
            block.set_submodule(name, TrainableLinear(round_to_nearest(linear.weight, own).weight, linear.bias))
    try:
        yield block
    finally:
        for name, linear in before.items():
            block.set_submodule(name, linear)
