"""Where the time of a decoding step goes: linears, attention, head, and the rest between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.measure.phases import PhaseClock
from gptq_belle.measure.timing import synchronize
from gptq_belle.runtime.engine import Model
from gptq_belle.runtime.weights import Dense, Packed, SideBySide

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
    through, replays = decoder.through, model.replays
    changed: list[tuple[Any, str, Any]] = [(decoder, "head", decoder.head)]
    changed += [(block, name, value) for block in decoder.blocks for name, value in vars(block).items()
                if isinstance(value, Packed | Dense | SideBySide)]

    def timed(action: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            with clock(name):
                return action(*args)
        return run

    decoder.through = lambda x, attend: through(x, timed(attend, ATTENTION))
    model.replays = False  # what is recorded has no parts
    try:
        for owner, name, value in changed:
            setattr(owner, name, timed(value, HEAD if owner is decoder else LINEARS))
        yield
    finally:
        del decoder.through  # the class's own again
        model.replays = replays
        for owner, name, value in changed:
            setattr(owner, name, value)


def step_shares(model: Model, batch: int, prompt: int, step: float) -> Shares:
    """Time the parts of some steps behind `prompt` tokens.

    Args:
        model: loaded.
        batch, prompt: rows, and tokens of each in front.
        step: seconds that a step takes without clocks; what they cost is in none of the parts, so it counts for none.
    """
    logits, session = model.prefill(torch.ones(batch, prompt, dtype=torch.int64), STEPS)
    tokens = logits.argmax(-1)
    clock = PhaseClock(lambda: synchronize(model.device))
    with clocked(model, clock):
        for _ in range(STEPS):
            tokens = model.decode(tokens, session).argmax(-1)
    linears, attention, head = (clock.seconds[name] / STEPS / step for name in (LINEARS, ATTENTION, HEAD))
    whole = max(1.0, linears + attention + head)
    return Shares(linears / whole, attention / whole, head / whole, max(0.0, 1 - linears - attention - head))
