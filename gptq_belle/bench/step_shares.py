"""Shares of a decode step's time by the parts of the model, and what limits its speed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_double
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptq_belle.bench.bandwidth import last_level_cache
from gptq_belle.common.timers import PhaseClock, synchronize
from gptq_belle.engine.linear import ConcatenatedLinear, DenseLinear, PackedLinear
from gptq_belle.engine.model import Model
from gptq_belle.engine.transformers_decoder import TransformersDecoder
from gptq_belle.kernels.call_recorder import ATTENTION as NATIVE_ATTENTION
from gptq_belle.kernels.call_recorder import CALL_KINDS, PRODUCT, CallRecorder

STEPS = 8  # timed decode steps
LINEARS, ATTENTION, HEAD = "linears", "attention", "head"


class StepShares(NamedTuple):
    """Shares of a step's time, 0 to 1. On CUDA the device is synchronized after each part, so that work which otherwise
    overlaps counts twice."""

    linears: float
    attention: float
    head: float
    rest: float  # norms, activations, embedding, sampling, and Python


@contextmanager
def clock_parts(model: Model, clock: PhaseClock) -> Iterator[None]:
    """A context in which the seconds of the model's linears, attention and head are added to the clock."""
    decoder: Any = model.decoder
    run_blocks, use_step_graphs = decoder.run_blocks, model.use_step_graphs
    replaced = [(owner, name, getattr(owner, name), part) for owner, name, part in _parts(decoder)]

    def timed(action: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            with clock(name):
                return action(*args)
        return run

    if decoder.is_native:
        decoder.run_blocks = lambda x, attention: run_blocks(x, timed(attention, ATTENTION))
    model.use_step_graphs = False  # the parts of a recorded step cannot be timed
    try:
        for owner, name, value, part in replaced:
            setattr(owner, name, timed(value, part))
        yield
    finally:
        vars(decoder).pop("run_blocks", None)  # restores the method of the class
        model.use_step_graphs = use_step_graphs
        for owner, name, value, _ in replaced:
            if isinstance(owner, nn.Module):
                delattr(owner, name)  # as above
            else:
                setattr(owner, name, value)


def _parts(decoder: Any) -> list[tuple[Any, str, str]]:
    """Attributes that are called, by owner and name, with the part of a step that they are. In transformers' forward
    pass attention is no call of ours, and counts as the rest."""
    if isinstance(decoder, TransformersDecoder):
        return [(decoder.head, "forward", HEAD), *((linear, "forward", LINEARS) for linear in decoder.linears)]
    return [(decoder, "head", HEAD), *(
        (block, name, LINEARS) for block in decoder.blocks for name, value in vars(block).items()
        if isinstance(value, PackedLinear | DenseLinear | ConcatenatedLinear))]


@contextmanager
def clock_replayed_parts(model: Model, recorder: CallRecorder, clock: PhaseClock) -> Iterator[None]:
    """`clock_parts` for recorded steps, where the native library times linears and attention."""
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


def measure_step_shares(model: Model, batch: int, prompt: int, step: float) -> StepShares:
    """Time the parts of some decode steps after `prompt` tokens.

    Args:
        batch, prompt: number of sequences, and tokens of each before the steps.
        step: seconds of a step without clocks, whose own cost is outside of the timed parts.
    """
    logits, session = model.prefill(torch.ones(batch, prompt, dtype=torch.int64), STEPS + 1)
    tokens = model.decode(logits.argmax(-1), session).argmax(-1)  # further steps replay the recording of this one
    clock, recorded = PhaseClock(lambda: synchronize(model.device)), session.cache.step_graphs.get(batch)
    with clock_parts(model, clock) if recorded is None else clock_replayed_parts(model, recorded.recorder, clock):
        for _ in range(STEPS):
            tokens = model.decode(tokens, session).argmax(-1)
    linears, attention, head = (clock.seconds[name] / STEPS / step for name in (LINEARS, ATTENTION, HEAD))
    whole = max(1.0, linears + attention + head)
    return StepShares(linears / whole, attention / whole, head / whole, max(0.0, 1 - linears - attention - head))


BANDWIDTH_BOUND = 0.6  # a step is limited by bandwidth if reading the weights takes this share of its time
PART_NAMES = {"linears": "arithmetic of the linears", "attention": "attention", "head": "the lm_head",
              "rest": "Python and call overhead"}


def explain_bound(size: int, step: float, bandwidth: float, shares: StepShares) -> str:
    """What limits the decode speed, in one line.

    Args:
        size: bytes of weights that a step reads.
        step: median time of a step in seconds.
        bandwidth: read bandwidth of the machine in bytes per second.
        shares: shares of the step's time by part.
    """
    share = size / bandwidth / step
    read = f"reading {size / 1e6:,.1f} MB of weights takes {100 * share:.0f} % of a step's {1000 * step:.2f} ms"
    if share >= BANDWIDTH_BOUND:
        kept = ", in part from the cache" if size < last_level_cache() else ""
        return f"memory bandwidth: {read}{kept}"
    name, most = max(shares._asdict().items(), key=lambda item: item[1])
    return f"{PART_NAMES[name]} ({100 * most:.0f} % of the time); {read}"
