"""`bench`: how fast models load, read prompts and answer, what that takes, and what bounds it.

Several models are measured in turn, repeat by repeat, so that whatever else the machine does meets all of them alike.
Load time and memory come from a fresh process a model (see bench/footprint.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from gptq_belle.bench import footprint
from gptq_belle.bench.bandwidth import read_bandwidth
from gptq_belle.bench.batch_sweep import Point, check_room, sweep
from gptq_belle.bench.footprint import Footprint
from gptq_belle.bench.step_shares import Shares, explain, step_shares
from gptq_belle.checkpoint.inspection import average_bits
from gptq_belle.checkpoint.packed_reader import read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.common.devices import resolve_precision
from gptq_belle.common.timers import Spread, spread, synchronize
from gptq_belle.engine.model import Model, load
from gptq_belle.errors import UsageError

MB = 1e6
DEFAULT_PROMPT = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """What every model does in a repeat: read `batch` prompts of `prompt` tokens, then generate `tokens` each.

    A prompt of None has 512 tokens, or as many as the context leaves beside the answer.
    """

    prompt: int | None = None
    tokens: int = 128
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not allowed", "It must be 1 or more.")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured of one model.

    Attributes:
        path: its directory.
        bits: of its packed weights, on average where they differ; None for a full-precision model.
        dtype, precision, device: of its activations, and where it ran.
        footprint: load time and memory.
        first_token: seconds from the prompt to the first token.
        prefill, decode: tokens per second, all rows of the batch together.
        weight_bytes: weights that one step of decoding reads, as they lie in memory (of an embedding that is not
            also the head only some rows, which are not counted; nor is the cache of keys and values).
        achieved: weight_bytes a step over its median time, in bytes per second.
        shares: of that time by the model's parts.
        bound: one line on what limits decoding.
    """

    path: Path
    bits: float | None
    dtype: str
    precision: str
    device: str
    footprint: Footprint
    first_token: Spread
    prefill: Spread
    decode: Spread
    weight_bytes: int
    achieved: float
    shares: Shares
    bound: str


class Memory(NamedTuple):
    """Peak of anonymous memory as `Footprint.peak_bytes`, of one model at one batch."""

    path: Path
    batch: int
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Bench:
    """All results, with the machine's read bandwidth in bytes per second, measured in the same sitting.

    Attributes:
        points: speeds at further batches and depths, where they were asked for.
        memory: of every model at every batch, with prompts as long as the largest depth and the prompt together.
    """

    workload: Workload
    bandwidth: Spread
    results: list[BenchResult]
    points: list[Point]
    memory: list[Memory]


class Pass(NamedTuple):
    """Times of one repeat in seconds."""

    prefill: float  # from the prompt to the first token
    decode: float  # of the tokens behind it


def bench(paths: Sequence[str | Path], workload: Workload, *, device: str = "auto", precision: str | None = None,
          head_bits: int | None = None, cache: str = "float16", batches: Sequence[int] = (),
          depths: Sequence[int] = (0,), progress: Callable[[str], None] = lambda text: None) -> Bench:
    """Measure models side by side.

    Args:
        paths: model directories, quantized or not.
        workload: what they do.
        device, precision, head_bits, cache: as for `gptq_belle.load`.
        batches: further ones than the workload's, to be measured at every depth.
        depths: tokens that are in the cache before prompt and answer; with more than 0, the workload's batch is
            measured there too.
        progress: told what begins.
    Raises:
        UsageError: prompt and answer do not fit into a model's context.
        InputError, HardwareError: a model cannot be loaded.
    """
    models = []
    for path in paths:
        progress(f"loading {path}")
        models.append(load(path, device=device, precision=precision, head_bits=head_bits, cache=cache))
    workload = fitted(workload, models)
    check_room(models, depths, workload.prompt or 1, workload.tokens)
    passes = interleaved(models, workload, progress)
    points: list[Point] = []
    if batches or tuple(depths) != (0,):
        points = sweep(models, (workload.batch, *batches), depths, workload.prompt or 1, workload.tokens,
                       workload.repeats, progress)
    progress("reading memory")
    bandwidth = read_bandwidth(models[0].device)
    results, memory = [], []
    for model, times in zip(models, passes, strict=True):
        progress(f"memory and load time of {model.path}, in a process of its own")
        footprints = {batch: footprint.fresh(model.path, device=device, precision=precision, head_bits=head_bits,
                                        cache=cache, prompt=(workload.prompt or 1) + max(depths), batch=batch)
                      for batch in (workload.batch, *batches)}
        memory += [Memory(model.path, batch, found.peak_bytes) for batch, found in footprints.items()]
        results.append(_result(model, workload, times, footprints[workload.batch], bandwidth.median, precision))
    return Bench(workload, bandwidth, results, points, memory)


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths of an option, such as "0,512".

    Raises:
        UsageError: they are not whole numbers with commas between.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"depths {text!r} are not understood", "Write whole numbers, such as 0,512,1024.")
    return tuple(dict.fromkeys(map(int, parts)))


