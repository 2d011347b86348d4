"""`bench`: load time, prefill and decode speed and memory of models, and what limits the decode speed.

All models are measured in turn in every repeat, so that other load on the machine affects all of them alike. Load time
and memory of each model are measured in a new process (see bench/footprint.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gptq_belle.bench import footprint
from gptq_belle.bench.bandwidth import read_bandwidth
from gptq_belle.bench.footprint import Footprint
from gptq_belle.bench.gpus import Gpu, this_gpu
from gptq_belle.bench.step_shares import StepShares, explain_bound, measure_step_shares
from gptq_belle.bench.step_time import StepTime, has_step_time, step_time
from gptq_belle.bench.workload import RunTimes, SweepPoint, Workload, run_in_turns, sweep, with_prompt_length
from gptq_belle.checkpoint.inspection import average_bits
from gptq_belle.checkpoint.packed_reader import read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.common.devices import resolve_precision
from gptq_belle.common.text import short_names
from gptq_belle.common.timers import Spread, spread
from gptq_belle.engine.linear import PackedLinear
from gptq_belle.engine.model import Model, load
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import BITS
from gptq_belle.models.sizes import UNPACKED, MemorySettings

MB = 1e6


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Measurements of one model.

    Attributes:
        bits: bits per weight of its packed weights, on average if they differ; None for a full-precision model.
        dtype, precision, device: dtype of its activations, its precision and device.
        first_token: seconds from the prompt to the first token.
        prefill, decode: tokens per second of the whole batch.
        weight_bytes: bytes of weights in memory that one decode step reads, without the KV cache and without an
            embedding that is not also the lm_head.
        achieved: weight_bytes divided by the median time of a step, in bytes per second.
        shares: shares of that time by the parts of the model.
        bound: one line about what limits the decode speed.
        modelled: tokens per second of the time model (bench/step_time.py) at the measured copy bandwidth, to compare
            with `decode`; None on a CPU and for models that it does not cover.
        unfused: why decode steps on a GPU are not fused, which makes them slower; None if they are, and on a CPU.
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
    shares: StepShares
    bound: str
    modelled: float | None = None
    unfused: str | None = None


class BatchMemory(NamedTuple):
    """Peak memory (`Footprint.peak_bytes`) of one model at one batch size."""

    path: Path
    batch: int
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Measurements of all models."""

    workload: Workload
    bandwidth: Spread  # read bandwidth of the machine in bytes per second
    results: list[BenchResult]  # one entry per model
    points: list[SweepPoint]  # speeds at all batch sizes and depths, if several were requested
    memory: list[BatchMemory]  # peak memory of every model at every batch size, after the largest depth and the prompt

    @property
    def names(self) -> list[str]:
        """Short names of the models, in the order of the results."""
        return short_names([result.path for result in self.results])


def bench(paths: Sequence[str | Path], workload: Workload, *, device: str = "auto", precision: str | None = None,
          head_bits: int | None = None, cache: str = "float16", context: int | None = None,
          batches: Sequence[int] = (), depths: Sequence[int] = (0,),
          progress: Callable[[str], None] = lambda text: None) -> Benchmark:
    """Measure models side by side.

    Args:
        paths: model directories, quantized or not.
        device, precision, head_bits, cache, context: as for `gptq_belle.load`.
        batches: further batch sizes, measured at every depth.
        depths: numbers of tokens in the KV cache before the prompt; other depths than 0 are measured with the
            workload's batch size too.
    Raises:
        UsageError: prompt and answer do not fit into a model's context.
        InputError, HardwareError: a model cannot be loaded.
    """
    models = []
    for path in paths:
        progress(f"loading {path}")
        models.append(load(path, device=device, precision=precision, head_bits=head_bits, cache=cache,
                           context=context))
    workload = with_prompt_length(workload, models, max(depths))
    times = run_in_turns(models, workload, progress)
    points: list[SweepPoint] = []
    if batches or tuple(depths) != (0,):
        points = sweep(models, workload, (workload.batch, *batches), depths, progress)
    progress("measuring the read bandwidth")
    bandwidth = read_bandwidth(models[0].device)
    gpu = this_gpu(models[0].device, bandwidth.median) if models[0].device.type == "cuda" else None
    results, memory = [], []
    for model, of_model in zip(models, times, strict=True):
        progress(f"memory and load time of {model.path}, in a new process")
        footprints = {batch: footprint.measure_in_new_process(
            model.path, device=device, precision=precision, head_bits=head_bits, cache=cache,
            prompt=(workload.prompt or 1) + max(depths), batch=batch) for batch in (workload.batch, *batches)}
        memory += [BatchMemory(model.path, batch, found.peak_bytes) for batch, found in footprints.items()]
        results.append(_result(model, workload, of_model, footprints[workload.batch], bandwidth.median, precision, gpu))
    return Benchmark(workload, bandwidth, results, points, memory)


def parse_depths(text: str) -> tuple[int, ...]:
    """Parse the depths of an option, such as "0,512".

    Raises:
        UsageError: they are not whole numbers separated by commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"depths {text!r} are not understood", "Write whole numbers, such as 0,512,1024.")
    return tuple(dict.fromkeys(map(int, parts)))


def modelled_step(model: Model, gpu: Gpu, batch: int, length: int) -> StepTime | None:
    """The calculated decode step of a loaded model; None if the time model does not cover it.

    Args:
        batch, length: number of sequences, and tokens of each in the KV cache.
    """
    bits, head = _bits(model), model.decoder.head
    if bits not in BITS or model.unfused_reason(batch) is not None:
        return None
    settings = MemorySettings(
        bits=int(bits), head_bits=head.weight.bits if isinstance(head, PackedLinear) else UNPACKED,
        group_size=model.config["quantization_config"]["group_size"], cache=model.cache_kind, device="cuda")
    if not has_step_time(settings, batch):
        return None
    return step_time(model.decoder_config.dimensions, settings, gpu, batch, length)


def _bits(model: Model) -> float | None:
    stated = model.config.get("quantization_config")
    if not isinstance(stated, dict) or not stated.get("dynamic"):
        return stated.get("bits") if isinstance(stated, dict) else None
    reader = CheckpointReader(model.path)
    quantization = read_quantization(reader)
    return None if quantization is None else average_bits(reader, quantization)


def _result(model: Model, workload: Workload, times: Sequence[RunTimes], footprint: Footprint,
            bandwidth: float, precision: str | None, gpu: Gpu | None) -> BenchResult:
    prompt_tokens = workload.batch * (workload.prompt or 1)
    decode = spread([workload.batch * workload.tokens / t.decode for t in times])
    step = workload.batch / decode.median
    size = model.step_bytes
    shares = measure_step_shares(model, workload.batch, workload.prompt or 1, step)
    length = (workload.prompt or 1) + workload.tokens // 2
    modelled = modelled_step(model, gpu, workload.batch, length) if gpu else None
    return BenchResult(
        path=model.path,
        bits=_bits(model),
        dtype=str(model.dtype).removeprefix("torch."),
        precision=resolve_precision(precision, model.device),
        device=str(model.device),
        footprint=footprint,
        first_token=spread([t.prefill for t in times]),
        prefill=spread([prompt_tokens / t.prefill for t in times]),
        decode=decode,
        weight_bytes=size,
        achieved=size / step,
        shares=shares,
        bound=explain_bound(size, step, bandwidth, shares),
        modelled=None if modelled is None else modelled.tokens_per_second,
        unfused=None if model.device.type == "cpu" else model.unfused_reason(workload.batch),
    )
