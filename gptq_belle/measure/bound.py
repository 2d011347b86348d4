"""What bounds a step of decoding: reading the weights, or a part of the model that takes longer than its reading."""

from gptq_belle.measure.bandwidth import last_level_cache
from gptq_belle.measure.parts import Shares

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
