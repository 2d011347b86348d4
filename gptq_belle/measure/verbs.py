"""The verbs `bench`, `plan`, `tune` and `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from gptq_belle import console
from gptq_belle.errors import UsageError
from gptq_belle.options import Cache, HeadBits, ModelPath, Precision, local


def bench(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="PATH...", help="Model directories.",
                                                       show_default=False)] = None,
    table: Annotated[str | None, typer.Option(
        help="belle: BELLE's published sizes and memory, ours beside them, measured where a PATH is given.")] = None,
    prompt: Annotated[int | None, typer.Option(
        "-p", "--prompt-tokens", help="Tokens of the prompt; left out, 512, or what the context leaves.")] = None,
    tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Tokens to generate.")] = 128,
    batch: Annotated[list[int] | None, typer.Option(
        "-b", "--batch", help="Prompts at a time; repeatable. Left out, 1.", show_default=False)] = None,
    depth: Annotated[str, typer.Option(
        "-d", "--depth", help="Tokens in the cache before prompt and answer, such as 0,512,1024.")] = "0",
    repeats: Annotated[int, typer.Option("-r", "--repeats", help="Repeats; medians are printed.")] = 5,
    output: Annotated[str, typer.Option("-o", "--output", help="md, json, jsonl or csv.")] = "md",
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds into a picture.", show_default=False)] = None,
    precision: Precision = None,
    head_bits: HeadBits = None,
    cache: Cache = "float16",
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Measure speed and memory of models side by side, and say what bounds them."""
    if table is not None:
        _published(table, paths or [], prompt, device, as_json)
        return
    if not paths:
        raise UsageError("bench needs a model", "Name one or more directories, or --table belle.")
    from gptq_belle.measure import bench as benchmark
    from gptq_belle.measure import bench_output, bench_plot

    bench_output.check_format(output)
    if plot is not None:
        bench_plot.check_plot(plot)
    first, *others = batch or [1]
    workload = benchmark.Workload(prompt, tokens, first, repeats)
    depths = benchmark.parse_depths(depth)
    with console.stepping() as progress:
        found = benchmark.bench([local(path) for path in paths], workload, device=device, precision=precision,
                                head_bits=head_bits, cache=cache, batches=others, depths=depths, progress=progress)
    bench_output.show(found, "json" if as_json else output)
    if plot is not None:
        bench_plot.plot(found, plot)
        console.note(f"The picture is {plot}.")


def _published(table: str, paths: list[Path], prompt: int | None, device: str, as_json: bool) -> None:
    """`bench --table`."""
    if table != "belle":
        raise UsageError(f"table {table!r} is not known", "Choose belle.")
    from gptq_belle.measure import belle_table, plan_output

    context = (prompt or 512) + 4
    with console.stepping() as progress:
        rows = belle_table.belle_table(paths, context, plan_output.device_kind(device), progress)
    if as_json:
        console.print_json([{"published": row, "ours": ours} for row, ours in rows])
    else:
        title = f"GiB, as BELLE published; ours with {context} tokens of context on a {plan_output.device_kind(device)}"
        console.print_table(title, *belle_table.cells(rows), text=1)


def plan(
    model: Annotated[Path, typer.Argument(
        metavar="MODEL", help="Model directory, a config.json, a name of `models`, or belle-7b, llama-7b, llama-13b.")],
    memory: Annotated[str, typer.Option(help="What may be taken, such as 8GiB.")],
    context: Annotated[int | None, typer.Option(
        help="Tokens of prompt and answer together; left out, as many as the model takes.", show_default=False)] = None,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Sequences at a time.")] = 1,
    cache: Cache = "float16",
    group_size: Annotated[int, typer.Option("--group-size", "--groupsize", help="Inputs that share a scale.")] = 128,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """From config.json alone: at which bits, head bits and context a model fits into a budget of memory."""
    from gptq_belle.measure import plan_output
    from gptq_belle.measure.memory import parse_bytes
    from gptq_belle.measure.plan import plan as planned
    from gptq_belle.models.shapes import read_config

    kind = plan_output.device_kind(device)
    budget = parse_bytes(memory)
    rows = planned(read_config(model), budget, context=context, batch=batch, cache=cache, group_size=group_size,
                   device=kind)
    found = plan_output.Plan(str(model), budget, context, batch, rows)
    if as_json:
        console.print_json(plan_output.plain(found))
    else:
        plan_output.show(found)


def tune(
    path: ModelPath,
    rows: Annotated[list[int] | None, typer.Option(
        help="Rows of activations (tokens at a time) to tune for, repeatable; left out, 1 to 2048.")] = None,
    out: Annotated[Path | None, typer.Option(
        help="Folder of the table, to be named in GPTQ_BELLE_TUNING; left out, the installed kernels' own.",
        show_default=False)] = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """On a GPU: measure which tiles of the kernels are fastest for a model, and write them down for the next runs."""
    from gptq_belle.measure import tune as tuner

    with console.stepping() as progress:
        found = tuner.tune_model(path, device=device, rows=rows or (), out=out, progress=progress)
    if as_json:
        console.print_json(found)
    else:
        tuner.show(found)


def doctor(device: console.Device = "auto", as_json: console.Json = False, verbose: console.Verbose = False) -> None:
    """Say what this machine can run, which kernel each case takes and why, and test them; exit code 3 if one is wrong.
    """
    from gptq_belle.measure import doctor as examination

    found = examination.examine(device)
    if as_json:
        console.print_json(found)
    else:
        examination.show(found)
    if examination.failures(found):
        raise typer.Exit(3)
