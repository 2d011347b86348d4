"""The verbs `bench`, `plan`, `tune` and `doctor`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gptq_belle.bench.doctor import gib
from gptq_belle.cli import console
from gptq_belle.cli.options import Cache, HeadBits, ModelPath, Precision, local
from gptq_belle.errors import UsageError


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
    from gptq_belle.bench import plots
    from gptq_belle.bench import throughput as benchmark
    from gptq_belle.cli import bench_output

    bench_output.check_format(output)
    if plot is not None:
        plots.check_plot(plot)
    first, *others = batch or [1]
    workload = benchmark.Workload(prompt, tokens, first, repeats)
    depths = benchmark.parse_depths(depth)
    with console.stepping() as progress:
        found = benchmark.bench([local(path) for path in paths], workload, device=device, precision=precision,
                                head_bits=head_bits, cache=cache, batches=others, depths=depths, progress=progress)
    bench_output.show(found, "json" if as_json else output)
    if plot is not None:
        plots.plot(found, plot)
        console.note(f"The picture is {plot}.")


def _published(table: str, paths: list[Path], prompt: int | None, device: str, as_json: bool) -> None:
    """`bench --table`."""
    if table != "belle":
        raise UsageError(f"table {table!r} is not known", "Choose belle.")
    from gptq_belle.bench import belle_table
    from gptq_belle.cli import plan_output

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
    from gptq_belle.bench.plan import plan as planned
    from gptq_belle.checkpoint.reader import read_config
    from gptq_belle.cli import plan_output
    from gptq_belle.common.memory import parse_bytes

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
    from gptq_belle.bench import model_tuning as tuner

    with console.stepping() as progress:
        found = tuner.tune_model(path, device=device, rows=rows or (), out=out, progress=progress)
    if as_json:
        console.print_json(found)
    else:
        show_tuning(found)


def doctor(device: console.Device = "auto", as_json: console.Json = False, verbose: console.Verbose = False) -> None:
    """Say what this machine can run, which kernel each case takes and why, and test them; exit code 3 if one is wrong.
    """
    from gptq_belle.bench import doctor as examination

    found = examination.examine(device)
    if as_json:
        console.print_json(found)
    else:
        show_doctor(found)
    if examination.failures(found):
        raise typer.Exit(3)


def show_tuning(found: dict[str, Any]) -> None:
    """Print what `tune_model` found."""
    rows = [(str(line["rows"]), f"{line['inputs']} x {line['outputs']}", line["kernel"],
             " ".join(f"{name}={value}" for name, value in (line["config"] or {}).items()),
             f"{1e6 * line['seconds']:.1f}",
             f"{line['rule_seconds'] / line['seconds']:.2f}" if line["rule_seconds"] else "does not run")
            for line in found["entries"]]
    console.print_table("", ["rows", "shape", "kernel", "config", "us", "times the rule's speed"], rows, text=4)
    console.say(f"The table is {found['table']}.")


def show_doctor(found: dict[str, Any]) -> None:
    """Print what `examine` found."""
    size = found["memory"]
    console.print_table("", ["", ""], [
        *((name, value or "not installed") for name, value in found["versions"].items()),
        ("processor", f"{found['cpu']['model']}, cores: {found['cpu']['cores']}, threads: {found['cpu']['threads']}"),
        ("instructions", " ".join(found["cpu"]["features"]) or "unknown"),
        ("memory", f"{gib(size['total'])} in all, {gib(size['available'])} available"),
        *((entry["device"], f"{entry['name']}, {gib(entry['memory'])}, compute capability {entry['capability']}")
          for entry in found["devices"]),
        *([] if found["devices"] else [("GPU", "no CUDA device, or a torch without CUDA")]),
        ("CPU kernels", native_line(found["native"])),
        ("GPU kernels", gpu_line(found["gpu"])),
        ("C compiler", found["compiler"] or "none: Triton could not build its launcher"),
    ], text=2)
    console.say()
    columns = ["device", "checkpoint", "--precision", "kernel", "why"]
    rows = [(row["device"], row["case"], row["precision"], row["kernel"], row["why"]) for row in found["kernels"]]
    console.print_table("Which kernel runs a quantized linear", columns, rows, text=5)
    console.say()
    for line in test_lines(found["self_test"]):
        console.say(line)


def test_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    """The self-test in a line, and a further one for each check that was not passed."""
    bad = [check for check in checks if not check["passed"]]
    kernels = ", ".join(dict.fromkeys(check["kernel"] for check in checks))
    taken = sum(check["seconds"] for check in checks)
    wrong = [f"WRONG: {check['kernel']}, {check['case']}: "
             + (check["why_not"] or f"off by {check['error']:.1e} of the result, {check['allowed']:.0e} is allowed")
             for check in bad]
    return [f"Self-test: {len(checks) - len(bad)} of {len(checks)} checks against float64 passed in {taken:.1f} s: "
            f"{kernels}", *wrong]


def native_line(found: dict[str, Any]) -> str:
    """`native` in one line."""
    others = ", ".join(name for name in found["usable"] if name != found["isa"])
    return found["why_not"] or f"{found['isa']} (GPTQ_BELLE_CPU_ISA chooses another: {others})"


def gpu_line(found: dict[str, Any]) -> str:
    """`gpu` in one line."""
    if found["why_not"] is None:
        tuned = found["tables"]
        return f"triton; tiles {f'as measured in {tuned[-1]}' if tuned else 'by rule (see gptq-belle tune)'}"
    instead = "" if found["kernel"] is None else "; weights are expanded for cuBLAS instead"
    return f"not Triton's: {found['why_not']}{instead}"
