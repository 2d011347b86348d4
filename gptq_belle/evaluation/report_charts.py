"""The charts of a report's page. templates/charts.html.j2 turns them into HTML, whose text every browser can show in
both languages, at any width, and in light and dark colours."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptq_belle.common.plots import COLOURS
from gptq_belle.evaluation.report_models import ReportModel
from gptq_belle.evaluation.report_results import KL_EDGES
from gptq_belle.evaluation.report_words import CLASSES_ZH, PARTS_ZH

FULL = "#999999"  # the colour of full precision
DECADE_LABELS = 6  # maximum number of labels on the axis of the KL divergence, which a phone can show
ClassValue = Callable[[dict[str, Any], str], float | None]


class Row(NamedTuple):
    """One bar: its label, its segments as (colour, width in percent of the chart), and the value after it."""

    english: str
    chinese: str
    segments: list[tuple[str, float]]
    text: str


class BarChart(NamedTuple):
    """Horizontal bars, and a legend of (colour, English, Chinese)."""

    rows: list[Row]
    legend: list[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Histogram of the tokens' KL divergence on a logarithmic axis.

    Attributes:
        curves: per model the colour, its outline as the path of an SVG of 100 x 100, and the place of its mean.
        legend: per model the colour, label, mean, and percent of the tokens below the axis.
        decades: (place in percent, label) on the axis.
        lowest, highest: the left end of the axis, and the largest share in percent.
    """

    curves: list[tuple[str, str, float]]
    legend: list[tuple[str, str, str, str]]
    decades: list[tuple[float, str]]
    lowest: str
    highest: str


def with_colours(models: Sequence[ReportModel]) -> Iterator[tuple[str, ReportModel]]:
    """Every model with its colour."""
    rest = iter(COLOURS * len(models))
    for model in models:
        yield FULL if model.full else next(rest), model


def error_map(model: ReportModel, models: Sequence[ReportModel]) -> dict[str, Any]:
    """Error of every linear's output: names of linears, and per block (number, cells of (text, shade) or None).

    A shade is from 0 to 1 on a logarithmic scale that all models share.
    """
    errors = [math.log(cell.error) for each in models for cell in each.linear_errors() if cell.error > 0]
    low, span = (min(errors), max(errors) - min(errors) or 1.0) if errors else (0.0, 1.0)
    found = {(cell.block, cell.linear): cell.error for cell in model.linear_errors()}
    linears = list(dict.fromkeys(linear for _, linear in found))
    return {"linears": [name.split(".")[-1] for name in linears],
            "rows": [(block, [_cell(found.get((block, linear)), low, span) for linear in linears])
                     for block in sorted({block for block, _ in found})]}


def _cell(error: float | None, low: float, span: float) -> tuple[str, float] | None:
    if error is None:
        return None
    return short_exponent(error), (math.log(error) - low) / span if error > 0 else 0.0


def short_exponent(value: float, digits: int = 1) -> str:
    """0.0019 as "1.9e-3"."""
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def kl_distribution(models: Sequence[ReportModel]) -> Distribution | None:
    """The tokens' KL divergence from full precision; None where it was not measured."""
    found = [(colour, model, model.results.text) for colour, model in with_colours(models)
             if "histogram" in (model.results.text or {})]
    shares = {model.label: [100 * count / sum(text["histogram"]) for count in text["histogram"]]
              for _, model, text in found if text}
    if not shares:
        return None
    filled = [place for one in shares.values() for place, share in enumerate(one) if share and place]
    first, last = (min(filled), max(filled) + 1) if filled else (1, 2)
    low, high = math.log10(KL_EDGES[first]), math.log10(KL_EDGES[last])
    highest = max(max(one[first:last]) for one in shares.values()) or 1.0

    def place(kl: float) -> float:
        return 100 * min(1.0, max(0.0, (math.log10(max(kl, KL_EDGES[1])) - low) / (high - low)))

    curves, legend = [], []
    for colour, model, text in found:
        one, mean = shares[model.label], (text or {})["divergence"]["kl_mean"]
        steps = " ".join(f"V{100 - 100 * one[bin] / highest:.2f}H{place(KL_EDGES[bin + 1]):.2f}"
                         for bin in range(first, last))
        curves.append((colour, f"M0 100{steps}V100Z", place(mean)))
        legend.append((colour, model.label, f"{mean:.2g}", f"{sum(one[:first]):.1f}"))
    step = max(1, math.ceil((high - low) / DECADE_LABELS))
    decades = [(place(10.0**power), f"1e{power}") for power in range(math.ceil(low), math.floor(high) + 1, step)]
    return Distribution(curves, legend, decades, short_exponent(KL_EDGES[first], 0), f"{highest:.0f}")


def class_chart(models: Sequence[ReportModel], value: ClassValue) -> BarChart | None:
    """One bar per class and model, in percent; None without values."""
    tested = [(colour, model, model.results.test) for colour, model in with_colours(models) if model.results.test]
    rows: list[Row] = []
    seen = set()
    for name in dict.fromkeys(name for *_, test in tested if test for name in test["figures"]):
        values = [(colour, model, value(test, name)) for colour, model, test in tested if test]
        for number, (colour, model, share) in enumerate(one for one in values if one[2] is not None):
            seen.add(model.label)
            english, chinese = ("", "") if number else (name, CLASSES_ZH.get(name, name))
            rows.append(Row(english, chinese, [(colour, share or 0.0)], f"{share:.0f}"))
    legend = [(colour, model.label, model.label) for colour, model, _ in tested if model.label in seen]
    return BarChart(rows, legend) if rows else None


def size_chart(models: Sequence[ReportModel]) -> BarChart:
    """Size of the weight files by part of the model."""
    largest = max(model.inspection.bytes for model in models)
    total: dict[str, int] = {}
    for model in models:
        for name, part in model.inspection.parts.items():
            total[name] = total.get(name, 0) + part.bytes
    colours = dict(zip(sorted(total, key=lambda name: -total[name]), (*COLOURS, FULL) * len(total), strict=False))
    rows = [Row(model.label, model.label,
                [(colour, 100 * model.inspection.parts[name].bytes / largest) for name, colour in colours.items()
                 if name in model.inspection.parts], f"{model.inspection.bytes / 1e6:,.1f}") for model in models]
    return BarChart(rows, [(colour, name, PARTS_ZH.get(name, name)) for name, colour in colours.items()])


def memory_chart(models: Sequence[ReportModel]) -> BarChart | None:
    """Peak memory of loading and running, each measured in a new process; None where it was not measured."""
    peaks = [(colour, model.label, peak) for colour, model in with_colours(models)
             if (peak := (model.results.footprint or {}).get("peak_bytes"))]
    return BarChart([Row(label, label, [(colour, 100 * peak / max(size for *_, size in peaks))], f"{peak / 1e6:,.1f}")
                     for colour, label, peak in peaks], []) if peaks else None


def score(test: dict[str, Any], name: str) -> float | None:
    """A class's score in percent."""
    found: float | None = test["classes"].get(name, {}).get("score")
    return found


def agreement(test: dict[str, Any], name: str) -> float | None:
    """Percent of a class's tokens that are those of full precision."""
    found: float | None = test["figures"][name]["agreement"]
    return found
