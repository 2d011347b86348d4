"""The command line as a script sees it: exit codes, results alone on stdout, errors in two lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch
from conftest import packed_checkpoint

from gptq_belle import __version__, load
from gptq_belle.cli import console, options, quantize
from gptq_belle.common.devices import PRECISIONS
from gptq_belle.engine.kv_cache import CACHE_DTYPES
from gptq_belle.prompts.styles import STYLES
from gptq_belle.quantization.config import METHODS, PRESETS

COMMANDS = ("demo", "quantize", "convert", "decrypt", "generate", "chat", "serve", "inspect", "eval", "report", "bench",
            "plan", "models", "tune", "doctor")
FILES_ONLY = ("inspect", "models", "convert", "decrypt")  # run on no device
TEXT = "北京是中国的首都,有三千多年的历史。The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    return packed_checkpoint(tiny_llama, tmp_path_factory.mktemp("cli") / "packed", bits=4, group_size=32)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def process(*args, **options):
    """Run the command line in a new process."""
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "gptq_belle.cli", *map(str, args)], capture_output=True, text=True,
                          env=environment, **options)


def test_help_names_every_command_and_imports_no_torch():
    code = "import sys, gptq_belle.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = process("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_convert_and_decrypt(belle, packed, tmp_path):
    (tmp_path / "key").write_bytes(b"key")
    code, out, _ = belle("decrypt", packed, tmp_path / "enc", "--key", tmp_path / "key", "--encrypt", "--json")
    assert code == 0
    plain = {row["name"].split(".")[0]: row["md5"] for row in json.loads(out)}
    code, out, _ = belle("decrypt", tmp_path / "enc", tmp_path / "dec", "--key", tmp_path / "key")
    assert code == 0
    assert plain["model"] in out
    code, out, _ = belle("convert", tmp_path / "dec", tmp_path / "v2", "--format", "gptq_v2", "--json")
    assert code == 0
    assert json.loads(out)["written_format"] == "gptq_v2"
    assert belle("convert", tmp_path / "dec", tmp_path / "v2")[0] == 2  # exists
    code, out, err = belle("convert", tmp_path / "v2", tmp_path / "v1")
    assert code == 0
    assert "was gptq_v2" in out
    assert err.splitlines() == ["converting"]
    (tmp_path / "key").write_bytes(b"yek")
    assert belle("decrypt", tmp_path / "enc", tmp_path / "other", "--key", tmp_path / "key")[0] == 4


def test_version_option(belle):
    assert belle("--version") == (0, f"gptq-belle {__version__}\n", "")


@pytest.mark.parametrize("command", [*COMMANDS, "eval ppl", "eval kl", "eval belle"])
def test_every_command_has_help_and_takes_the_common_options(belle, command):
    code, out, _ = belle(*command.split(), "--help")
    assert code == 0
    if command != "eval":
        assert "--json" in out
        assert "-v" in out
        assert ("--device" in out) == (command not in FILES_ONLY)  # accepted there too, without effect


@pytest.mark.parametrize(
    "args",
    [("nonsense",), ("inspect",), ("generate", "x"), ("bench", "x", "-o", "xml"), ("bench", "x", "-n", "0"),
     ("generate", "x", "--prompt", "a", "--precision", "half"), ("demo", "--model", "gpt"),
     ("doctor", "--device", "tpu"), ("eval", "ppl", "x", "--text", "y", "--gate", "kl<1")],
)
def test_wrong_usage_exits_2(belle, args):
    code, out, err = belle(*args)
    assert (code, out) == (2, "")
    assert err


def test_group_size_that_is_no_number_is_refused_with_the_choices(belle):
    code, _, err = belle("quantize", "MODEL", "OUT", "--group-size", "x")
    assert code == 2
    assert "-1 or auto" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("command", [("inspect",), ("generate", "--prompt", "a"), ("bench",), ("chat",)])
def test_missing_model_exits_4_with_cause_and_remedy(belle, tmp_path, command):
    code, out, err = belle(command[0], tmp_path / "absent", *command[1:])
    assert (code, out) == (4, "")
    assert "Error: " in err
    assert str(tmp_path / "absent") in err
    error, remedy = err.rstrip().splitlines()[-2:]
    assert error.startswith("Error: ")
    assert remedy
    assert "Traceback" not in err


def test_missing_device_exits_3(belle, packed):
    code, _, err = belle("generate", packed, "--prompt", "a", "--device", "cuda:99")
    assert code == 3
    assert "cuda:99" in err


def test_generate_is_reproducible(belle, packed):
    args = ("generate", packed, "--prompt", "一加一等于几?", "--max-tokens", 8, "--seed", 3)
    done = process(*args)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert belle(*args)[:2] == (0, done.stdout)


def test_generate_json_output(belle, packed):
    code, out, _ = belle("generate", packed, "--prompt", "你好", "--max-tokens", 4, "--temperature", 0, "--json")
    _, plain, _ = belle("generate", packed, "--prompt", "你好", "--max-tokens", 4, "--temperature", 0)
    found = json.loads(out)
    assert code == 0
    assert found["prompt"] == "你好"
    assert found["answer"] + "\n" == plain


def choices(option):
    """The allowed values of an option's annotation, without None."""
    value = get_args(option)[0]
    literal = value if get_origin(value) is Literal else get_args(value)[0]
    return set(get_args(literal))


