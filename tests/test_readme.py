"""The READMEs say the same, name only verbs and options that exist, and their tables are those of the records."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


def test_tables_are_fresh():
    result = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout + "Run: python benchmarks/tables.py"


def test_a_stale_table_is_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    text = tables.filled(ENGLISH)
    assert text == ENGLISH
    assert tables.filled(ENGLISH.replace("| 4 bit |", "| 5 bit |")) == ENGLISH
    with pytest.raises(KeyError):
        tables.filled("<!-- table: nonsense -->\n<!-- end -->")


def test_both_languages_show_the_same_commands():
    english, chinese = ([re.sub(r"#.*", "", block) for block in FENCED.findall(text)] for text in (ENGLISH, CHINESE))
    assert english == chinese


def test_both_languages_have_the_same_parts():
    assert ENGLISH.count("\n## ") == CHINESE.count("\n## ")
    assert ENGLISH.count("\n|") == CHINESE.count("\n|")


@pytest.mark.parametrize("line", [line for block in FENCED.findall(ENGLISH) for line in block.splitlines()
                                  if line.startswith("gptq-belle ")])
def test_every_command_is_one_the_program_knows(line):
    import shlex

    import typer.main

    from gptq_belle.cli import app

    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_option_of_the_table_exists():
    import typer.main

    from gptq_belle.cli import app

    command = typer.main.get_command(app).commands["quantize"]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    table = ENGLISH.split("## Quantize a BELLE model")[1].split("\n## ")[0]
    assert set(re.findall(r"--[a-z][a-z-]*", table)) <= known
