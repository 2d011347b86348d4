"""The command `tune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gptq_belle.cli import console, options


def tune(
    path: options.ModelPath,
    rows: Annotated[list[int] | None, typer.Option(
        help="Number of activation rows (tokens per call) to tune for; repeatable. Default: 1 to 2048.")] = None,
    out: Annotated[Path | None, typer.Option(
        help="Folder of the table, for GPTQ_BELLE_TUNING. Default: the folder of the installed kernels.",
        show_default=False)] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure the fastest tile sizes of the GPU kernels for a model, and store them for later runs."""
    options.import_engine("bench.model_tuning")
    from gptq_belle.bench.model_tuning import tune_model

    with console.show_steps() as progress:
        found = tune_model(options.local(path), device=device, rows=rows or (), out=out, progress=progress)
    if as_json:
        console.print_json(found)
    else:
        show(found)


def show(found: dict[str, Any]) -> None:
    """Print the result of `tune_model`."""
    rows = [(str(entry["rows"]), f"{entry['inputs']} x {entry['outputs']}", entry["kernel"],
             " ".join(f"{name}={value}" for name, value in (entry["config"] or {}).items()),
             f"{1e6 * entry['seconds']:.1f}",
             f"{entry['rule_seconds'] / entry['seconds']:.2f}" if entry["rule_seconds"] else "does not run")
            for entry in found["entries"]]
    console.print_table("", ["rows", "shape", "kernel", "config", "us", "speedup over the rule"], rows, text=4)
    console.print_line(f"The table is {found['table']}.")
