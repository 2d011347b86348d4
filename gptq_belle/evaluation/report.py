"""A report's files: the page, the pictures, and what the model card shows of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptq_belle.checkpoint.model_card import with_results
from gptq_belle.evaluation import report_page
from gptq_belle.evaluation.report_evaluations import Options, Results
from gptq_belle.evaluation.report_models import Variant, variants
from gptq_belle.evaluation.report_pictures import draw

PAGE, CARD = "report.html", "README.md"
ON_THE_CARD = ("classes", "kl", "errors-0", "size")  # the first of them that there is
COLUMNS = {"label": "model", "bits": "bits", "size": "MB", "memory": "peak memory, MB", "perplexity": "perplexity",
           "kl": "KL to full precision", "same_top": "same top token, %", "exact": "exact match, %",
           "agreement": "tokens as full precision, %"}


def write(results: Mapping[Path, Results], folder: Path, options: Options, base: Path | None, *,
          card: Path | None = None) -> dict[str, Path]:
    """Write a report.

    Args:
        results: of `evaluations.evaluate`.
        folder: where it goes.
        options: what was evaluated on.
        base: the full-precision model among the results.
        card: a model directory that holds the folder and whose card is to show table and picture.
    Returns:
        The pictures by name.
    Raises:
        InputError: a directory that is no sound model.
    """
    shown = variants(results, base)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("errors-*.png"):  # of an earlier report on more models
        old.unlink()
    pictures = draw(shown, folder)
    (folder / PAGE).write_text(report_page.render(shown, pictures, options, base), encoding="utf-8")
    if card and (card / CARD).is_file():
        text = (card / CARD).read_text(encoding="utf-8")
        (card / CARD).write_text(with_results(text, section(shown, pictures, card)), encoding="utf-8")
    return pictures


def section(shown: Sequence[Variant], pictures: Mapping[str, Path], card: Path) -> str:
    """What a card shows: the table of the figures that there are, and a picture."""
    rows = report_page.summary(shown)
    names = [name for name in COLUMNS if any(row[name] != report_page.DASH for row in rows)]
    table = [[COLUMNS[name] for name in names], ["---", *["---:"] * (len(names) - 1)],
             *([row[name].replace("|", r"\|") for name in names] for row in rows)]
    lines = ["## Quality", "", *("| " + " | ".join(row) + " |" for row in table), ""]
    picture = next((pictures[name] for name in ON_THE_CARD if name in pictures), None)
    if picture is not None:
        lines += [f"![{picture.stem}]({picture.relative_to(card).as_posix()})", ""]
    return "\n".join([*lines, f"More in [{PAGE}](report/{PAGE}); made by `gptq-belle report`."])