def fitted(workload: Workload, models: Sequence[Model]) -> Workload:
    """The workload with its prompt's length settled.

    Raises:
        UsageError: prompt and answer do not fit into a model's context.
    """
    for model in models:
        room = DEFAULT_PROMPT + workload.tokens if model.context is None else model.context
        prompt = min(DEFAULT_PROMPT, room - workload.tokens) if workload.prompt is None else workload.prompt
        if prompt < 1 or (model.context is not None and prompt + workload.tokens > model.context):
            raise UsageError(f"{max(prompt, 1) + workload.tokens} tokens do not fit into the context of {model.path}, "
                             f"which is {model.context}", "Choose a smaller -p or -n.")
        workload = replace(workload, prompt=prompt)
    return workload


def interleaved(models: Sequence[Model], workload: Workload,
                progress: Callable[[str], None] = lambda text: None) -> list[list[Pass]]:
    """Run every model `repeats` times in turn, after one short pass that does not count: times by model.

    Args:
        models: loaded.
        workload: its prompt's length settled by `fitted`.
        progress: told what begins.
    """
    for model in models:
        progress(f"warming up {model.path}")
        _run(model, replace(workload, tokens=2))
    passes: list[list[Pass]] = [[] for _ in models]
    for repeat in range(workload.repeats):
        for model, times in zip(models, passes, strict=True):
            progress(f"repeat {repeat + 1} of {workload.repeats}: {model.path}")
            times.append(_run(model, workload))
    return passes


def _run(model: Model, workload: Workload) -> Pass:
    """One repeat; the tokens' values do not matter to its time, and eos does not end it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary_size, (workload.batch, workload.prompt or 1), generator=generator)
    synchronize(model.device)
    began = time.perf_counter()
    logits, cache = model.prefill(ids, workload.tokens)
    tokens = logits.argmax(-1)
    synchronize(model.device)
    middle = time.perf_counter()
    for _ in range(workload.tokens):
        tokens = model.decode(tokens, cache).argmax(-1)
    synchronize(model.device)
    return Pass(middle - began, time.perf_counter() - middle)


def _bits(model: Model) -> float | None:
    stated = model.config.get("quantization_config")
    if not isinstance(stated, dict) or not stated.get("dynamic"):
        return stated.get("bits") if isinstance(stated, dict) else None
    reader = CheckpointReader(model.path)
    quantization = read_quantization(reader)
    return None if quantization is None else average_bits(reader, quantization)


def _result(model: Model, workload: Workload, times: Sequence[Pass], footprint: Footprint,
            bandwidth: float, precision: str | None) -> BenchResult:
    read = workload.batch * (workload.prompt or 1)
    decode = spread([workload.batch * workload.tokens / t.decode for t in times])
    step = workload.batch / decode.median
    size = model.step_bytes
    shares = step_shares(model, workload.batch, workload.prompt or 1, step)
    return BenchResult(
        path=model.path,
        bits=_bits(model),
        dtype=str(model.dtype).removeprefix("torch."),
        precision=resolve_precision(precision, model.device),
        device=str(model.device),
        footprint=footprint,
        first_token=spread([t.prefill for t in times]),
        prefill=spread([read / t.prefill for t in times]),
        decode=decode,
        weight_bytes=size,
        achieved=size / step,
        shares=shares,
        bound=explain(size, step, bandwidth, shares),
    )


def labels(results: Sequence[BenchResult]) -> list[str]:
    """Short names of the models: the last folder where those differ, else the whole path."""
    names = [result.path.resolve().name for result in results]
    return names if len(set(names)) == len(names) else [str(result.path) for result in results]
