"""The pictures beside a report, for model cards and articles, drawn with matplotlib. Labels are in English, which every
font can show."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gptq_belle.common.plots import COLOURS, drawable, font_settings
from gptq_belle.evaluation.report_charts import FULL, score, with_colours
from gptq_belle.evaluation.report_models import ReportModel
from gptq_belle.evaluation.report_results import KL_EDGES

DPI = 150
ANNOTATED = 12  # maximum number of blocks for which the map prints the values


def draw(models: Sequence[ReportModel], folder: Path) -> dict[str, Path]:
    """Write every picture for which there are results, and return the files by name: errors-0, errors-1, ..., kl,
    classes, size."""
    made: dict[str, Path] = {}
    with rc_context({**font_settings(), "axes.spines.top": False, "axes.spines.right": False}):
        for name, figure in _figures(models):
            made[name] = folder / f"{name}.png"
            figure.savefig(made[name], dpi=DPI)
    return made


def _figures(models: Sequence[ReportModel]) -> Iterator[tuple[str, Figure]]:
    errors = [cell.error for model in models for cell in model.linear_errors() if cell.error > 0]
    for number, model in enumerate(models):
        if model.linear_errors() and errors:
            yield f"errors-{number}", heat_map(model, min(errors), max(errors))
    if any("histogram" in (model.results.text or {}) for model in models):
        yield "kl", kl_distribution(models)
    tested = [model for model in models if model.results.test]
    if any(model.results.test["classes"] for model in tested if model.results.test):
        yield "classes", class_bars(tested)
    yield "size", size_bars(models)


def heat_map(model: ReportModel, low: float, high: float) -> Figure:
    """Error of every linear's output, one row per block and one column per linear; `low` and `high` are the ends of the
    colour scale."""
    cells = model.linear_errors()
    blocks = sorted({cell.block for cell in cells})
    linears = list(dict.fromkeys(cell.linear for cell in cells))
    values = numpy.full((len(blocks), len(linears)), math.nan)
    for cell in cells:
        values[blocks.index(cell.block), linears.index(cell.linear)] = cell.error
    figure = Figure(figsize=(2.6 + 0.95 * len(linears), 2.2 + 0.24 * max(len(blocks), 4)), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(low / 1.05, high * 1.05)
    image = axes.imshow(numpy.ma.masked_less_equal(values, 0), cmap="Blues", norm=norm, aspect="auto")
    axes.set(title=f"{drawable(model.label)}: error of the outputs", ylabel="block", yticks=range(len(blocks)),
             xticks=range(len(linears)))
    axes.set_xticklabels([name.split(".")[-1] for name in linears], rotation=30, ha="right")
    axes.set_yticklabels([str(block) for block in blocks])
    axes.spines[:].set_visible(False)
    if len(blocks) <= ANNOTATED:
        for (row, column), value in numpy.ndenumerate(values):
            if value > 0:
                dark = norm(value) > 0.6
                axes.text(column, row, f"{value:.1e}", ha="center", va="center", fontsize="x-small",
                          color="white" if dark else "black")
    figure.colorbar(image, ax=axes, label="share of the output's square")
    return figure


def kl_distribution(models: Sequence[ReportModel]) -> Figure:
    """Histogram of the tokens' KL divergence from full precision, with the mean of each model."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    last = 1
    for colour, model in with_colours(models):
        text = model.results.text or {}
        if "histogram" not in text:
            continue
        shares = 100 * numpy.array(text["histogram"]) / sum(text["histogram"])
        last, mean = max(last, int(shares.nonzero()[0][-1])), text["divergence"]["kl_mean"]
        axes.stairs(shares[1:], KL_EDGES[1:], color=colour, fill=True, alpha=0.35)
        axes.stairs(shares[1:], KL_EDGES[1:], color=colour, linewidth=1.5,
                    label=f"{drawable(model.label)}: mean {mean:.2g}, {shares[0]:.1f} % of tokens below "
                          f"{KL_EDGES[1]:.0e}")
        axes.axvline(max(mean, KL_EDGES[1]), color=colour, linestyle="--", linewidth=1.2)
    axes.set(xscale="log", xlim=(KL_EDGES[1], KL_EDGES[last + 1]), ylabel="tokens, %",
             xlabel="KL(full precision || quantized), nats; five bars a power of ten; dashed: mean")
    figure.legend(frameon=False, loc="outside upper left")
    return figure


def class_bars(models: Sequence[ReportModel]) -> Figure:
    """Scores: one group of bars per class, one bar per model."""
    names = list(dict.fromkeys(name for model in models for name in (model.results.test or {})["figures"]))
    names = [name for name in names if any(score(each.results.test or {}, name) is not None for each in models)]
    width = 0.8 / len(models)
    figure = Figure(figsize=(max(6.0, 1.6 + 0.9 * len(names)), 4), layout="constrained")
    axes = figure.subplots()
    for place, (colour, model) in enumerate(with_colours(models)):
        heights = [score(model.results.test or {}, name) or 0.0 for name in names]
        at = numpy.arange(len(names)) + (place - (len(models) - 1) / 2) * width
        drawn = axes.bar(at, heights, 0.92 * width, color=colour, label=drawable(model.label))
        if len(models) <= 3:
            axes.bar_label(drawn, fmt="{:.0f}", fontsize="xx-small", padding=1)
    axes.set(title="score by class, %", ylim=(0, 108), yticks=range(0, 101, 20), xticks=range(len(names)))
    axes.set_xticklabels([drawable(name) for name in names], rotation=25, ha="right")
    figure.legend(frameon=False, ncols=min(4, len(models)), loc="outside lower center")
    return figure


def size_bars(models: Sequence[ReportModel]) -> Figure:
    """Size of the weight files by part of the model."""
    found = [model.inspection.parts for model in models]
    total = {part: sum(one[part].bytes for one in found if part in one) for one in found for part in one}
    parts = sorted(total, key=lambda part: -total[part])
    figure = Figure(figsize=(8, 1.7 + 0.5 * len(models)), layout="constrained")
    axes = figure.subplots()
    labels = [drawable(model.label) for model in models]
    left = numpy.zeros(len(models))
    for place, part in enumerate(parts):
        widths = numpy.array([one[part].bytes / 1e6 if part in one else 0.0 for one in found])
        drawn = axes.barh(labels, widths, left=left, label=part, color=(*COLOURS, FULL)[place % 7])
        left += widths
    axes.bar_label(drawn, [f"{model.inspection.bytes / 1e6:,.1f}" for model in models], padding=4)
    axes.set(xlabel="size of the weights, MB", xlim=(0, 1.15 * left.max()))
    axes.invert_yaxis()
    figure.legend(frameon=False, ncols=4, loc="outside lower center", fontsize="small")
    return figure
