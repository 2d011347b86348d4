"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from gptq_belle.cli import console, options
from gptq_belle.errors import HardwareError


def report(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Quantized models.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The full-precision model that they were quantized from.",
                                              show_default=False)] = None,
    text: Annotated[Path | None, typer.Option(help="Text for perplexity and KL divergence.",
                                              show_default=False)] = None,
    test: Annotated[Path | None, typer.Option(help=options.TEST_HELP, show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(
        help="Folder to write. Default: the folder report in the first PATH, whose model card then shows the results.",
        show_default=False)] = None,
    window: options.WindowTokens = 512,
    limit: options.TextLimit = None,
    per_class: options.PerClass = None,
    max_tokens: options.AnswerTokens = 160,
    batch: options.QuestionBatch = 32,
    allow_overlap: options.AllowOverlap = False,
    precision: options.Precision = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write an HTML page with errors, divergence, answers, sizes and settings of quantized models, and its pictures.

    Evaluations that are already in the folder and still valid are not run again.
    """
    check_matplotlib()
    if text is None:
        options.note_unused(context, "without --text", "window", "limit")
    if test is None:
        options.note_unused(context, "without --test", "per_class", "max_tokens", "batch")
    if text is None and test is None:
        options.note_unused(context, "without --text and --test", "base", "allow_overlap", "precision")
    options.check_engine_options(device, precision)
    from gptq_belle.evaluation.report import PAGE, write_report
    from gptq_belle.evaluation.report_results import EvaluationOptions, ReportEvaluator

    how = EvaluationOptions(text, test, window, limit, per_class, max_tokens, batch, device, precision, allow_overlap)
    folder = out or paths[0] / "report"
    results = ReportEvaluator(how, base, lambda path: options.load_model(path, device, precision),
                              console.progress_bar, folder).run(paths)
    with console.show_step("drawing"):
        written = write_report(results, folder, how, base, card=None if out else paths[0])
    if as_json:
        console.print_json({"page": folder / PAGE, "pictures": written, "models": [
            {"path": path, "text": found.text, "test": found.test, "footprint": found.footprint}
            for path, found in results.items()]})
    else:
        console.print_line(f"The report is {folder / PAGE}, with {len(written)} pictures in the same folder.")


def check_matplotlib() -> None:
    """Raise HardwareError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise HardwareError("report needs matplotlib, which is not installed",
                            "Install it with: pip install 'gptq-belle[plot]'") from error
