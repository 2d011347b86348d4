"""Colours and fonts of pictures."""

from functools import cache
from typing import Any

# Paul Tol's "bright" palette for colour-blind readers
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "SimHei",
           "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback")


@cache
def chinese_fonts() -> list[str]:
    """The first installed font with Chinese characters, for names of folders and classes."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in CHINESE if name in installed][:1]


def font_settings() -> dict[Any, list[str]]:
    """matplotlib's settings for text that `drawable` returns."""
    return {"font.family": [*chinese_fonts(), "DejaVu Sans"]}


def drawable(text: str) -> str:
    """A name for a picture; without a font for Chinese characters, they are replaced by question marks."""
    shown = text if chinese_fonts() else text.encode("ascii", "replace").decode()
    return shown.replace("$", r"\$")
