"""The picture of `bench`: tokens per second of prefill and decode, and peak memory, by model and batch."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptq_belle.bench.doctor import machine
from gptq_belle.bench.throughput import MB, Bench, labels
from gptq_belle.common.timers import Spread
from gptq_belle.errors import HardwareError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's, told apart by all eyes
THICKNESS = 0.8  # of a model's bars together, of the distance between models


class Series(NamedTuple):
    """One batch: what is drawn of each model, in the order of the results; memory in bytes."""

    batch: int
    prefill: list[Spread]
    decode: list[Spread]
    memory: list[int | None]


def plot(bench: Bench, path: Path) -> None:
    """Draw bars for every model, one a batch, with the range of the repeats.

    Args:
        bench: what was measured; of several depths, the smallest is drawn.
        path: the picture to write; its ending names the format.
    Raises:
        UsageError: an ending that is no format of pictures.
        HardwareError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    found, names = series(bench), labels(bench.results)
    figure = Figure(figsize=(11, 1.8 + 0.3 * len(names) * (1 + len(found))), layout="constrained")
    prefill, decode, memory = figure.subplots(1, 3)
    _bars(prefill, names, found, [one.prefill for one in found])
    prefill.set(title=f"prefill of {bench.workload.prompt} tokens", xlabel="tokens/s")
    _bars(decode, names, found, [one.decode for one in found])
    decode.set(title=f"decode of {bench.workload.tokens} tokens", xlabel="tokens/s", yticklabels=[])
    sizes = [[Spread(size / MB, size / MB, size / MB, ()) for size in (m or 0 for m in one.memory)] for one in found]
    _bars(memory, names, found, sizes)
    memory.set(title="peak memory", xlabel="MB", yticklabels=[])
    if len(found) > 1:
        figure.legend(*prefill.get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    figure.suptitle(machine(), fontsize="small")
    figure.savefig(path, dpi=150)


def series(bench: Bench) -> list[Series]:
    """What is drawn, batch by batch."""
    memory = {(one.path, one.batch): one.bytes for one in bench.memory}
    paths = [result.path for result in bench.results]
    if not bench.points:
        return [Series(bench.workload.batch, [r.prefill for r in bench.results], [r.decode for r in bench.results],
                       [memory[path, bench.workload.batch] for path in paths])]
    shallow = min(point.depth for point in bench.points)
    found = {(point.path, point.batch): point for point in bench.points if point.depth == shallow}
    return [Series(batch, [found[path, batch].prefill for path in paths], [found[path, batch].decode for path in paths],
                   [memory[path, batch] for path in paths])
            for batch in dict.fromkeys(point.batch for point in bench.points)]


def check_plot(path: Path) -> None:
    """Find out before the measurement whether `plot` can work; raises what it raises."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise HardwareError("--plot needs matplotlib, which is not installed",
                            "Install it with: pip install 'gptq-belle[plot]'") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"{path} does not end like a picture", "Choose a name that ends in .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.parent} for the picture does not exist", "Create it first.")


def _bars(axes: "Axes", names: list[str], found: list[Series], values: list[list[Spread]]) -> None:
    """Groups of bars, a group a model and a bar a batch."""
    height = THICKNESS / len(found)
    for place, (one, spreads) in enumerate(zip(found, values, strict=True)):
        at = [row + (place - (len(found) - 1) / 2) * height for row in range(len(names))]
        medians = [s.median for s in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.barh(at, medians, height, xerr=errors, color=COLORS[place % len(COLORS)], ecolor="#222222",
                         capsize=2, label=f"batch {one.batch}")
        axes.bar_label(bars, fmt="{:,.0f}" if max(medians) >= 1000 else "{:,.1f}", padding=4, fontsize="small")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.3 * max(s.high for row in values for s in row)))
    axes.invert_yaxis()
