"""The picture of `bench`: tokens per second of prefill and decode by depth, model and batch size, and peak memory."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptq_belle.bench.doctor import machine_summary
from gptq_belle.bench.throughput import MB, Benchmark
from gptq_belle.common.plots import COLOURS, drawable, font_settings
from gptq_belle.common.timers import Spread
from gptq_belle.errors import HardwareError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS_HEIGHT = 0.8  # of the bars of one model, relative to the distance between models


class BatchSeries(NamedTuple):
    """Speeds at one depth and memory (bytes) of all models at one batch size, in the order of the results."""

    batch: int
    prefill: list[Spread]
    decode: list[Spread]
    memory: list[int | None]


def plot(benchmark: Benchmark, path: Path) -> None:
    """Draw bars for every model, one per batch size, with the range of the repeats; one row of them per depth.

    Args:
        benchmark: the measurements.
        path: the picture to write; its suffix is the format.
    Raises:
        UsageError: an unknown format.
        HardwareError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context

    with rc_context(font_settings()):
        _figure(benchmark).savefig(path, dpi=150)


def _figure(benchmark: Benchmark) -> "Figure":
    from matplotlib.figure import Figure

    names, depths = list(map(drawable, benchmark.names)), sorted({point.depth for point in benchmark.points}) or [0]
    found = batch_series(benchmark, depths[0])
    figure = Figure(figsize=(11, 1 + len(depths) * (0.8 + 0.3 * len(names) * (1 + len(found)))), layout="constrained")
    rows = figure.subplots(len(depths), 3, squeeze=False)
    for (prefill, decode, memory), depth in zip(rows, depths, strict=True):
        found, where = batch_series(benchmark, depth), f" at depth {depth:,}" if depth else ""
        _bars(prefill, names, found, [one.prefill for one in found])
        prefill.set(title=f"prefill of {benchmark.workload.prompt} tokens{where}", xlabel="tokens/s")
        _bars(decode, names, found, [one.decode for one in found])
        decode.set(title=f"decode of {benchmark.workload.tokens} tokens{where}", xlabel="tokens/s", yticklabels=[])
        memory.set_visible(depth == depths[0])  # it is measured once, after the largest depth
    memory = rows[0, 2]
    sizes = [[Spread(size / MB, size / MB, size / MB, ()) for size in (m or 0 for m in one.memory)] for one in found]
    _bars(memory, names, found, sizes)
    memory.set(title="peak memory", xlabel="MB", yticklabels=[])
    if len(found) > 1:
        figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    figure.suptitle(machine_summary(), fontsize="small")
    return figure


def batch_series(benchmark: Benchmark, depth: int) -> list[BatchSeries]:
    """The values of the bars at one depth, by batch size."""
    memory = {(one.path, one.batch): one.bytes for one in benchmark.memory}
    paths = [result.path for result in benchmark.results]
    if not benchmark.points:
        batch = benchmark.workload.batch
        return [BatchSeries(batch, [result.prefill for result in benchmark.results],
                            [result.decode for result in benchmark.results], [memory[path, batch] for path in paths])]
    found = {(point.path, point.batch): point for point in benchmark.points if point.depth == depth}
    return [BatchSeries(batch, [found[path, batch].prefill for path in paths],
                        [found[path, batch].decode for path in paths], [memory[path, batch] for path in paths])
            for batch in dict.fromkeys(point.batch for point in benchmark.points)]


def check_plot(path: Path) -> None:
    """Check before the measurement that `plot` can write the picture; raises the same errors."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise HardwareError("--plot needs matplotlib, which is not installed",
                            "Install it with: pip install 'gptq-belle[plot]'") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"the suffix of {path} is not a picture format",
                         "Choose a name that ends in .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.parent} for the picture does not exist", "Create it first.")


def _bars(axes: "Axes", names: list[str], found: list[BatchSeries], values: list[list[Spread]]) -> None:
    """Groups of horizontal bars: one group per model, one bar per batch size."""
    height = BARS_HEIGHT / len(found)
    for place, (one, spreads) in enumerate(zip(found, values, strict=True)):
        at = [row + (place - (len(found) - 1) / 2) * height for row in range(len(names))]
        medians = [s.median for s in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.barh(at, medians, height, xerr=errors, color=COLOURS[place % len(COLOURS)], ecolor="#222222",
                         capsize=2, label=f"batch {one.batch}")
        axes.bar_label(bars, fmt="{:,.0f}" if max(medians) >= 1000 else "{:,.1f}", padding=4, fontsize="small")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.3 * max(s.high for row in values for s in row)))
    axes.invert_yaxis()
