"""The verb `report`."""

from pathlib import Path
from typing import Annotated

import typer

from gptq_belle.cli import console
from gptq_belle.cli.evaluate import Limit, Overlap, Window
from gptq_belle.cli.options import Precision, load_model
from gptq_belle.errors import HardwareError

PAGE = "report.html"


def command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Quantized models.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The full-precision model they were made from.",
                                              show_default=False)] = None,
    text: Annotated[Path | None, typer.Option(help="Text for perplexity and KL.", show_default=False)] = None,
    test: Annotated[Path | None, typer.Option(help="JSONL rows with class, question and std_answer.",
                                              show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(
        help="Folder to write; left out, the folder report in the first PATH, whose model card then shows it.",
        show_default=False)] = None,
    window: Window = 512,
    limit: Limit = None,
    per_class: Annotated[int | None, typer.Option(help="Use only the first N questions of each class.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 160,
    batch: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 32,
    allow_overlap: Overlap = False,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Write one HTML page, and its pictures as PNG: errors, divergence, answers, sizes, settings of quantized models.

    What was measured before and still holds is taken from the folder.
    """
    check_matplotlib()
    from gptq_belle.evaluation import report_evaluations
    from gptq_belle.evaluation.report import write

    options = report_evaluations.Options(text, test, window, limit, per_class, max_tokens, batch, device, precision,
                                  allow_overlap)
    tools = report_evaluations.Tools(lambda path: load_model(path, device, precision), console.counting)
    folder = out or paths[0] / "report"
    results = report_evaluations.evaluate(paths, base, options, tools, folder)
    with console.step("drawing"):
        written = write(results, folder, options, base, card=None if out else paths[0])
    if as_json:
        console.print_json({"page": folder / PAGE, "pictures": written, "models": [
            {"path": path, "text": found.text, "test": found.test, "footprint": found.footprint}
            for path, found in results.items()]})
    else:
        console.say(f"The report is {folder / PAGE}, with {len(written)} pictures beside it.")


def check_matplotlib() -> None:
    """Raises HardwareError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise HardwareError("report needs matplotlib, which is not installed",
                            "Install it with: pip install 'gptq-belle[plot]'") from error
