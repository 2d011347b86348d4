"""Errors in the terminal: one line of cause, one of remedy, the exit code, and only JSON on stdout with --json."""

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer

from gptq_belle.cli import console, options
from gptq_belle.errors import GateError, GptqBelleError, HardwareError, InputError, UsageError


def raising(error):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command(verbose: options.Verbose = False):
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GptqBelleError("a"), 1),
        (UsageError("a"), 2),
        (HardwareError("a"), 3),
        (InputError("a"), 4),
        (GateError("a"), 5),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 3),
        (torch.OutOfMemoryError("CUDA out of memory"), 3),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 3),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"), 3),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/somewhere"), 3),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere"), 4),
        (ValueError("a bug"), 1),
    ],
)
def test_every_error_has_its_exit_code_and_no_traceback(error, code, capsys):
    with pytest.raises(SystemExit) as left:
        console.run(raising(error), [])
    printed = capsys.readouterr()
    assert left.value.code == code
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert 1 <= len(printed.err.splitlines()) <= 2


def test_traceback_is_printed_with_v_only(capsys):
    with pytest.raises(SystemExit):
        console.run(raising(InputError("the cause", "the remedy")), ["-v"])
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-2:] == ["Error: the cause", "the remedy"]
    with pytest.raises(SystemExit):
        console.run(raising(InputError("the cause", "the remedy")), [])
    assert "Traceback" not in capsys.readouterr().err


def test_brackets_and_long_lines_are_printed_unchanged(capsys):
    cause = "/models/[bold]7b[/bold]/" + "x" * 200
    assert console.report(InputError(cause, "Fetch it\nagain.")) == 4
    assert capsys.readouterr().err.splitlines() == [f"Error: {cause}", "Fetch it again."]


def test_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as left:
        console.run(raising(ValueError()), ["--nonsense"])
    assert left.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_json_is_valid_also_for_nan_paths_and_dataclasses(capsys):
    @dataclass
    class Point:
        x: float
        where: Path

    class Pair(NamedTuple):
        left: int

    console.print_json({"a": float("nan"), "b": [Point(1.5, Path("c"))], "c": Pair(2), "text": "你好"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": None, "b": [{"x": 1.5, "where": "c"}], "c": {"left": 2}, "text": "你好"}
    assert "你好" in printed


def test_plain_tables_align_chinese(capsys):
    console.print_table("Classes", ["name", "exact"], [["翻译", "90.1 %"], ["math", "7.0 %"]])
    assert capsys.readouterr().out.splitlines() == ["Classes", "name   exact", "翻译  90.1 %", "math   7.0 %"]


def test_importing_the_console_does_not_import_torch():
    code = "import sys, gptq_belle.cli.console; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
