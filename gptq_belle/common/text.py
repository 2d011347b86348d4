"""Numbers in sentences, names of models, Markdown tables, and texts that cannot be encoded."""

from collections.abc import Sequence
from pathlib import Path


def count(number: int, noun: str) -> str:
    """A number of things in English, with thousands separators: "1 window", "2,000 windows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, which lone surrogates cannot; JSON can express them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of models for tables: their folders' names if these are unique, else their paths."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))
