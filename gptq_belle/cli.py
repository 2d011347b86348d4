"""The command line: one short function a verb, each forwarding to the library, which is imported only when it runs."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gptq_belle import __version__, console, demo, quantize
from gptq_belle.conversion import verbs as conversion
from gptq_belle.evaluation import verbs as evaluation
from gptq_belle.options import (
    ChatStyle,
    MaxTokens,
    ModelPath,
    Penalty,
    Precision,
    Seed,
    Style,
    Temperature,
    TopK,
    TopP,
    load_model,
)

app = typer.Typer(name="gptq-belle", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode="rich")
app.add_typer(evaluation.app, name="eval", help="Measure quality: perplexity, divergence from the base, answers.")
app.command("demo")(demo.command)
app.command("quantize")(quantize.command)
app.command("convert")(conversion.convert)
app.command("decrypt")(conversion.decrypt)

def _version(wanted: bool) -> None:
    if wanted:
        print(f"gptq-belle {__version__}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version and leave.")] = False) -> None:
    """Quantize BELLE models to 2, 3, 4 or 8 bits with GPTQ, and run them on a CPU or one GPU."""


@app.command()
def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Option(help="The question, or text to continue with --prompt-style none.")],
    prompt_style: Style = "auto",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Answer one prompt, streamed to stdout."""
    model = load_model(path, device, precision)
    style = None if prompt_style == "none" else prompt_style
    began, answer = time.perf_counter(), ""
    for piece in model.stream(prompt, prompt_style=style, max_new_tokens=max_tokens, temperature=temperature,
                              top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed):
        answer += piece
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        console.print_json({"model": path, "prompt": prompt, "answer": answer, "seconds": time.perf_counter() - began})
    else:
        print()


@app.command()
def chat(
    path: ModelPath,
    prompt_style: ChatStyle = "auto",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Talk with a model, over several turns. With --json, answers are streamed to stderr and stdout gets all turns."""
    from gptq_belle.runtime import terminal
    from gptq_belle.runtime.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    talk = terminal.Conversation(load_model(path, device, precision), prompt_style, params)
    said = terminal.chat(talk, sys.stderr if as_json else sys.stdout)
    if as_json:
        console.print_json({"model": path, "turns": said})


@app.command()
def inspect(path: ModelPath, device: Annotated[str, typer.Option(hidden=True)] = "auto",  # every verb takes it
            as_json: console.Json = False, verbose: console.Verbose = False) -> None:
    """Say what a model directory is: bits, groups, sizes, prompt style; exit code 4 where it has problems."""
    from gptq_belle.checkpoint import inspect as inspection

    found = inspection.inspect(path)
    if as_json:
        console.print_json(found)
    else:
        console.print_table(str(path), ["", ""], inspection.lines(found), text=2)
        for problem in found.problems:
            console.say(f"Problem: {problem}", style="bold red")
    if found.problems:
        raise typer.Exit(4)


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Model directories.", show_default=False)],
    prompt: Annotated[int | None, typer.Option(
        "-p", "--prompt-tokens", help="Tokens of the prompt; left out, 512, or what the context leaves.")] = None,
    tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Prompts at a time.")] = 1,
    repeats: Annotated[int, typer.Option("-r", "--repeats", help="Repeats; medians are printed.")] = 5,
    output: Annotated[str, typer.Option("-o", "--output", help="md, json, jsonl or csv.")] = "md",
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds into a picture.", show_default=False)] = None,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Measure speed and memory of models side by side, and say what bounds them."""
    from gptq_belle.measure import bench as benchmark
    from gptq_belle.measure import bench_output

    bench_output.check_format(output)
    if plot is not None:
        bench_output.check_plot(plot)
    workload = benchmark.Workload(prompt, tokens, batch, repeats)
    with console.stepping() as progress:
        found = benchmark.bench(paths, workload, device=device, precision=precision, progress=progress)
    bench_output.show(found, "json" if as_json else output)
    if plot is not None:
        bench_output.plot(found, plot)
        console.note(f"The picture is {plot}.")


@app.command()
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


@app.command()
def doctor(device: console.Device = "auto", as_json: console.Json = False, verbose: console.Verbose = False) -> None:
    """Say what this machine can run, and which kernel each case takes and why."""
    from gptq_belle.measure import doctor as examination

    found = examination.examine(device)
    if as_json:
        console.print_json(found)
    else:
        examination.show(found)


def main() -> None:
    """The entry point `gptq-belle`."""
    console.run(app)


if __name__ == "__main__":
    main()
