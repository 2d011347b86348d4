"""The root of the command line. Each command's function imports the library only when it runs."""

from typing import Annotated

import typer

from gptq_belle import __version__
from gptq_belle.cli import (
    bench,
    chat,
    convert,
    demo,
    doctor,
    environment,
    evaluate,
    generate,
    inspect,
    models,
    plan,
    quantize,
    report,
    serve,
    tune,
)

app = typer.Typer(name="gptq-belle", no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode="rich")
app.add_typer(evaluate.app, name="eval",
              help="Measure quality: perplexity, KL divergence from the base, answers to test questions.")
for command in (demo.demo, quantize.quantize, report.report, convert.convert, convert.decrypt, inspect.inspect,
                generate.generate, chat.chat, serve.serve, bench.bench, plan.plan, models.models, tune.tune,
                doctor.doctor):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gptq-belle {__version__}")
        raise typer.Exit


@app.callback()
def root(context: typer.Context,
         version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Show the version and exit.")] = False) -> None:
    """Quantize BELLE models to 2, 3, 4 or 8 bits with GPTQ, and run them on a CPU or one GPU."""
    environment.require_stdout(context.invoked_subcommand)
