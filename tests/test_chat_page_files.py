"""The files of the chat page: complete, from no other host, at most 1 MB, and with the licences of their libraries."""

import re

import pytest

from gptq_belle.serving.chat_page import FOLDER

LARGEST = 1_000_000  # bytes
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
TEXTS = [path for path in FILES if path.suffix in (".html", ".css", ".js")]
# What a file of each kind loads: scripts and styles, url(...), and modules
LOADED = {".html": r'(?:src|href)="(?!data:)(?:static/)?([^"]+)"', ".css": r"url\(([^)]+\.woff2)\)",
          ".js": r'^import (?:[^"]+ from )?"([^"]+)";'}


def test_size():
    assert sum(path.stat().st_size for path in FILES) <= LARGEST


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_everything_that_is_loaded_is_here(path):
    for address in re.findall(LOADED[path.suffix], path.read_text("utf-8"), re.MULTILINE):
        assert (path.parent / address).is_file(), address


def test_every_script_is_loaded():
    loaded = {name.rpartition("/")[2] for path in TEXTS
              for name in re.findall(LOADED[path.suffix], path.read_text("utf-8"), re.MULTILINE)}
    assert {path.name for path in TEXTS} - loaded == {"chat.html"}


@pytest.mark.parametrize("library", ["marked", "DOMPurify", "KaTeX", "highlight.js"])
def test_libraries_have_a_licence_and_a_version(library):
    vendor = FOLDER / "vendor"
    assert (vendor / f"LICENSE-{library}.txt").stat().st_size > 1000
    version = re.search(rf"^\| \[{re.escape(library)}\]\S+ \| ([\d.]+) ", (vendor / "README.md").read_text("utf-8"),
                        re.MULTILINE)[1]
    assert any(version in path.read_text("utf-8") for path in vendor.glob("*.js"))


def test_both_languages_have_the_same_texts():
    words = re.sub(r'"[^"]*"|`[^`]*`', "text", (FOLDER / "words.js").read_text("utf-8"))
    chinese, english = (re.findall(r"(\w+): ", part) for part in words.split("  en: {"))
    assert len(english) > 50
    assert chinese == ["zh", *english]
