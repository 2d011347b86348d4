"""Both READMEs contain the same commands and tables, and agree with the program's commands, options and results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from gptq_belle.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
COMMANDS = [line.split(" #")[0] for block in FENCED.findall(ENGLISH) for line in block.splitlines()
            if line.startswith("gptq-belle ")]


def options(command) -> set[str]:
    """Every option name that a command accepts."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its two header rows."""
    rows = re.findall(r"^\|(.*)\|$", text.split(f"## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in rows[2:]]


def answer(*arguments):
    """The JSON output of a command."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_tables_match_the_results():
    result = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout + "Run: python benchmarks/tables.py"


def test_stale_table_is_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    text = tables.filled(ENGLISH)
    stale = re.sub(r"(?m)^\| 4 \| 0\.", "| 4 | 9.", text)
    assert text != stale
    assert tables.filled(stale) == ENGLISH
    with pytest.raises(KeyError):
        tables.filled("<!-- table: nonsense -->\n<!-- end -->")


def test_both_languages_show_the_same_commands():
    english, chinese = ([re.sub(r"#.*", "", block) for block in FENCED.findall(text)] for text in (ENGLISH, CHINESE))
    assert english == chinese


def test_both_languages_have_the_same_sections_and_table_rows():
    assert ENGLISH.count("\n## ") == CHINESE.count("\n## ")
    assert ENGLISH.count("\n|") == CHINESE.count("\n|")
    english, chinese = ([row[1:] for row in table(*place)] for place in ((ENGLISH, "Memory"), (CHINESE, "内存占用")))
    assert english == chinese


@pytest.mark.parametrize("line", COMMANDS)
def test_command_and_its_options_exist(line):
    import shlex

    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    assert {word for word in words if word.startswith("--")} <= options(command)


def test_options_of_the_quantize_section_exist():
    command = typer.main.get_command(app).commands["quantize"]
    section = ENGLISH.split("## Quantize\n")[1].split("\n## ")[0]
    assert set(re.findall(r"--[a-z][a-z-]*", section)) <= options(command)


@pytest.mark.parametrize(("row", "model", "name", "head"), [
    (0, "belle-7b", "BELLE-7B-2M", 8), (1, "llama-7b", "BELLE-LLaMA-7B-2M-enc", 16),
    (2, "llama-13b", "BELLE-LLaMA-13B-2M-enc", 16)])
def test_memory_table_agrees_with_plan_and_models(row, model, name, head):
    cells = [float(cell) for cell in table(ENGLISH, "Memory")[row][1:]]
    plan = answer("plan", model, "--memory", "64GiB", "--context", "2048", "--device", "cpu")["rows"]
    memory = {found["bits"]: found["total_bytes"] / 1e9 for found in plan if found["head_bits"] == head}
    known = next(found for found in answer("models") if found["name"] == name)
    for bits, file, total in zip((4, 8), cells[::2], cells[1::2], strict=True):
        assert file == known[f"gb_{bits}_bit"]
        assert abs(total - memory[bits]) < 0.06


def test_layout_lists_every_folder_of_the_package():
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(.+?)/` \|", text, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in listed)
    assert {f"gptq_belle/{path.name}" for path in (ROOT / "gptq_belle").iterdir()
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("_")} <= listed
