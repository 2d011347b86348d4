"""A report's page (one HTML file in English and Chinese with its pictures inside) and its section in the model card."""

import base64
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
from gptq_belle.evaluation.kl_statistics import Divergence, format_divergence
from gptq_belle.evaluation.report_models import ReportModel, quantization_settings, read_models, unknown_tables
from gptq_belle.evaluation.report_plots import draw
from gptq_belle.evaluation.report_results import EvaluationOptions, ModelResults

PAGE, CARD, TEMPLATE = "report.html", "README.md", "report.html.j2"
DASH = "–"
CARD_PICTURES = ("classes", "kl", "errors-0", "size")  # the card shows the first of them that exists
CARD_COLUMNS = {"label": "model", "bits": "bits", "size": "MB", "memory": "peak memory, MB", "perplexity": "perplexity",
                "kl": "KL to full precision", "same_top": "same top token, %", "exact": "exact match, %",
                "agreement": "tokens as full precision, %"}
CLASSES_ZH = {
    "open_qa": "开放问答", "closed_qa": "阅读问答", "extract": "信息抽取", "classification": "分类",
    "summarization": "摘要", "rewrite": "改写", "translation": "翻译", "brainstorming": "头脑风暴", "math": "数学",
    "code": "代码", "generation": "文本生成",
}
METRICS = {  # of ClassMetrics: English, Chinese, digits
    "exact": ("exact match, %", "完全匹配 %", 1), "f1": ("character F1, %", "字符 F1 %", 1),
    "rouge_l": ("ROUGE-L, %", "ROUGE-L %", 1), "nll": ("NLL of the reference, a token", "参考答案每词元负对数似然", 4),
    "agreement": ("tokens as full precision, %", "与全精度相同的词元 %", 1),
    "identical": ("answers as full precision, %", "与全精度相同的回答 %", 1),
}
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
    (folder / PAGE).write_text(render_page(models, pictures, options, base), encoding="utf-8")
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


def render_page(models: Sequence[ReportModel], pictures: Mapping[str, Path], options: EvaluationOptions,
                base: Path | None) -> str:
    """The HTML text of the page.

    Args:
        models: from `read_models`.
        pictures: from `report_plots.draw`; their content is embedded into the page.
        base: the full-precision model, if there is one.
    """
    environment = Environment(loader=PackageLoader("gptq_belle.evaluation"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals |= {"dash": DASH}
    full = next((model.inspection.bytes for model in models if model.full), None)
    return environment.get_template(TEMPLATE).render(
        models=models, summary=[summary(model, full) for model in models],
        pictures={name: _inline(path) for name, path in pictures.items()},
        maps=[(model, f"errors-{number}", record_table(model.linears)) for number, model in enumerate(models)
              if model.linears],
        divergence=divergence_table(models), classes=class_tables(models), metrics=METRICS, classes_zh=CLASSES_ZH,
        settings=_joined({model.label: quantization_settings(model) for model in models if model.record}),
        extras=[(model, name, record_table(rows)) for model in models for name, rows in unknown_tables(model).items()],
        command=_command(models, base), options=options, base=base, version=__version__,
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
    words = ["gptq-belle", "report", *(str(model.path) for model in models if not model.full)]
    return shlex.join(words) + (f" --base {shlex.quote(str(base))}" if base else " --base MODEL")


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
