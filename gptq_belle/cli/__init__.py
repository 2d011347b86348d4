"""The command line: one file per command, each forwarding to the library, which is imported only when it runs."""


def main() -> None:
    """The entry point `gptq-belle`."""
    from gptq_belle.cli import app, console

    console.run(app.app)
