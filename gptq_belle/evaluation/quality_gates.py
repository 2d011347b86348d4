"""Quality gates: `kl<0.05` on the command line makes a worse checkpoint fail, with exit code 5."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from gptq_belle.errors import GateError, UsageError
from gptq_belle.evaluation.belle_set import BelleScores
from gptq_belle.evaluation.kl_statistics import CHANGE_QUANTILES, KL_QUANTILES
from gptq_belle.evaluation.scores import ClassFigures

_GATE = re.compile(r"\s*([\w.%]+)\s*([<>]=?)\s*([-+\d.eE]+)\s*")
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SHORT = {"ppl": "perplexity", "kl": "kl_mean"}
QUANTILES = {"kl_quantiles": ("kl", KL_QUANTILES), "probability_quantiles": ("change", CHANGE_QUANTILES)}
BELLE = tuple(field.name for field in fields(ClassFigures))


class Gate(NamedTuple):
    """A figure, "<", "<=", ">" or ">=", and the limit."""

    name: str
    sign: str
    limit: float


def parse(gate: str, names: Sequence[str]) -> Gate:
    """The parts of a text such as "kl<0.05".

    Raises:
        UsageError: another form, or a figure that is not among `names`.
    """
    found = _GATE.fullmatch(gate)
    try:
        if found and found[1] in names:
            return Gate(found[1], found[2], float(found[3]))
    except ValueError:
        pass
    raise UsageError(f"gate {gate!r} is not understood",
                     f"Write it like {names[0]}<0.05, with one of {', '.join(names)}, and <, <=, > or >=.")


def check(gates: Sequence[Gate], figures: Mapping[str, float]) -> Iterator[str]:
    """Compare figures with parsed gates; NaN passes none.

    Returns:
        A sentence for each gate that holds, in order.
    Raises:
        GateError: the first gate that is missed, with the figure.
    """
    for name, sign, limit in gates:
        value = figures[name]
        if not SIGNS[sign](value, limit):
            raise GateError(f"the gate {name}{sign}{limit:g} is missed: {name} is {value:.6g}",
                            "Quantize with more bits, smaller groups or more calibration text.")
        yield f"The gate {name}{sign}{limit:g} holds: {name} is {value:.6g}."


def names(kind: type) -> list[str]:
    """What can be named of a dataclass of figures, short names first; a quantile is written like kl_99%."""
    plain = [field.name for field in fields(kind)]
    quantiles = [f"{short}_{100 * share:g}%" for name, (short, shares) in QUANTILES.items() if name in plain
                 for share in shares]
    return [short for short, name in SHORT.items() if name in plain] + [
        name for name in plain if name not in QUANTILES] + quantiles


def figures(found: Any) -> dict[str, float]:
    """The values of `names`."""
    plain = asdict(found)
    quantiles = {f"{short}_{share}": value for name, (short, _) in QUANTILES.items()
                 for share, value in plain.pop(name, {}).items()}
    return plain | quantiles | {short: plain[name] for short, name in SHORT.items() if name in plain}


def belle_names(classes: Iterable[str]) -> list[str]:
    """What can be named of a test set's figures: of all rows, and with a class behind a dot of that class."""
    return ["exact", *(name for name in BELLE if name != "exact"),
            *(f"{name}.{cls}" for cls in dict.fromkeys(classes) for name in BELLE)]


def belle_figures(found: BelleScores) -> dict[str, float]:
    """The values of `belle_names`; "exact" is over the classes with one right answer, not a number where none is."""
    values: dict[str, Any] = {**asdict(found.total), "exact": found.exact}
    values |= {f"{name}.{cls}": value for cls, one in found.figures.items() for name, value in asdict(one).items()}
    return {name: math.nan if value is None else value for name, value in values.items()}
