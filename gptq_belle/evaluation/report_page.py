"""The page of a report: one HTML file with its pictures inside, in English and Chinese, that needs no network."""

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gptq_belle import __version__
from gptq_belle.evaluation.kl_statistics import Divergence, lines
from gptq_belle.evaluation.report_evaluations import Options
from gptq_belle.evaluation.report_models import Variant, extra_tables, settings
from gptq_belle.evaluation.scores import ClassFigures

TEMPLATE = "report.html.j2"
DASH = "–"
CLASSES_ZH = {
    "open_qa": "开放问答", "closed_qa": "阅读问答", "extract": "信息抽取", "classification": "分类",
    "summarization": "摘要", "rewrite": "改写", "translation": "翻译", "brainstorming": "头脑风暴", "math": "数学",
    "code": "代码", "generation": "文本生成",
}
MEASURES = {  # of ClassFigures: English, Chinese, digits
    "exact": ("exact match, %", "完全匹配 %", 1), "f1": ("character F1, %", "字符 F1 %", 1),
    "rouge_l": ("ROUGE-L, %", "ROUGE-L %", 1), "nll": ("NLL of the reference, a token", "参考答案每词元负对数似然", 4),
    "agreement": ("tokens as full precision, %", "与全精度相同的词元 %", 1),
    "identical": ("answers as full precision, %", "与全精度相同的回答 %", 1),
}
UNITS = {"error": ".2e", "seconds": ".2f", "damp": "g"}


def render(variants: Sequence[Variant], pictures: Mapping[str, Path], options: Options, base: Path | None) -> str:
    """The page's text.

    Args:
        variants: see `variants.variants`.
        pictures: of `pictures.draw`; they are read and put into the page.
        options: what was evaluated on.
        base: the full-precision model, where it was given.
    """
    environment = Environment(loader=PackageLoader("gptq_belle.evaluation"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals |= {"dash": DASH}
    return environment.get_template(TEMPLATE).render(
        variants=variants, summary=summary(variants), pictures={name: _inline(path) for name, path in pictures.items()},
        maps=[(variant, f"errors-{number}", linears(variant)) for number, variant in enumerate(variants)
              if variant.linears],
        block=block(variants), classes=classes(variants), measures=MEASURES, classes_zh=CLASSES_ZH,
        settings=_joined({variant.label: settings(variant) for variant in variants if variant.record}),
        extras=[(variant, name, table(rows)) for variant in variants for name, rows in extra_tables(variant).items()],
        command=_command(variants, base), options=options, base=base, version=__version__,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))


def summary(variants: Sequence[Variant]) -> list[dict[str, str]]:
    """A row a model: its size, and the first figure of every evaluation."""
    full = next((variant.inspection.bytes for variant in variants if variant.full), None)
    return [_summary(variant, full) for variant in variants]


def _summary(variant: Variant, full: int | None) -> dict[str, str]:
    text, test = variant.results.text or {}, variant.results.test or {}
    found, figures = text.get("divergence") or {}, text.get("perplexity") or {}
    total, size = test.get("total") or {}, variant.inspection.bytes
    peak = (variant.results.footprint or {}).get("peak_bytes")
    return {
        "label": variant.label, "bits": variant.bits, "size": f"{size / 1e6:,.1f}",
        "share": f"{100 * size / full:.0f} %" if full else DASH, "memory": f"{peak / 1e6:,.1f}" if peak else DASH,
        "error": f"{variant.record['mean_error']:.2e}" if "mean_error" in variant.record else DASH,
        "perplexity": _pair(figures, "perplexity", "standard_error", 4),
        "per_byte": _one(figures, "per_byte", 4), "kl": _pair(found, "kl_mean", "kl_error", 6),
        "same_top": _pair(found, "same_top", "same_top_error", 2, 100),
        "exact": _one(test, "exact", 1), **{name: _one(total, name, MEASURES[name][2]) for name in MEASURES
                                            if name != "exact"},
    }


def block(variants: Sequence[Variant]) -> dict[str, Any] | None:
    """llama-perplexity's block, a column a model."""
    known = {field.name for field in fields(Divergence)}
    found = {variant.label: dict(lines(Divergence(**one))) for variant in variants
             if set(one := (variant.results.text or {}).get("divergence") or {}) == known}
    return _joined(found) if found else None


def classes(variants: Sequence[Variant]) -> list[tuple[str, dict[str, Any]]]:
    """(measure, table of classes and models) for every measure that was found."""
    tested = [variant for variant in variants if variant.results.test]
    made = []
    for measure, (_, _, digits) in MEASURES.items():
        columns = {variant.label: {name: _one(one, measure, digits) for name, one in
                                   [*test["figures"].items(), ("*", test["total"])]}
                   for variant in tested if (test := variant.results.test)}
        joined = _joined(columns)
        if any(cell != DASH for _, cells in joined["rows"] for cell in cells):
            made.append((measure, joined))
    assert set(MEASURES) <= {field.name for field in fields(ClassFigures)}
    return made


def linears(variant: Variant) -> dict[str, Any]:
    """The record's rows as a table; keys that this version does not know become columns."""
    return table(variant.linears)


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of any plain values as text, and whether a column holds numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(name, row.get(name)) for name in names] for row in rows]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    return {"columns": names, "numeric": numeric, "rows": cells}


def _text(name: str, value: Any) -> str:
    if value is None:
        return DASH
    return format(value, UNITS.get(name, ".4g")) if isinstance(value, float) else str(value)


def _joined(columns: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Columns of named values as a table of all names."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    return {"columns": list(columns),
            "rows": [(name, [column.get(name, DASH) for column in columns.values()]) for name in names]}


def _one(found: Mapping[str, Any], name: str, digits: int, factor: float = 1.0) -> str:
    value = found.get(name)
    return DASH if value is None else f"{factor * value:.{digits}f}"


def _pair(found: Mapping[str, Any], name: str, error: str, digits: int, factor: float = 1.0) -> str:
    value = _one(found, name, digits, factor)
    return value if value == DASH else f"{value} ± {_one(found, error, digits, factor)}"


def _command(variants: Sequence[Variant], base: Path | None) -> str:
    """The command that this report came of, as far as the models go."""
    words = ["gptq-belle", "report", *(str(variant.path) for variant in variants if not variant.full)]
    return shlex.join(words) + (f" --base {shlex.quote(str(base))}" if base else " --base MODEL")


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
