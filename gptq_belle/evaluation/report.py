"""A report's page (one HTML file in English and Chinese with its charts inside) and its section in the model card."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gptq_belle import __version__
from gptq_belle.checkpoint.model_card import with_results
from gptq_belle.common.text import markdown_table
from gptq_belle.evaluation import report_charts as charts
from gptq_belle.evaluation.kl_statistics import Divergence, format_divergence
from gptq_belle.evaluation.report_models import (
    DASH,
    ReportModel,
    quantization_settings,
    read_models,
    shown_path,
    unknown_tables,
)
from gptq_belle.evaluation.report_plots import draw
from gptq_belle.evaluation.report_results import EvaluationOptions, ModelResults
from gptq_belle.evaluation.report_words import CLASSES_ZH, COLUMNS, METRICS, SETTINGS

PAGE, CARD, TEMPLATE = "report.html", "README.md", "report.html.j2"
CARD_PICTURES = ("classes", "kl", "errors-0", "size")  # the card shows the first of them that exists
CARD_COLUMNS = {"label": "model", "bits": "bits", "size": "MB", "memory": "peak memory, MB", "perplexity": "perplexity",
                "kl": "KL to full precision", "same_top": "same top token, %", "exact": "exact match, %",
                "agreement": "tokens as full precision, %"}
NUMBER_FORMATS = {"error": ".2e", "seconds": ".2f", "damp": "g"}


def write_report(results: Mapping[Path, ModelResults], folder: Path, options: EvaluationOptions, base: Path | None, *,
                 card: Path | None = None) -> dict[str, Path]:
    """Write a report.

    Args:
        results: from `ReportEvaluator.run`.
        options: data and settings of the evaluations.
        base: the full-precision model among the results.
        card: model directory that contains the folder and whose model card shows a table and a picture.
    Returns:
        The pictures by name.
    Raises:
        InputError: a model directory has problems.
    """
    models = read_models(results, base)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("errors-*.png"):  # of an earlier report on more models
        old.unlink()
    pictures = draw(models, folder)
    (folder / PAGE).write_text(render_page(models, options, base), encoding="utf-8")
    if card and (card / CARD).is_file():
        text = (card / CARD).read_text(encoding="utf-8")
        (card / CARD).write_text(with_results(text, card_section(models, pictures, card)), encoding="utf-8")
    return pictures


def card_section(models: Sequence[ReportModel], pictures: Mapping[str, Path], card: Path) -> str:
    """The section of a model card: a table of the available results, and a picture."""
    rows = [summary(model, None) for model in models]
    names = [name for name in CARD_COLUMNS if any(row[name] != DASH for row in rows)]
    table = markdown_table([CARD_COLUMNS[name] for name in names],
                           [[row[name].replace("|", r"\|") for name in names] for row in rows])
    lines = ["## Quality", "", table, ""]
    picture = next((pictures[name] for name in CARD_PICTURES if name in pictures), None)
    if picture is not None:
        lines += [f"![{picture.stem}]({picture.relative_to(card).as_posix()})", ""]
    return "\n".join([*lines, f"More in [{PAGE}](report/{PAGE}); made by `gptq-belle report`."])


def render_page(models: Sequence[ReportModel], options: EvaluationOptions, base: Path | None) -> str:
    """The HTML text of the page.

    Args:
        models: from `read_models`.
        base: the full-precision model, if there is one.
    """
    environment = Environment(loader=PackageLoader("gptq_belle.evaluation"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    full = next((model.inspection.bytes for model in models if model.full), None)
    recorded = [model for model in models if model.linears]
    return environment.get_template(TEMPLATE).render(
        dash=DASH, models=models, summary=[summary(model, full) for model in models],
        maps=[(model, charts.error_map(model, models), record_table(model.linears)) for model in recorded],
        distribution=charts.kl_distribution(models), scores=charts.class_chart(models, charts.score),
        agreement=charts.class_chart([model for model in models if not model.full], charts.agreement),
        sizes=charts.size_chart(models), memory=charts.memory_chart(models),
        divergence=divergence_table(models), classes=class_tables(models), metrics=METRICS, classes_zh=CLASSES_ZH,
        settings=_joined({model.label: quantization_settings(model) for model in models if model.record}),
        setting_names=SETTINGS, column_names=COLUMNS,
        extras=[(model, name, record_table(rows)) for model in models for name, rows in unknown_tables(model).items()],
        command=_command(models, base), options=options, version=__version__, shown=shown_path,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))


def summary(model: ReportModel, full_bytes: int | None) -> dict[str, str]:
    """Size and main results of a model as texts; `full_bytes` is the size of the full-precision model."""
    text, test = model.results.text or {}, model.results.test or {}
    divergence, perplexity = text.get("divergence") or {}, text.get("perplexity") or {}
    total, size = test.get("total") or {}, model.inspection.bytes
    peak = (model.results.footprint or {}).get("peak_bytes")
    return {
        "label": model.label, "bits": model.bits, "size": f"{size / 1e6:,.1f}",
        "share": f"{100 * size / full_bytes:.0f} %" if full_bytes else DASH,
        "memory": f"{peak / 1e6:,.1f}" if peak else DASH,
        "error": f"{model.record['mean_error']:.2e}" if "mean_error" in model.record else DASH,
        "perplexity": _with_error(perplexity, "perplexity", "standard_error", 4),
        "per_byte": _number(perplexity, "per_byte", 4), "kl": _with_error(divergence, "kl_mean", "kl_error", 6),
        "same_top": _with_error(divergence, "same_top", "same_top_error", 2, 100),
        **{name: _number(total, name, digits) for name, (_, _, digits) in METRICS.items()},
        "exact": _number(test, "exact", 1),  # over the classes with one right answer
    }


def divergence_table(models: Sequence[ReportModel]) -> dict[str, Any] | None:
    """The statistics of llama-perplexity, one column per model; None without a base."""
    known = {field.name for field in fields(Divergence)}
    found = {model.label: dict(format_divergence(Divergence(**one))) for model in models
             if set(one := (model.results.text or {}).get("divergence") or {}) == known}
    return _joined(found) if found else None


def class_tables(models: Sequence[ReportModel]) -> list[tuple[str, dict[str, Any]]]:
    """(metric, table of classes and models) for every metric that was measured."""
    tables = []
    for metric, (_, _, digits) in METRICS.items():
        table = _joined({model.label: {name: _number(one, metric, digits) for name, one in
                                       [*test["figures"].items(), ("*", test["total"])]}
                         for model in models if (test := model.results.test)})
        if any(cell != DASH for _, cells in table["rows"] for cell in cells):
            tables.append((metric, table))
    return tables


def record_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table in the record as texts, and which columns are numbers; unknown keys become columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(name, row.get(name)) for name in names] for row in rows]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    return {"columns": names, "numeric": numeric, "rows": cells}


def _text(name: str, value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text('error', part)}" for key, part in value.items())
    return format(value, NUMBER_FORMATS.get(name, ".4g")) if isinstance(value, float) else str(value)


def _joined(columns: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A table of columns, with a row for every name that is in one of them."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    return {"columns": list(columns),
            "rows": [(name, [column.get(name, DASH) for column in columns.values()]) for name in names]}


def _number(found: Mapping[str, Any], name: str, digits: int, factor: float = 1.0) -> str:
    value = found.get(name)
    return DASH if value is None else f"{factor * value:.{digits}f}"


def _with_error(found: Mapping[str, Any], name: str, error: str, digits: int, factor: float = 1.0) -> str:
    value = _number(found, name, digits, factor)
    return value if value == DASH else f"{value} ± {_number(found, error, digits, factor)}"


def _command(models: Sequence[ReportModel], base: Path | None) -> str:
    """The command line of this report, without the options of the evaluations."""
    return shlex.join(["gptq-belle", "report", *(shown_path(model.path) for model in models if not model.full),
                       "--base", shown_path(base) if base else "MODEL"])