def test_choices_are_those_of_the_library():
    assert choices(options.Precision) == set(PRECISIONS)
    assert choices(options.Cache) == set(CACHE_DTYPES)
    assert choices(quantize.Method) == set(METHODS)
    assert choices(quantize.Preset) == set(PRESETS)
    assert choices(options.ChatStyle) == choices(options.WrittenStyle) == {"auto", *STYLES}
    assert choices(options.PromptStyle) == {"auto", *STYLES, "none"}


def test_context_size_limits_prompt_and_answer(belle, packed):
    args = ("generate", packed, "--prompt", "你好", "--temperature", 0)
    code, _, err = belle(*args, "--ctx-size", 4)
    assert code == 2
    assert "4" in err
    assert belle(*args, "--ctx-size", 10**6)[0] == 2  # more than the model has
    whole, limited = (belle(*args, "--json", *more)[1] for more in ((), ("--ctx-size", 32)))
    assert len(json.loads(limited)["answer"]) < len(json.loads(whole)["answer"])


def test_threads_reach_torch_and_the_kernels(packed):
    code = ("import sys, atexit; atexit.register(lambda: print(sys.modules['torch'].get_num_threads()));"
            "from gptq_belle.cli import main; main()")
    done = subprocess.run([sys.executable, "-c", code, "generate", str(packed), "--prompt", "a", "--max-tokens", "1",
                           "--threads", "3"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3", done.stderr


def test_missing_native_kernels_are_said_once(monkeypatch, capsys):
    console.err.cache_clear()
    monkeypatch.setattr(options, "load_model", lambda *_: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr("gptq_belle.kernels.native_library.load_library", lambda: "no compiler")
    options.load_generator(Path("model"), "cpu", None, None, "float16", None)
    assert capsys.readouterr().err.count("no compiler") == 1


def test_loading_reports_every_block(packed):
    calls = []
    load(packed, device="cpu", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2), (2, 2)]


def test_prompts_of_a_file_are_answered_in_batches(belle, packed, tmp_path):
    rows = [{"prompt": f"问题{number}", "id": number} for number in range(5)]
    lines = [json.dumps(row) for row in rows[:4]] + ["", json.dumps(rows[4]["prompt"]), json.dumps("长" * 3000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    greedy = ("--max-tokens", 5, "--temperature", 0)
    code, out, _ = belle("generate", packed, "--prompts", tmp_path / "rows.jsonl", "--batch", 3, *greedy)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 2  # for the prompt beyond the context
    assert [row.get("id") for row in found] == [0, 1, 2, 3, None, None]
    assert [row["answer"] + "\n" for row in found[:5]] == [
        belle("generate", packed, "--prompt", row["prompt"], *greedy)[1] for row in rows]
    assert found[5]["error"]
    done = process("generate", packed, "--prompts", "-", "--json", *greedy, input="\n".join(lines[:2]))
    assert [row["answer"] for row in json.loads(done.stdout)["answers"]] == [row["answer"] for row in found[:2]]
    done = process("generate", packed, "--prompt", "-", *greedy, input="问题0\n")
    assert done.stdout == found[0]["answer"] + "\n"


@pytest.mark.parametrize(("content", "named"), [
    ('{"prompt": "a"}\n{"prompt": 1}', "line 2"), ('"a"\n\n{', "line 3"), ("[1]", "line 1"), (b"\xc4\xe3", "byte 0")])
def test_damaged_rows_of_prompts_are_named(belle, packed, tmp_path, content, named):
    (tmp_path / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = belle("generate", packed, "--prompts", tmp_path / "rows.jsonl")
    assert code == 4
    assert named in err
    assert "loading" not in err


def test_prompt_styles(belle, packed):
    args = ("generate", packed, "--prompt", "你好", "--max-tokens", 6, "--seed", 0, "--prompt-style")
    answers = {style: belle(*args, style) for style in ("auto", "llama", "bloom", "none")}
    assert all(code == 0 for code, _, _ in answers.values())
    assert answers["auto"] == answers["llama"]
    assert answers["none"] != answers["llama"]
    code, _, err = belle("generate", packed, "--prompt", "你好", "--prompt-style", "alpaca")
    assert code == 2
    assert "bloom" in err


def test_inspect_command(belle, packed):
    code, out, err = belle("inspect", packed)
    assert (code, err) == (0, "")
    assert "4 bits, group size 32, format gptq" in out
    code, out, _ = belle("inspect", packed, "--json")
    assert code == 0
    assert json.loads(out)["quantization"]["bits"] == 4


def test_inspect_of_a_damaged_model_exits_4(belle, tiny_llama, tmp_path):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    (path / "tokenizer.json").unlink()
    code, out, _ = belle("inspect", path, "--json")
    assert code == 4
    assert json.loads(out)["problems"]


def test_eval_ppl_and_its_gate(belle, packed, text):
    code, out, _ = belle("eval", "ppl", packed, "--text", text, "--window", 64, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["perplexity"] > 1
    code, out, err = belle("eval", "ppl", packed, "--text", text, "--window", 64, "--gate", "ppl<1.5")
    assert code == 5
    assert f"{found['perplexity']:.4f}" in out
    assert "ppl<1.5" in err


def test_eval_kl_and_its_gates(belle, packed, tiny_llama, text):
    code, out, _ = belle("eval", "kl", packed, "--base", tiny_llama, "--text", text, "--json", "--gate", "kl<99")
    found = json.loads(out)
    assert code == 0
    assert found["kl_mean"] > 0
    assert set(found["kl_quantiles"]) == {"1%", "5%", "10%", "50%", "90%", "95%", "99%", "99.9%"}
    code, out, _ = belle("eval", "kl", tiny_llama, "--base", tiny_llama, "--text", text)
    assert code == 0
    assert "Mean KLD                        0.000000 ± 0.000000" in out
    gates = ("kl_99%>99", "same_top>=2", "ratio<=0.5", "change_50%>1")
    for gate in gates:
        code, _, err = belle("eval", "kl", packed, "--base", tiny_llama, "--text", text, "--gate", gate)
        assert code == 5
        assert gate in err


def test_eval_kl_reuses_stored_predictions_of_the_base(belle, packed, tiny_llama, text, tmp_path, monkeypatch):
    from gptq_belle.cli import options

    loaded, load = [], options.load_model
    monkeypatch.setattr(options, "load_model", lambda path, *args: loaded.append(path) or load(path, *args))
    args = ("eval", "kl", packed, "--base", tiny_llama, "--text", text, "--window", 64, "--json")
    plain, first, second = belle(*args), *(belle(*args, "--keep", tmp_path / "kept") for _ in range(2))
    assert plain[:2] == first[:2] == second[:2]
    assert plain[0] == 0
    assert loaded == [tiny_llama, packed, tiny_llama, packed, packed]
    code, _, err = belle(*args, "--keep", tmp_path)
    assert code == 2
    assert str(tmp_path) in err


def test_eval_belle_and_its_gates(belle, packed, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text('{"class": "math", "question": "1+1?", "std_answer": "2"}\n')
    code, out, _ = belle("eval", "belle", packed, "--test", test, "--max-tokens", 4, "--json")
    assert code == 0
    assert json.loads(out)["classes"]["math"]["answers"] == 1
    for gate in ("exact>100", "nll.math<0", "f1>=101"):
        code, out, err = belle("eval", "belle", packed, "--test", test, "--max-tokens", 4, "--gate", gate)
        assert code == 5
        assert "math" in out
        assert gate in err
    assert belle("eval", "belle", packed, "--test", test, "--gate", "nll.code<0")[0] == 2


def test_eval_belle_with_a_base_and_a_judge(belle, tiny_llama, tmp_path):
    test, prompts, judge = (tmp_path / name for name in ("test.jsonl", "prompts.json", "judge.jsonl"))
    test.write_text('{"class": "open qa", "question": "1+1?", "std_answer": "2"}\n', encoding="utf-8")
    prompts.write_text('{"class": "open QA", "prompt": "打分。"}\n', encoding="utf-8")
    args = ("eval", "belle", tiny_llama, "--test", test, "--max-tokens", 4, "--base", tiny_llama, "--json")
    code, out, _ = belle(*args, "--judge", judge, "--judge-prompts", prompts)
    assert code == 0
    assert json.loads(out)["total"]["agreement"] == json.loads(out)["total"]["identical"] == 100
    assert json.loads(judge.read_text(encoding="utf-8"))["class"] == "open QA"
    assert belle(*args, "--judge", judge)[0] == 2


def test_text_that_was_calibrated_on_is_refused(belle, packed, text, tmp_path):
    import shutil

    from gptq_belle.quantization.calibration.overlap import document_keys

    path = tmp_path / "calibrated"
    shutil.copytree(packed, path)
    report = {"calibration": {"seen": document_keys(["The quick brown fox jumps over the lazy dog."])}}
    (path / "quantization_report.json").write_text(json.dumps(report), encoding="utf-8")
    code, out, err = belle("eval", "ppl", path, "--text", text)
    assert (code, out) == (4, "")
    assert "4 of 8 rows" in err
    assert "--allow-overlap" in err
    assert belle("eval", "ppl", path, "--text", text, "--allow-overlap")[0] == 0


def test_bench_json_output(belle, packed, monkeypatch):
    monkeypatch.setattr("gptq_belle.bench.bandwidth.buffer_bytes", lambda: 1 << 22)
    code, out, _ = belle("bench", packed, "-p", 8, "-n", 2, "-r", 1, "--json", "--precision", "fast")
    assert code == 0
    assert json.loads(out)["results"][0]["precision"] == "fast"


def test_doctor_command(belle):
    code, out, err = belle("doctor")
    assert (code, err) == (0, "")
    assert "torch" in out
    code, out, _ = belle("doctor", "--json", "--device", "cpu")
    found = json.loads(out)
    assert code == 0
    assert {row["device"] for row in found["kernels"]} == {"cpu"}
    assert {row["precision"] for row in found["kernels"]} == {"exact", "fast"}


@pytest.mark.parametrize(("words", "unused", "used"), [
    (("quantize", "MODEL", "OUT", "--method", "rtn", "--group-size", "32", "--rows", "3", "--calibration", "none",
      "--preset", "fast"), ["--rows", "--calibration", "--preset"], ["--group-size"]),
    (("quantize", "MODEL", "OUT", "--preset", "fast", "--without", "search", "--dry-run", "--rows", "2",
      "--seq-len", "64", "--allow-short", "--group-size", "32"), ["--without"], ["--rows"]),
    (("generate", "PACKED", "--prompt", "a", "--max-tokens", "1", "--temperature", "0", "--top-k", "3", "--seed", "1"),
     ["--top-k", "--seed"], ["--max-tokens"]),
    (("generate", "MODEL", "--prompt", "a", "--max-tokens", "1", "--precision", "fast"), ["--precision"], []),
    (("generate", "PACKED", "--prompt", "a", "--max-tokens", "1", "--temperature", "1", "--top-k", "3", "--precision",
      "fast"), [], ["--top-k", "--precision"])])
def test_options_without_effect_are_named(belle, tiny_llama, packed, tmp_path, words, unused, used):
    places = {"MODEL": tiny_llama, "PACKED": packed, "OUT": tmp_path / "out"}
    code, _, err = belle(*(places.get(word, word) for word in words), "--device", "cpu")
    assert code == 0
    said = " ".join(line for line in err.splitlines() if "No effect" in line)
    assert [option for option in [*unused, *used] if option in said] == unused
