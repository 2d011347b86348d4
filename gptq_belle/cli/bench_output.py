"""Output of `bench`: a Markdown table, JSON, JSON Lines or CSV."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from gptq_belle.bench.doctor import machine_summary
from gptq_belle.bench.throughput import MB, Benchmark, BenchResult
from gptq_belle.cli import console
from gptq_belle.common.text import markdown_table
from gptq_belle.common.timers import Spread


def show(benchmark: Benchmark, output: str) -> None:
    """Print the results on stdout.

    Args:
        output: md, json, jsonl or csv; md is a Markdown table, drawn as a table on a terminal.
    """
    if output == "json":
        console.print_json({"machine": machine_summary(), **asdict(benchmark)})
    elif output == "jsonl":
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in csv_rows(benchmark)))
    elif output == "csv":
        print(_csv(csv_rows(benchmark)), end="")
    else:
        _show_table(benchmark)


def csv_rows(benchmark: Benchmark) -> list[dict[str, Any]]:
    """One row per model of plain values in SI units; the names are the columns of the CSV."""
    work = asdict(benchmark.workload)
    return [{
        "path": str(r.path), "bits": r.bits, "dtype": r.dtype, "precision": r.precision,
        "device": r.device, **work,
        "load_s": r.footprint.load_seconds, "first_token_s": r.first_token.median,
        **_spread("prefill_tps", r.prefill), **_spread("decode_tps", r.decode),
        **{f"{name}_share": share for name, share in r.shares._asdict().items()},
        "peak_bytes": r.footprint.peak_bytes, "process_peak_bytes": r.footprint.process_bytes,
        "cuda_peak_bytes": r.footprint.cuda_bytes, "weight_bytes": r.weight_bytes, "achieved_Bps": r.achieved,
        "machine_Bps": benchmark.bandwidth.median, "bound": r.bound, "modelled_tps": r.modelled,
    } for r in benchmark.results]


def _show_table(benchmark: Benchmark) -> None:
    work, results = benchmark.workload, benchmark.results
    rows: list[tuple[str, Callable[[BenchResult], str]]] = [
        ("bits", lambda r: f"{r.bits:.3g}" if r.bits else "full"),
        ("load, s", lambda r: f"{r.footprint.load_seconds:.2f}"),
        ("prefill, tokens/s", lambda r: with_range(r.prefill)),
        ("first token, ms", lambda r: with_range(r.first_token, 1000)),
        ("decode, tokens/s", lambda r: with_range(r.decode)),
        ("decode by the time model, tokens/s", lambda r: "none" if r.modelled is None else f"{r.modelled:,.0f}"),
        ("peak memory, MB", lambda r: megabytes(r.footprint.peak_bytes)),
        ("GPU memory, MB", lambda r: megabytes(r.footprint.cuda_bytes)),
        ("weights per step, MB", lambda r: megabytes(r.weight_bytes)),
        ("read, GB/s", lambda r: f"{r.achieved / 1e9:.2f}"),
        ("share of the read bandwidth, %", lambda r: f"{100 * r.achieved / benchmark.bandwidth.median:.0f}"),
        ("linears / attention / head / rest, %", lambda r: " / ".join(f"{100 * share:.0f}" for share in r.shares)),
    ]
    if all(result.footprint.cuda_bytes is None for result in results):
        rows = [row for row in rows if row[0] not in ("GPU memory, MB", "decode by the time model, tokens/s")]
    columns = ["", *benchmark.names]
    cells = [[name, *(cell(result) for result in results)] for name, cell in rows]
    first = results[0]
    title = (f"prompt {work.prompt}, {work.tokens} new tokens, batch {work.batch}, {first.dtype} {first.precision}: "
             f"medians of {work.repeats}, ± half of their range")
    _print(title, columns, cells)
    console.print_line()
    if benchmark.points:
        _print(f"prompt {work.prompt} and {work.tokens} new tokens after each depth",
               *sweep_cells(benchmark))
        console.print_line()
    for name, result in zip(benchmark.names, results, strict=True):
        console.print_line(f"{name} is limited by {result.bound}.")
        if result.unfused is not None:
            console.print_line(f"Decode steps of {name} are not fused, which makes them slower: {result.unfused}.")
    console.print_line(f"Read bandwidth of the memory: {benchmark.bandwidth.median / 1e9:.1f} GB/s. Peak memory is "
                       "relative to the process before loading.")
    console.print_line(f"Machine: {machine_summary()}")


def sweep_cells(benchmark: Benchmark) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the speeds: one row per batch and depth, two columns per model."""
    names = benchmark.names
    paths = [result.path for result in benchmark.results]
    found = {(point.path, point.batch, point.depth): point for point in benchmark.points}
    settings = dict.fromkeys((point.batch, point.depth) for point in benchmark.points)
    columns = ["batch", "depth", *(f"{name} {what}" for name in names for what in ("prefill", "decode"))]
    rows = []
    for batch, depth in settings:
        speeds = [speed for path in paths for speed in (found[path, batch, depth].prefill,
                                                        found[path, batch, depth].decode)]
        rows.append([str(batch), f"{depth:,}", *map(with_range, speeds)])
    return columns, rows


def _print(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    if console.out().is_terminal:
        console.print_table(title, columns, cells)
    else:
        console.print_line(f"{title}\n")
        console.print_line(markdown_table(columns, cells))


def with_range(values: Spread, factor: float = 1.0) -> str:
    """A median and half of the range in percent of it, as text."""
    middle = factor * values.median
    half = 50 * (values.high - values.low) / values.median
    return f"{middle:,.{0 if middle >= 1000 else 1}f} ±{half:.0f} %"


def megabytes(size: int | None) -> str:
    """Bytes as text in MB."""
    return "unknown" if size is None else f"{size / MB:,.1f}"


def _spread(name: str, values: Spread) -> dict[str, float]:
    return {name: values.median, f"{name}_low": values.low, f"{name}_high": values.high}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
