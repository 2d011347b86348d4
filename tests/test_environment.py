"""What the command line inherits: widths, closed streams, encodings, busy ports; options are checked before work."""

import errno
import json
import os
import re
import resource
import socket
import subprocess
import sys

import pytest

from gptq_belle.cli import console, environment
from gptq_belle.cli.progress import ConsoleProgress
from gptq_belle.cli.quantize import resumable
from gptq_belle.common.memory import parse_memory
from gptq_belle.common.text import count
from gptq_belle.errors import HardwareError, InputError, UsageError, as_user_error
from gptq_belle.serving.server_config import ListenConfig

PROGRAM = [sys.executable, "-m", "gptq_belle.cli"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*args, stdin=None, shell="", env=None):
    """Run the command line in a new process, with redirections of a shell: (exit code, stdout, stderr)."""
    words = ["sh", "-c", f'exec "$@" {shell}', "sh", *PROGRAM, *args]
    done = subprocess.run(words, input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL,
                          capture_output=True, env=os.environ | (env or {}), timeout=120)
    assert b"Traceback" not in done.stderr
    assert b"unexpected" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("width", ["0", "-1", "1", "text", "²", "99999999999999"])
def test_unusable_widths_are_ignored(monkeypatch, width):
    for name in environment.SMALLEST_SIZE:
        monkeypatch.setenv(name, width if name != "LINES" or width != "1" else "0")
    environment.ignore_invalid_widths()
    assert not set(environment.SMALLEST_SIZE) & set(os.environ)


