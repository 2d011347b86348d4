"""What `bench` prints: a table for people, JSON, JSON Lines or CSV for programs, and a picture."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptq_belle import console
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.measure.bench import Bench, BenchResult
from gptq_belle.measure.doctor import machine
from gptq_belle.measure.timing import Spread

FORMATS = ("md", "json", "jsonl", "csv")
MB = 1e6


def check_format(name: str) -> None:
    """Raises UsageError where `name` is not one of FORMATS."""
    if name not in FORMATS:
        raise UsageError(f"output format {name!r} is not known", f"Choose one of {', '.join(FORMATS)}.")


def show(bench: Bench, output: str) -> None:
    """Print the results on stdout.

    Args:
        bench: what was measured.
        output: one of FORMATS. "md" is drawn as a table on a terminal.
    """
    if output == "json":
        console.print_json({"machine": machine(), **asdict(bench)})
    elif output == "jsonl":
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in flat(bench)))
    elif output == "csv":
        print(_csv(flat(bench)), end="")
    else:
        _show_table(bench)


def flat(bench: Bench) -> list[dict[str, Any]]:
    """A row a model, of plain values in SI units; the names are the columns of the CSV."""
    work = asdict(bench.workload)
    return [{
        "path": str(r.path), "bits": r.bits, "dtype": r.dtype, "precision": r.precision,
        "device": r.device, **work,
        "load_s": r.footprint.load_seconds, "first_token_s": r.first_token.median,
        **_spread("prefill_tps", r.prefill), **_spread("decode_tps", r.decode),
        "peak_bytes": r.footprint.peak_bytes, "process_peak_bytes": r.footprint.process_bytes,
        "cuda_peak_bytes": r.footprint.cuda_bytes, "weight_bytes": r.weight_bytes, "achieved_Bps": r.achieved,
        "machine_Bps": bench.bandwidth.median, "bound": r.bound,
    } for r in bench.results]


def plot(bench: Bench, path: Path) -> None:
    """Draw prefill and decode speeds as bars, with the range of the repeats.

    Args:
        bench: what was measured.
        path: the picture to write; its ending names the format.
    Raises:
        UsageError: an ending that is no format of pictures.
        HardwareError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.5 * len(bench.results)), layout="constrained")
    names = labels(bench.results)
    pairs: Sequence[tuple[str, Callable[[BenchResult], Spread]]] = (
        (f"prefill of {bench.workload.prompt} tokens", lambda r: r.prefill),
        (f"decode of {bench.workload.tokens} tokens", lambda r: r.decode),
    )
    for axes, (title, pick) in zip(figure.subplots(1, 2), pairs, strict=True):
        spreads = [pick(result) for result in bench.results]
        medians = [s.median for s in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.barh(names, medians, xerr=errors, color="#4477aa", ecolor="#222222", capsize=3)
        axes.bar_label(bars, fmt="{:,.1f}", padding=6)
        axes.set(title=title, xlabel="tokens/s", xlim=(0, 1.25 * max(s.high for s in spreads)))
        axes.invert_yaxis()
    figure.suptitle(machine(), fontsize="small")
    figure.savefig(path, dpi=150)


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


def labels(results: Sequence[BenchResult]) -> list[str]:
    """Short names of the models: the last folder where those differ, else the whole path."""
    names = [result.path.resolve().name for result in results]
    return names if len(set(names)) == len(names) else [str(result.path) for result in results]


def _show_table(bench: Bench) -> None:
    work, results = bench.workload, bench.results
    rows: list[tuple[str, Callable[[BenchResult], str]]] = [
        ("bits", lambda r: f"{r.bits:.3g}" if r.bits else "full"),
        ("load, s", lambda r: f"{r.footprint.load_seconds:.2f}"),
        ("prefill, tokens/s", lambda r: ranged(r.prefill)),
        ("first token, ms", lambda r: ranged(r.first_token, 1000)),
        ("decode, tokens/s", lambda r: ranged(r.decode)),
        ("peak memory, MB", lambda r: megabytes(r.footprint.peak_bytes)),
        ("GPU memory, MB", lambda r: megabytes(r.footprint.cuda_bytes)),
        ("weights a step, MB", lambda r: megabytes(r.weight_bytes)),
        ("read, GB/s", lambda r: f"{r.achieved / 1e9:.2f}"),
    ]
    if all(result.footprint.cuda_bytes is None for result in results):
        rows = [row for row in rows if not row[0].startswith("GPU")]
    columns = ["", *labels(results)]
    cells = [[name, *(cell(result) for result in results)] for name, cell in rows]
    first = results[0]
    title = (f"prompt {work.prompt}, {work.tokens} new tokens, batch {work.batch}, {first.dtype} {first.precision}: "
             f"medians of {work.repeats}, ± half of their range")
    if console.out().is_terminal:
        console.print_table(title, columns, cells)
    else:
        console.say(f"{title}\n")
        console.say(markdown(columns, cells))
    console.say()
    for name, result in zip(labels(results), results, strict=True):
        console.say(f"{name} is bound by {result.bound}.")
    console.say(f"Memory reads at {bench.bandwidth.median / 1e9:.1f} GB/s here. Peak memory is above that of the "
                "process before loading.")
    console.say(f"Machine: {machine()}")


def ranged(values: Spread, factor: float = 1.0) -> str:
    """A median with half of the range as a share of it, for reading."""
    middle = factor * values.median
    half = 50 * (values.high - values.low) / values.median
    return f"{middle:,.{0 if middle >= 1000 else 1}f} ±{half:.0f} %"


def megabytes(size: int | None) -> str:
    """Bytes as MB, for reading."""
    return "unknown" if size is None else f"{size / MB:,.1f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def _spread(name: str, values: Spread) -> dict[str, float]:
    return {name: values.median, f"{name}_low": values.low, f"{name}_high": values.high}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
