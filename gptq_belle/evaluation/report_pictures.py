"""The pictures of a report, by matplotlib. Labels are in English, which every font can show."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from matplotlib import font_manager, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gptq_belle.evaluation.report_evaluations import EDGES
from gptq_belle.evaluation.report_models import Variant

# Paul Tol's "bright", made for the colour-blind; grey is for full precision.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
FULL = "#999999"
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei",
           "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback")
DPI = 150
ANNOTATED = 12  # blocks up to which the map says its figures


def draw(variants: Sequence[Variant], folder: Path) -> dict[str, Path]:
    """Write every picture that the models have figures for, and name the files: errors-0, errors-1, ..., kl, classes,
    agreement, size, memory."""
    made: dict[str, Path] = {}
    with rc_context({"font.family": [*_fonts(), "DejaVu Sans"], "axes.spines.top": False, "axes.spines.right": False}):
        for name, figure in _figures(variants):
            made[name] = folder / f"{name}.png"
            figure.savefig(made[name], dpi=DPI)
    return made


def _figures(variants: Sequence[Variant]) -> Iterator[tuple[str, Figure]]:
    errors = [cell.error for variant in variants for cell in variant.cells() if cell.error > 0]
    for number, variant in enumerate(variants):
        if variant.cells() and errors:
            yield f"errors-{number}", heat_map(variant, min(errors), max(errors))
    if any("histogram" in (variant.results.text or {}) for variant in variants):
        yield "kl", kl_distribution(variants)
    tested = [variant for variant in variants if variant.results.test]
    if any(variant.results.test["classes"] for variant in tested if variant.results.test):
        yield "classes", bars(tested, "score by class, %", _score)
    if any(variant.results.test["total"]["agreement"] is not None for variant in tested if variant.results.test):
        compared = [variant for variant in tested if not variant.full]
        yield "agreement", bars(compared, "tokens as full precision's greedy answer, %", _agreement)
    yield "size", sizes(variants)
    if any((variant.results.footprint or {}).get("peak_bytes") for variant in variants):
        yield "memory", memory(variants)


def heat_map(variant: Variant, low: float, high: float) -> Figure:
    """Error of every linear's output: a row a block, a column a linear; the scale is the report's."""
    cells = variant.cells()
    blocks = sorted({cell.block for cell in cells})
    linears = list(dict.fromkeys(cell.linear for cell in cells))
    values = numpy.full((len(blocks), len(linears)), math.nan)
    for cell in cells:
        values[blocks.index(cell.block), linears.index(cell.linear)] = cell.error
    figure = Figure(figsize=(2.6 + 0.95 * len(linears), 2.2 + 0.24 * max(len(blocks), 4)), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(low / 1.05, high * 1.05)
    image = axes.imshow(numpy.ma.masked_less_equal(values, 0), cmap="viridis", norm=norm, aspect="auto")
    axes.set(title=f"{_plain(variant.label)}: error of the outputs", ylabel="block", yticks=range(len(blocks)),
             xticks=range(len(linears)))
    axes.set_xticklabels([name.split(".")[-1] for name in linears], rotation=30, ha="right")
    axes.set_yticklabels([str(block) for block in blocks])
    axes.spines[:].set_visible(False)
    if len(blocks) <= ANNOTATED:
        for (row, column), value in numpy.ndenumerate(values):
            if value > 0:
                dark = norm(value) < 0.6
                axes.text(column, row, f"{value:.1e}", ha="center", va="center", fontsize="x-small",
                          color="white" if dark else "black")
    figure.colorbar(image, ax=axes, label="share of the output's square")
    return figure


def kl_distribution(variants: Sequence[Variant]) -> Figure:
    """Share of tokens by their KL to full precision, with the mean of each model."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    last = 1
    for colour, variant in _coloured(variants):
        text = variant.results.text or {}
        if "histogram" not in text:
            continue
        shares = 100 * numpy.array(text["histogram"]) / sum(text["histogram"])
        last, mean = max(last, int(shares.nonzero()[0][-1])), text["divergence"]["kl_mean"]
        axes.stairs(shares[1:], EDGES[1:], color=colour, fill=True, alpha=0.35)
        axes.stairs(shares[1:], EDGES[1:], color=colour, linewidth=1.5,
                    label=f"{_plain(variant.label)}: mean {mean:.2g}, {shares[0]:.1f} % of tokens below {EDGES[1]:.0e}")
        axes.axvline(max(mean, EDGES[1]), color=colour, linestyle="--", linewidth=1.2)
    axes.set(xscale="log", xlim=(EDGES[1], EDGES[last + 1]), ylabel="tokens, %",
             xlabel="KL(full precision || quantized), nats; five bars a power of ten; dashed: mean")
    figure.legend(frameon=False, loc="outside upper left")
    return figure


