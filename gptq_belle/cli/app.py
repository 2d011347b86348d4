"""The command line: one short function a verb, each forwarding to the library, which is imported only when it runs."""

import sys
import time
from typing import Annotated

import typer

from gptq_belle import __version__
from gptq_belle.cli import console, demo, models, quantize, report
from gptq_belle.cli import convert as conversion
from gptq_belle.cli import evaluate as evaluation
from gptq_belle.cli import machine as measure
from gptq_belle.cli import serve as serving
from gptq_belle.cli.options import (
    Cache,
    ChatStyle,
    HeadBits,
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
app.command("report")(report.command)
for verb in (conversion.convert, conversion.decrypt, serving.serve, measure.bench, measure.plan, models.models,
             measure.tune, measure.doctor):
    app.command()(verb)


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
    head_bits: HeadBits = None,
    cache: Cache = "float16",
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Answer one prompt, streamed to stdout."""
    model = load_model(path, device, precision, head_bits, cache)
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
    head_bits: HeadBits = None,
    cache: Cache = "float16",
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Talk with a model, over several turns. With --json, answers are streamed to stderr and stdout gets all turns."""
    from gptq_belle.cli import chat
    from gptq_belle.engine.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    talk = chat.Conversation(load_model(path, device, precision, head_bits, cache), prompt_style, params)
    said = chat.chat(talk, sys.stderr if as_json else sys.stdout)
    if as_json:
        console.print_json({"model": path, "turns": said})


@app.command()
def inspect(path: ModelPath,
            prompt: Annotated[bool, typer.Option("--prompt", help="Show how a question is asked instead.")] = False,
            device: Annotated[str, typer.Option(hidden=True)] = "auto",  # every verb takes it
            as_json: console.Json = False, verbose: console.Verbose = False) -> None:
    """Say what a model directory is: bits, groups, sizes, prompt style; exit code 4 where it has problems."""
    from gptq_belle.checkpoint import inspection
    from gptq_belle.checkpoint import tokenizer_files as prompts

    if prompt:
        asked = prompts.prompt_of(path)
        if as_json:
            console.print_json(asked)
        else:
            console.print_table(str(path), ["", ""], prompts.lines(asked), text=2)
        return
    found = inspection.inspect(path)
    if as_json:
        console.print_json(found)
    else:
        console.print_table(str(path), ["", ""], inspection.lines(found), text=2)
        for problem in found.problems:
            console.say(f"Problem: {problem}", style="bold red")
    if found.problems:
        raise typer.Exit(4)