def test_usable_widths_are_kept(monkeypatch):
    for name, value in (("COLUMNS", "80"), ("LINES", "24"), ("TERMINAL_WIDTH", "132")):
        monkeypatch.setenv(name, value)
    environment.ignore_invalid_widths()
    assert [os.environ[name] for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH")] == ["80", "24", "132"]


def test_results_help_and_errors_are_printed_with_0_columns(tmp_path):
    env = {"COLUMNS": "0", "TERMINAL_WIDTH": "no"}
    for words, shown in (("models", b"BELLE"), ("--help", b"quantize")):
        code, out, _ = run(words, env=env)
        assert code == 0
        assert shown in out
    code, _, err = run("inspect", str(tmp_path / "none"), env=env)
    assert code == 4
    assert b"none" in err


def test_closed_stdout_is_refused_unless_results_are_files(tmp_path):
    code, _, err = run("models", shell=">&-")
    assert code == 2
    assert b"stdout" in err
    assert run("models", shell="2>&-")[0] == 0
    code, _, err = run("convert", str(tmp_path / "none"), str(tmp_path / "out"), shell=">&-")
    assert code == 4


def test_closed_stdin_of_chat_is_refused_first(tmp_path):
    code, _, err = run("chat", str(tmp_path / "none"), shell="<&-")
    assert code == 2
    assert b"stdin" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_stdout_on_a_full_disk_is_an_error():
    assert run("models", shell=">/dev/full")[0] == 3


def test_arguments_that_are_not_utf8_are_refused(tmp_path):
    code, _, err = run("generate", str(tmp_path), "--prompt", "你好".encode("gbk"))
    assert code == 2
    assert b"UTF-8" in err


def test_utf8_arguments_are_understood_in_an_ascii_locale(tmp_path):
    code, _, err = run("inspect", str(tmp_path / "模型"), env=ASCII)
    assert code == 4
    assert "模型" in err.decode("utf-8")


def test_answer_in_an_ascii_locale_is_that_of_any_other(belle, tiny_llama):
    words = ("generate", str(tiny_llama), "--prompt", "北京是", "--max-tokens", "24", "--seed", "1", "--device", "cpu",
             "--threads", "1")
    _, expected, _ = belle(*words)
    assert not expected.isascii()
    code, out, _ = run(*words, env=ASCII)
    assert (code, out.decode("utf-8")) == (0, expected)


@pytest.mark.parametrize(("number", "code", "kind"), [
    (errno.EFBIG, 3, HardwareError), (errno.EIO, 3, HardwareError), (errno.ESTALE, 3, HardwareError),
    (errno.ELOOP, 4, InputError), (errno.ENAMETOOLONG, 4, InputError), (errno.ENOTEMPTY, 4, InputError)])
def test_errors_of_the_file_system_name_the_file(number, code, kind):
    found = as_user_error(OSError(number, os.strerror(number), "/some/file"))
    assert (type(found), found.exit_code) == (kind, code)
    assert "/some/file" in found.cause
    assert found.remedy


def test_file_size_limit_is_an_error_of_the_environment(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    code = ("import pathlib, sys; from gptq_belle.cli import console; "
            "console.run(lambda: pathlib.Path(sys.argv[1]).write_bytes(b'0' * 99))")
    done = subprocess.run([sys.executable, "-B", "-c", code, str(tmp_path / "file")], preexec_fn=limit,
                          capture_output=True, text=True)
    assert done.returncode == 3
    assert "ulimit -f" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_busy_port_is_refused_before_a_model_is_looked_for(belle, tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, _, err = belle("serve", tmp_path / "none", "--host", host, "--port", port)
    assert code == 3
    assert str(port) in err
    assert "none" not in err


def test_host_that_does_not_exist_is_refused():
    with pytest.raises(HardwareError):
        ListenConfig("no-such-host.invalid", 0).check_port()


def test_sockets_of_a_host_share_their_port():
    sockets = ListenConfig("localhost", 0).open()
    assert len({one.getsockname()[1] for one in sockets}) == 1
    for one in sockets:
        one.close()


OPTIONS = [("--device", "tpu"), ("--precision", "half"), ("--head-bits", "5")]
SAMPLING = [("--temperature", "-1"), ("--top-p", "2"), ("--top-k", "-3"), ("--repetition-penalty", "0"),
            ("--seed", "-1"), ("--cache", "float8"), ("--prompt-style", "alpaca")]


@pytest.mark.parametrize(("command", "wrong"), [
    *((command, wrong) for command in ("generate", "chat") for wrong in OPTIONS + SAMPLING),
    *(("serve", wrong) for wrong in [*OPTIONS, *SAMPLING[-2:]]),
    *((command, wrong) for command in ("eval ppl", "eval kl") for wrong in [*OPTIONS, ("--window", "1"),
                                                                            ("--stride", "0"), ("--limit", "-5")]),
    *(("eval belle", wrong) for wrong in [*OPTIONS, SAMPLING[-1]]),
    *(("bench", wrong) for wrong in [*OPTIONS, ("--cache", "float8")]),
    *(("quantize", wrong) for wrong in [OPTIONS[0], SAMPLING[-1], ("--memory", "8"), ("--bits", "5")]),
    *(("convert", wrong) for wrong in [SAMPLING[-1], ("--format", "zip")]),
    *(("report", wrong) for wrong in OPTIONS[:2]),
    *(("plan", wrong) for wrong in [("--cache", "float8"), ("--batch", "0"), ("--context", "0"),
                                    ("--group-size", "0")]),
])
def test_wrong_options_are_refused_before_a_model_is_looked_for(belle, tmp_path, command, wrong):
    needed = {"generate": ("--prompt", "x"), "eval ppl": ("--text", "none"), "eval belle": ("--test", "none"),
              "eval kl": ("--text", "none", "--base", "none"), "plan": ("--memory", "8GB"),
              "quantize": (tmp_path / "out",), "convert": (tmp_path / "out",)}.get(command, ())
    code, _, err = belle(*command.split(), "no-such-folder/with/a-model", *needed, *wrong)
    assert code == 2
    assert "no-such-folder" not in err
    assert re.search(wrong[0].strip("-").replace("-", "."), err)  # the option, or the parameter of its name


def test_head_bits_without_effect_are_refused(belle, tmp_path):
    code, _, err = belle("quantize", "none", tmp_path / "out", "--head-bits", "4")
    assert code == 2
    assert "--packed-head-only" in err


def test_options_that_a_table_does_not_use_are_refused(belle):
    code, _, err = belle("bench", "--table", "belle", "--head-bits", "8")
    assert code == 2
    assert "--head-bits" in err


@pytest.mark.parametrize("text", ["8", "16", "0", "1023KB", "8B"])
def test_memory_without_a_unit_is_refused(belle, text):
    with pytest.raises(UsageError):
        parse_memory(text)
    assert belle("plan", "belle-7b", "--memory", text)[0] == 2


def test_memory_in_bytes_is_accepted():
    assert parse_memory(str(8 << 30)) == 8 << 30


def test_eval_ppl_takes_head_bits_and_counts_one_window(belle, tiny_bloom, tmp_path):
    (tmp_path / "text").write_text("北京是中国的首都。" * 5, encoding="utf-8")
    args = ("eval", "ppl", tiny_bloom, "--text", tmp_path / "text", "--limit", 40, "--device", "cpu")
    exact, packed = (json.loads(belle(*args, "--head-bits", bits, "--json")[1])["perplexity"] for bits in (16, 8))
    assert 0 < abs(exact / packed - 1) < 0.01
    assert "1 windows" not in belle(*args)[1]


def test_counts_are_english():
    assert [count(n, "window") for n in (0, 1, 2, 1000)] == ["0 windows", "1 window", "2 windows", "1,000 windows"]


@pytest.mark.parametrize("started", [False, True])
def test_command_that_resumes_is_named_only_for_blocks_of_this_job(tmp_path, capsys, monkeypatch, started):
    monkeypatch.setattr(sys, "argv", ["gptq-belle", "quantize", "--this-job"])
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    (tmp_path / "out.partial" / "journal" / "block-00000.json").write_text("{}")
    progress = ConsoleProgress(console.err())
    progress.blocks = 3 if started else 0
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path / "out", progress):
        raise KeyboardInterrupt
    printed = capsys.readouterr().err
    assert "1 finished block " in printed
    assert ("--this-job" in printed) == started


def test_completion_is_offered():
    no_detection = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code, out, _ = run("--show-completion", "bash", env=no_detection)
    assert code == 0
    assert b"COMP_WORDS" in out


@pytest.mark.parametrize("words", [
    ("generate", "--prompt", "x"), ("chat",), ("serve",), ("inspect",), ("quantize", "out"), ("convert", "out"),
    ("bench",), ("eval ppl", "--text", "x"), ("plan", "--memory", "8GiB"), ("doctor",), ("models",)])
def test_something_is_shown_before_torch_is_imported(tmp_path, words):
    (tmp_path / "torch.py").write_text("import os; os.write(2, b'[torch]'); os._exit(7)")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command, *rest = words
    model = [] if command in ("doctor", "models") else [str(tmp_path)]
    code, _, err = run(*command.split(), *model, *rest, env={"PYTHONPATH": path})
    assert code == 7
    assert err.partition(b"[torch]")[0].strip()
