"""Quality gates: `kl<0.05` on the command line makes a worse checkpoint fail, with exit code 5."""

import re
from collections.abc import Mapping, Sequence

from gptq_belle.errors import GateError, UsageError

_GATE = re.compile(r"\s*([\w.%]+)\s*([<>])\s*([-+\d.eE]+)\s*")


def parse(gate: str, names: Sequence[str]) -> tuple[str, str, float]:
    """(figure, "<" or ">", limit) of a text such as "kl<0.05".

    Raises:
        UsageError: another form, or a figure that is not among `names`.
    """
    found = _GATE.fullmatch(gate)
    try:
        if found and found[1] in names:
            return found[1], found[2], float(found[3])
    except ValueError:
        pass
    raise UsageError(f"gate {gate!r} is not understood",
                     f"Write it like {names[0]}<0.05, with one of {', '.join(names)}, and < or >.")


def check(gates: Sequence[tuple[str, str, float]], figures: Mapping[str, float]) -> None:
    """Hold figures against parsed gates; not a number passes none.

    Raises:
        GateError: the first gate that is missed, with the figure.
    """
    for name, sign, limit in gates:
        value = figures[name]
        if not (value < limit if sign == "<" else value > limit):
            raise GateError(f"the gate {name}{sign}{limit:g} is missed: {name} is {value:.6g}",
                            "Quantize with more bits, smaller groups or more calibration text.")
