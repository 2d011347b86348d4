"""The command `inspect`."""

from typing import Annotated

import typer

from gptq_belle.cli import console, options


def inspect(path: options.ModelPath,
            prompt: Annotated[bool, typer.Option("--prompt", help="Show the prompt format instead.")] = False,
            device: options.UnusedDevice = "auto",
            as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Show a model directory's bits, groups, sizes and prompt style; exit code 4 if it has problems."""
    from gptq_belle.checkpoint import inspection, prompt_format

    path = options.local(path)
    if prompt:
        shown = prompt_format.read_prompt_format(path)
        if as_json:
            console.print_json(shown)
        else:
            console.print_table(str(path), ["", ""], prompt_format.summary_rows(shown), text=2)
        return
    found = inspection.inspect(path)
    if as_json:
        console.print_json(found)
    else:
        console.print_table(str(path), ["", ""], inspection.summary_rows(found), text=2)
        for problem in found.problems:
            console.print_line(f"Problem: {problem}", style="bold red")
    if found.problems:
        raise typer.Exit(4)
