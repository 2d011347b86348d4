"""The command `bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gptq_belle.cli import console, options
from gptq_belle.errors import UsageError


def bench(
    context: typer.Context,
    paths: Annotated[list[Path] | None, typer.Argument(metavar="PATH...", help="Model directories.",
                                                       show_default=False)] = None,
    table: Annotated[Literal["belle"] | None, typer.Option(
        help="Compare the sizes and memory that BELLE published with ours, measured for every PATH.")] = None,
    prompt: Annotated[int | None, typer.Option(
        "-p", "--prompt-tokens", help="Tokens of the prompt. Default: 512, or what the context allows.")] = None,
    tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Number of tokens to generate.")] = 128,
    batch: Annotated[list[int] | None, typer.Option(
        "-b", "--batch", help="Batch size; repeatable. Default: 1.", show_default=False)] = None,
    depth: Annotated[str, typer.Option(
        "-d", "--depth", help="Tokens in the KV cache before the prompt, such as 0,512,1024.")] = "0",
    repeats: Annotated[int, typer.Option("-r", "--repeats", help="Number of repeats; medians are printed.")] = 5,
    output: Annotated[Literal["md", "json", "jsonl", "csv"], typer.Option(
        "-o", "--output", help="Output format.")] = "md",
    plot: Annotated[Path | None, typer.Option(help="Picture of the speeds to write.", show_default=False)] = None,
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    cache: options.Cache = "float16",
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure speed and memory of models side by side, and show what limits the speed."""
    if table is not None:
        _refuse_unused({"--precision": precision, "--head-bits": head_bits, "--batch": batch, "--plot": plot,
                        "--cache": cache if cache != "float16" else None})
        options.note_unused(context, "with --table", "tokens", "depth", "repeats", "output")
        _compare_with_published(paths or [], prompt, device, as_json)
        return
    if not paths:
        raise UsageError("bench needs a model", "Name one or more directories, or --table belle.")
    options.check_engine_options(device, precision, head_bits, cache)
    from gptq_belle.bench import throughput, throughput_plot
    from gptq_belle.bench.workload import Workload
    from gptq_belle.cli import bench_output

    if as_json:
        options.note_unused(context, "with --json", "output")
    if plot is not None:
        throughput_plot.check_plot(plot)
    first, *others = batch or [1]
    workload = Workload(prompt, tokens, first, repeats)
    depths = throughput.parse_depths(depth)
    with console.show_steps() as progress:
        found = throughput.bench([options.local(path) for path in paths], workload, device=device, precision=precision,
                                 head_bits=head_bits, cache=cache, context=ctx_size, batches=others, depths=depths,
                                 progress=progress)
    bench_output.show(found, "json" if as_json else output)
    if plot is not None:
        throughput_plot.plot(found, plot)
        console.note(f"The picture is {plot}.")


def _refuse_unused(values: dict[str, object]) -> None:
    """Raise UsageError for options that --table does not use."""
    for name, value in values.items():
        if value is not None:
            raise UsageError(f"{name} has no effect with --table", f"Omit {name}, or measure without --table.")


def _compare_with_published(paths: list[Path], prompt: int | None, device: str, as_json: bool) -> None:
    """Run `bench --table`."""
    from gptq_belle.bench import belle_table
    from gptq_belle.cli.plan import device_kind

    context = (prompt or 512) + 4
    with console.show_steps() as progress:
        rows = belle_table.belle_table(paths, context, device_kind(device), progress)
    if as_json:
        console.print_json([{"published": row, "ours": ours} for row, ours in rows])
    else:
        title = f"GiB, as BELLE published; ours with {context} tokens of context on a {device_kind(device)}"
        console.print_table(title, *belle_table.cells(rows), text=1)