def bars(variants: Sequence[Variant], title: str, value: Callable[[dict[str, Any], str], float | None]) -> Figure:
    """A group of bars a class, a bar a model."""
    names = list(dict.fromkeys(name for variant in variants for name in (variant.results.test or {})["figures"]))
    names = [name for name in names if any(value(v.results.test or {}, name) is not None for v in variants)]
    width = 0.8 / len(variants)
    figure = Figure(figsize=(max(6.0, 1.6 + 0.9 * len(names)), 4), layout="constrained")
    axes = figure.subplots()
    for place, (colour, variant) in enumerate(_coloured(variants)):
        heights = [value(variant.results.test or {}, name) or 0.0 for name in names]
        at = numpy.arange(len(names)) + (place - (len(variants) - 1) / 2) * width
        drawn = axes.bar(at, heights, 0.92 * width, color=colour, label=_plain(variant.label))
        if len(variants) <= 3:
            axes.bar_label(drawn, fmt="{:.0f}", fontsize="xx-small", padding=1)
    axes.set(title=title, ylim=(0, 108), yticks=range(0, 101, 20), xticks=range(len(names)))
    axes.set_xticklabels([_plain(name) for name in names], rotation=25, ha="right")
    figure.legend(frameon=False, ncols=min(4, len(variants)), loc="outside lower center")
    return figure


def sizes(variants: Sequence[Variant]) -> Figure:
    """Size of the weight files, by what is in them."""
    found = [variant.inspection.parts for variant in variants]
    total = {part: sum(one[part].bytes for one in found if part in one) for one in found for part in one}
    parts = sorted(total, key=lambda part: -total[part])
    figure = Figure(figsize=(8, 1.7 + 0.5 * len(variants)), layout="constrained")
    axes = figure.subplots()
    labels = [_plain(variant.label) for variant in variants]
    left = numpy.zeros(len(variants))
    for place, part in enumerate(parts):
        widths = numpy.array([one[part].bytes / 1e6 if part in one else 0.0 for one in found])
        drawn = axes.barh(labels, widths, left=left, label=part, color=(*COLOURS, FULL)[place % 7])
        left += widths
    axes.bar_label(drawn, [f"{variant.inspection.bytes / 1e6:,.1f}" for variant in variants], padding=4)
    axes.set(xlabel="size of the weights, MB", xlim=(0, 1.15 * left.max()))
    axes.invert_yaxis()
    figure.legend(frameon=False, ncols=4, loc="outside lower center", fontsize="small")
    return figure


def memory(variants: Sequence[Variant]) -> Figure:
    """Peak memory of loading and running, each in a process of its own."""
    measured = [(colour, variant) for colour, variant in _coloured(variants)
                if (variant.results.footprint or {}).get("peak_bytes")]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(measured)), layout="constrained")
    axes = figure.subplots()
    found = [(variant.results.footprint or {})["peak_bytes"] / 1e6 for _, variant in measured]
    drawn = axes.barh([_plain(variant.label) for _, variant in measured], found,
                      color=[colour for colour, _ in measured])
    axes.bar_label(drawn, fmt="{:,.1f}", padding=4)
    axes.set(xlabel="peak memory above that of an empty process, MB", xlim=(0, 1.15 * max(found)))
    axes.invert_yaxis()
    return figure


def _score(test: dict[str, Any], name: str) -> float | None:
    return test["classes"].get(name, {}).get("score")


def _agreement(test: dict[str, Any], name: str) -> float | None:
    found: float | None = test["figures"][name]["agreement"]
    return found


def _coloured(variants: Sequence[Variant]) -> Iterator[tuple[str, Variant]]:
    rest = iter(COLOURS * len(variants))
    for variant in variants:
        yield FULL if variant.full else next(rest), variant


@cache
def _fonts() -> list[str]:
    """The first installed font that has Chinese characters, for names of folders and classes."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in CHINESE if name in installed][:1]


def _plain(text: str) -> str:
    """A name as a picture can show it: where no font has Chinese characters, they become question marks."""
    shown = text if _fonts() else text.encode("ascii", "replace").decode()
    return shown.replace("$", r"\$")
