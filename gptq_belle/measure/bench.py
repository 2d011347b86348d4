"""`bench`: how fast models load, read prompts and answer, what that takes, and what bounds it.

Several models are measured in turn, repeat by repeat, so that whatever else the machine does meets all of them alike.
Load time and memory come from a fresh process a model (see measure/peak.py).
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_belle.errors import UsageError
from gptq_belle.measure import peak
from gptq_belle.measure.bandwidth import last_level_cache, read_bandwidth
from gptq_belle.measure.peak import Footprint
from gptq_belle.measure.timing import Spread, spread, synchronize
from gptq_belle.runtime.engine import Model, load

PROFILED_STEPS = 8
MOSTLY = 0.6  # the share of a step's time from which one thing is called its bound


@dataclass(frozen=True, slots=True)
class Workload:
    """What every model does in a repeat: read `batch` prompts of `prompt` tokens, then generate `tokens` each."""

    prompt: int = 512
    tokens: int = 128
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is not allowed", "It must be 1 or more.")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured of one model.

    Attributes:
        path: its directory.
        bits: of its packed weights; None for a full-precision model.
        dtype, device: of its activations, and where it ran.
        footprint: load time and memory.
        first_token: seconds from the prompt to the first token.
        prefill, decode: tokens per second, all rows of the batch together.
        weight_bytes: weights that one step of decoding reads, as they lie in memory (of an embedding that is not
            also the head only some rows, which are not counted; nor is the cache of keys and values).
        achieved: weight_bytes a step over its median time, in bytes per second.
        bound: one line on what limits decoding.
    """

    path: Path
    bits: int | None
    dtype: str
    device: str
    footprint: Footprint
    first_token: Spread
    prefill: Spread
    decode: Spread
    weight_bytes: int
    achieved: float
    bound: str


@dataclass(frozen=True, slots=True)
class Bench:
    """All results, with the machine's read bandwidth in bytes per second, measured in the same sitting."""

    workload: Workload
    bandwidth: Spread
    results: list[BenchResult]


class _Pass(NamedTuple):
    prefill: float  # seconds
    decode: float  # seconds


def bench(paths: Sequence[str | Path], workload: Workload, *, device: str = "auto", dtype: torch.dtype | None = None,
          progress: Callable[[str], None] = lambda text: None) -> Bench:
    """Measure models side by side.

    Args:
        paths: model directories, quantized or not.
        workload: what they do.
        device, dtype: as for `gptq_belle.load`.
        progress: told what begins.
    Raises:
        UsageError: prompt and answer do not fit into a model's context.
        InputError, HardwareError: a model cannot be loaded.
    """
    models = []
    for path in paths:
        progress(f"loading {path}")
        models.append(load(path, device=device, dtype=dtype))
        _check_context(models[-1], workload)
    passes: list[list[_Pass]] = [[] for _ in models]
    for model in models:
        progress(f"warming up {model.path}")
        _run(model, Workload(workload.prompt, 2, workload.batch))
    for repeat in range(workload.repeats):
        for model, times in zip(models, passes, strict=True):
            progress(f"repeat {repeat + 1} of {workload.repeats}: {model.path}")
            times.append(_run(model, workload))
    progress("reading memory")
    bandwidth = read_bandwidth(models[0].device)
    results = []
    for model, times in zip(models, passes, strict=True):
        progress(f"memory and load time of {model.path}, in a process of its own")
        footprint = peak.fresh(model.path, device=device, dtype=dtype, prompt=workload.prompt, batch=workload.batch)
        results.append(_result(model, workload, times, footprint, bandwidth.median))
    return Bench(workload, bandwidth, results)


def _check_context(model: Model, workload: Workload) -> None:
    wanted = workload.prompt + workload.tokens
    if model.context is not None and wanted > model.context:
        raise UsageError(f"{wanted} tokens do not fit into the context of {model.path}, which is {model.context}",
                         "Choose a smaller -p or -n.")


def _run(model: Model, workload: Workload) -> _Pass:
    """One repeat; the tokens' values do not matter to its time, and eos does not end it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (workload.batch, workload.prompt), generator=generator)
    synchronize(model.device)
    began = time.perf_counter()
    logits, cache = model.prefill(ids)
    tokens = logits.argmax(-1)
    synchronize(model.device)
    middle = time.perf_counter()
    for _ in range(workload.tokens):
        tokens = model.decode(tokens, cache).argmax(-1)
    synchronize(model.device)
    return _Pass(middle - began, time.perf_counter() - middle)


def _result(model: Model, workload: Workload, times: Sequence[_Pass], footprint: Footprint,
            bandwidth: float) -> BenchResult:
    read = workload.batch * workload.prompt
    decode = spread([workload.batch * workload.tokens / t.decode for t in times])
    step = workload.batch / decode.median
    size = weight_bytes(model.hf)
    stated: Any = getattr(model.config, "quantization_config", None)
    return BenchResult(
        path=model.path,
        bits=stated.get("bits") if isinstance(stated, dict) else None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        footprint=footprint,
        first_token=spread([t.prefill for t in times]),
        prefill=spread([read / t.prefill for t in times]),
        decode=decode,
        weight_bytes=size,
        achieved=size / step,
        bound=bound(size, step, bandwidth, _profile_step(model, workload, step)),
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that a step reads whole; tensors that modules share count once."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    looked_up = {id(tensor) for tensor in embedding.parameters()} if not tied else set()
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in looked_up)


class StepProfile(NamedTuple):
    """Where the time of a decoding step goes on the CPU that drives it."""

    outside: float  # share of the time outside of torch's operations: Python, 0 to 1
    operation: str  # the operation that takes the most
    share: float  # its share, 0 to 1


class _OperationTimes(TorchDispatchMode):
    """Seconds spent in each of torch's operations while it is active, by name.

    torch.profiler knows more, but needs seconds to start and writes to stderr. What this costs falls outside of the
    times it takes; so they are held against a step that was timed without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func._schema.name.removeprefix("aten::")] += time.perf_counter() - began  # type: ignore[assignment]
        return result


def _profile_step(model: Model, workload: Workload, step: float) -> StepProfile:
    """Profile some steps; `step` is what one takes otherwise, in seconds."""
    logits, cache = model.prefill(torch.ones(workload.batch, workload.prompt, dtype=torch.int64))
    tokens = logits.argmax(-1)
    with _OperationTimes() as times:
        for _ in range(PROFILED_STEPS):
            tokens = model.decode(tokens, cache).argmax(-1)
    whole = step * PROFILED_STEPS
    [(name, most)] = times.seconds.most_common(1)
    return StepProfile(max(0.0, 1 - times.seconds.total() / whole), name, min(1.0, most / whole))


def bound(size: int, step: float, bandwidth: float, where: StepProfile) -> str:
    """What limits decoding, in one line.

    Args:
        size: bytes of weights a step reads.
        step: its median time in seconds.
        bandwidth: what the machine reads, in bytes per second.
        where: a profile of some steps.
    """
    share = size / bandwidth / step
    read = f"reading {size / 1e6:,.1f} MB of weights takes {100 * share:.0f} % of a step's {1000 * step:.2f} ms"
    if share >= MOSTLY:
        kept = ", in part from the cache" if size < last_level_cache() else ""
        return f"memory bandwidth: {read}{kept}"
    if where.outside >= 0.5:
        return f"Python and call overhead ({100 * where.outside:.0f} % of the time is outside of operations); {read}"
    return (f"arithmetic and call overhead: {where.operation} takes {100 * where.share:.0f} %, Python "
            f"{100 * where.outside:.0f} %; {read}")
