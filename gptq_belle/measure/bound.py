"""What bounds a step of decoding: reading the weights, torch's operations, or the Python between them."""

import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_belle.measure.bandwidth import last_level_cache
from gptq_belle.runtime.engine import Model

PROFILED_STEPS = 8
MOSTLY = 0.6  # the share of a step's time from which reading is called its bound


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


def profile_step(model: Model, batch: int, prompt: int, step: float) -> StepProfile:
    """Profile some steps behind `prompt` tokens; `step` is what one takes otherwise, in seconds."""
    logits, cache = model.prefill(torch.ones(batch, prompt, dtype=torch.int64))
    tokens = logits.argmax(-1)
    with _OperationTimes() as times:
        for _ in range(PROFILED_STEPS):
            tokens = model.decode(tokens, cache).argmax(-1)
    whole = step * PROFILED_STEPS
    [(name, most)] = times.seconds.most_common(1)
    return StepProfile(max(0.0, 1 - times.seconds.total() / whole), name, min(1.0, most / whole))


def explain(size: int, step: float, bandwidth: float, where: StepProfile) -> str:
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
    python = f", Python {100 * where.outside:.0f} %" if where.outside >= 0.05 else ""
    return f"arithmetic and call overhead: {where.operation} takes {100 * where.share:.0f} %{python}; {read}"
