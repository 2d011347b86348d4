"""Quality gates such as `kl<0.05`: the command fails with exit code 5 if a checkpoint is worse."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from gptq_belle.errors import GateError, UsageError
from gptq_belle.evaluation.answer_metrics import ClassMetrics
from gptq_belle.evaluation.belle_set import BelleScores
from gptq_belle.evaluation.kl_statistics import CHANGE_QUANTILES, KL_QUANTILES

_GATE = re.compile(r"\s*([\w.%]+)\s*([<>]=?)\s*([-+\d.eE]+)\s*")
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SHORT = {"ppl": "perplexity", "kl": "kl_mean"}
QUANTILES = {"kl_quantiles": ("kl", KL_QUANTILES), "probability_quantiles": ("change", CHANGE_QUANTILES)}
BELLE_METRICS = tuple(field.name for field in fields(ClassMetrics))


class QualityGate(NamedTuple):
    """A metric, "<", "<=", ">" or ">=", and the limit."""

    name: str
    sign: str
    limit: float


def parse_gate(gate: str, names: Sequence[str]) -> QualityGate:
    """Parse a text such as "kl<0.05".

    Raises:
        UsageError: another form, or a metric that is not in `names`.
    """
    found = _GATE.fullmatch(gate)
    try:
        if found and found[1] in names:
            return QualityGate(found[1], found[2], float(found[3]))
    except ValueError:
        pass
    raise UsageError(f"gate {gate!r} is not understood",
                     f"Write it like {names[0]}<0.05, with one of {', '.join(names)}, and <, <=, > or >=.")


def parse_gates(gates: Sequence[str] | None, names: Sequence[str]) -> list[QualityGate]:
    """`parse_gate` for every text of an option; none for None."""
    return [parse_gate(gate, names) for gate in gates or ()]


def check_gates(gates: Sequence[QualityGate], values: Mapping[str, float]) -> Iterator[str]:
    """Compare metrics with gates; NaN passes no gate.

    Returns:
        A sentence for each gate that is passed, in order.
    Raises:
        GateError: for the first gate that is missed, with the value.
    """
    for name, sign, limit in gates:
        value = values[name]
        if not SIGNS[sign](value, limit):
            raise GateError(f"the gate {name}{sign}{limit:g} is missed: {name} is {value:.6g}",
                            "Quantize with more bits, smaller groups or more calibration text.")
        yield f"The gate {name}{sign}{limit:g} holds: {name} is {value:.6g}."


def metric_names(kind: type) -> list[str]:
    """Names of the metrics of a result class, short names first; a quantile is written like kl_99%."""
    plain = [field.name for field in fields(kind)]
    quantiles = [f"{short}_{100 * share:g}%" for name, (short, shares) in QUANTILES.items() if name in plain
                 for share in shares]
    return [short for short, name in SHORT.items() if name in plain] + [
        name for name in plain if name not in QUANTILES] + quantiles


def metric_values(found: Any) -> dict[str, float]:
    """The values of `metric_names`."""
    plain = asdict(found)
    quantiles = {f"{short}_{share}": value for name, (short, _) in QUANTILES.items()
                 for share, value in plain.pop(name, {}).items()}
    return plain | quantiles | {short: plain[name] for short, name in SHORT.items() if name in plain}


def belle_metric_names(classes: Iterable[str]) -> list[str]:
    """Names of the metrics of a test set: over all questions, and of one class as in f1.math."""
    return ["exact", *(name for name in BELLE_METRICS if name != "exact"),
            *(f"{name}.{cls}" for cls in dict.fromkeys(classes) for name in BELLE_METRICS)]


def belle_metric_values(found: BelleScores) -> dict[str, float]:
    """The values of `belle_metric_names`; NaN if not measured. "exact" is over the classes with one right answer."""
    values: dict[str, Any] = {**asdict(found.total), "exact": found.exact}
    values |= {f"{name}.{cls}": value for cls, one in found.figures.items() for name, value in asdict(one).items()}
    return {name: math.nan if value is None else value for name, value in values.items()}
