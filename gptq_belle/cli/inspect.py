"""The command `inspect`."""

from typing import Annotated

import typer

from gptq_belle.cli import console
from gptq_belle.cli.options import ModelPath


def inspect(path: ModelPath,
            prompt: Annotated[bool, typer.Option("--prompt", help="Show the prompt format instead.")] = False,
            device: Annotated[str, typer.Option(hidden=True)] = "auto",  # accepted by every command
            as_json: console.Json = False, verbose: console.Verbose = False) -> None:
    """Show a model directory's bits, groups, sizes and prompt style; exit code 4 if it has problems."""
    from gptq_belle.checkpoint import inspection, tokenizer_files

    if prompt:
        shown = tokenizer_files.prompt_of(path)
        if as_json:
            console.print_json(shown)
        else:
            console.print_table(str(path), ["", ""], tokenizer_files.lines(shown), text=2)
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
