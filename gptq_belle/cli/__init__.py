"""The command line: one file per command, each forwarding to the library, which is imported only when it runs."""

from typing import Any


def main() -> None:
    """The entry point `gptq-belle`."""
    from gptq_belle.cli import console

    console.run(_commands)


def _commands(*args: Any) -> Any:
    """The typer app; imported here, so that an error of its imports is shown like any other."""
    from gptq_belle.cli import app

    return app.app(*args)
