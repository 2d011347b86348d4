"""Where the time of a decode step goes, and what bounds it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_double
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.bench.bandwidth import last_level_cache
from gptq_belle.common.timers import PhaseClock, synchronize
from gptq_belle.engine.linear import ConcatenatedLinear, DenseLinear, PackedLinear
from gptq_belle.engine.model import Model
from gptq_belle.kernels.call_recorder import ATTENTION as NATIVE_ATTENTION
from gptq_belle.kernels.call_recorder import CALL_KINDS, PRODUCT, CallRecorder

STEPS = 8
LINEARS, ATTENTION, HEAD = "linears", "attention", "head"


class Shares(NamedTuple):
    """Parts of a step's time, 0 to 1. On CUDA each part is waited for, so what overlaps otherwise counts twice."""

    linears: float
    attention: float
    head: float
    rest: float  # norms, activations, embedding, sampling, and Python between all of them


@contextmanager
def clocked(model: Model, clock: PhaseClock) -> Iterator[None]:
    """While it is open, the model's linears, attention and head charge their seconds to the clock."""
    decoder: Any = model.decoder
    through, replays = decoder.run_blocks, model.use_step_graphs
    changed: list[tuple[Any, str, Any]] = [(decoder, "head", decoder.head)]
    changed += [(block, name, value) for block in decoder.blocks for name, value in vars(block).items()
                if isinstance(value, PackedLinear | DenseLinear | ConcatenatedLinear)]

    def timed(action: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            with clock(name):
                return action(*args)
        return run

    decoder.run_blocks = lambda x, attention: through(x, timed(attention, ATTENTION))
    model.use_step_graphs = False  # what is recorded has no parts
    try:
        for owner, name, value in changed:
            setattr(owner, name, timed(value, HEAD if owner is decoder else LINEARS))
        yield
    finally:
        del decoder.run_blocks  # the class's own again
        model.use_step_graphs = replays
        for owner, name, value in changed:
            setattr(owner, name, value)


@contextmanager
def clocked_replays(model: Model, recorder: CallRecorder, clock: PhaseClock) -> Iterator[None]:
    """The same of steps that are recorded: the library itself takes the time of linears and attention."""
    decoder: Any = model.decoder
    head, recorder.seconds = decoder.head, (c_double * len(CALL_KINDS))()

    def timed_head(x: Tensor) -> Tensor:
        with clock(HEAD):
            return head(x)

    decoder.head = timed_head
    try:
        yield
    finally:
        decoder.head = head
        clock.seconds[LINEARS] += recorder.seconds[PRODUCT]
        clock.seconds[ATTENTION] += recorder.seconds[NATIVE_ATTENTION]
        recorder.seconds = None


def step_shares(model: Model, batch: int, prompt: int, step: float) -> Shares:
    """Time the parts of some steps behind `prompt` tokens.

    Args:
        model: loaded.
        batch, prompt: rows, and tokens of each in front.
        step: seconds that a step takes without clocks; what they cost is in none of the parts, so it counts for none.
    """
    logits, session = model.prefill(torch.ones(batch, prompt, dtype=torch.int64), STEPS + 1)
    tokens = model.decode(logits.argmax(-1), session).argmax(-1)  # from now on, it is recorded
    clock, recorded = PhaseClock(lambda: synchronize(model.device)), session.cache.step_graphs.get(batch)
    with clocked(model, clock) if recorded is None else clocked_replays(model, recorded.recorder, clock):
        for _ in range(STEPS):
            tokens = model.decode(tokens, session).argmax(-1)
    linears, attention, head = (clock.seconds[name] / STEPS / step for name in (LINEARS, ATTENTION, HEAD))
    whole = max(1.0, linears + attention + head)
    return Shares(linears / whole, attention / whole, head / whole, max(0.0, 1 - linears - attention - head))


MOSTLY = 0.6  # the share of a step's time from which reading is called its bound
NAMES = {"linears": "arithmetic of the linears", "attention": "attention", "head": "the head",
         "rest": "Python and call overhead"}


def explain(size: int, step: float, bandwidth: float, shares: Shares) -> str:
    """What limits decoding, in one line.

    Args:
        size: bytes of weights a step reads.
        step: its median time in seconds.
        bandwidth: what the machine reads, in bytes per second.
        shares: of the step's time, by part.
    """
    share = size / bandwidth / step
    read = f"reading {size / 1e6:,.1f} MB of weights takes {100 * share:.0f} % of a step's {1000 * step:.2f} ms"
    if share >= MOSTLY:
        kept = ", in part from the cache" if size < last_level_cache() else ""
        return f"memory bandwidth: {read}{kept}"
    name, most = max(shares._asdict().items(), key=lambda item: item[1])
    return f"{NAMES[name]} ({100 * most:.0f} % of the time); {read}"
