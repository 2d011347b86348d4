"""The command `inspect`."""

from typing import Annotated

import typer

from gptq_belle.cli import console, options


def inspect(path: options.ModelPath,
            prompt: Annotated[bool, typer.Option("--prompt", help="Show the prompt format instead.")] = False,
            device: options.UnusedDevice = "auto",
            as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Show a model directory's bits, groups, sizes and prompt style; exit code 4 if it has problems."""
    options.import_engine("checkpoint.inspection")
    from gptq_belle.checkpoint import inspection, prompt_format

    path = options.local(path)
    if prompt:
        shown = prompt_format.read_prompt_format(path)
        console.print_result(shown, as_json, str(path), ["", ""], prompt_format.summary_rows(shown))
        return
    found = inspection.inspect(path)
    console.print_result(found, as_json, str(path), ["", ""], inspection.summary_rows(found))
    for problem in found.problems if not as_json else ():
        console.print_line(f"Problem: {problem}", style="bold red")
    if found.problems:
        raise typer.Exit(4)
