"""The command `quantize` on the command line: output, and cause and remedy of every failure."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cut_short
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_belle.cli import console, quantize

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--group-size", "32", "--rows", "32", "--seq-len", "64"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            quantize.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    console.out.cache_clear()
    console.err.cache_clear()
    return command


def test_a_job_prints_every_linear_and_the_largest_errors(run, tiny_model, tmp_path):
    code, out, err = run(tiny_model, tmp_path / "out", *SHORT)
    assert code == 0
    assert "4 bits" in out
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert err.count(" error ") == len(report["linears"])
    first, second, *_ = sorted(report["linears"], key=lambda row: -row["error"])
    assert out.index(first["name"]) < out.index(second["name"])
    assert f"gptq-belle report {tmp_path / 'out'} --base {tiny_model}" in out
    assert "peak" in err
    assert "s left" in err


def test_json_is_alone_on_stdout(run, tiny_bloom, tmp_path):
    code, out, _ = run(tiny_bloom, tmp_path / "out", *SHORT, "--json", "--wbits", "8")
    assert code == 0
    assert json.loads(out)["settings"]["bits"] == 8


def test_finished_output_is_replaced_only_with_overwrite(run, tiny_bloom, tmp_path):
    out = tmp_path / "out"
    assert run(tiny_bloom, out, *SHORT, "--method", "rtn")[0] == 0
    written = (out / "model.safetensors").read_bytes()
    code, _, err = run(tiny_bloom, out, *SHORT, "--method", "rtn", "--bits", "8")
    assert code == 2
    assert str(out) in err
    assert (out / "model.safetensors").read_bytes() == written
    assert run(tiny_bloom, out, *SHORT, "--method", "rtn", "--bits", "8", "--overwrite")[0] == 0
    assert json.loads((out / "quantize_config.json").read_text())["bits"] == 8


def test_quantize_runs_by_path(tiny_bloom, tmp_path):
    """The tests of signals run it as a module."""
    command = [sys.executable, str(ROOT / "gptq_belle" / "quantize.py"), str(tiny_bloom), str(tmp_path / "out")]
    result = subprocess.run([*command, *SHORT, "--method", "rtn"], cwd=ROOT, capture_output=True, text=True,
                            env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def edited(source, tmp_path, edit):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    edit(copy)
    return copy


def remove_shard(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, path / "a.safetensors")
    where = {n: ("a", "b")[i % 2] + ".safetensors" for i, n in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "model.safetensors").unlink()


def set_config(**values):
    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | values))
    return edit


@pytest.mark.parametrize(("edit", "named"), [
    (remove_shard, "b.safetensors"),
    (lambda path: cut_short(path / "model.safetensors"), "model.safetensors"),
    (set_config(model_type="gpt_neox"), "gpt_neox"),
    (set_config(n_layer=1), "transformer.h.1."),
    (set_config(n_layer=3), "transformer.h.2."),
    (lambda path: (path / "config.json").unlink(), "config.json"),
    (lambda path: (path / "config.json").write_text("{"), "config.json"),
    (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer"),
    (lambda path: (path / "model.safetensors").unlink(), "source")])
def test_damaged_models_exit_4_with_cause_and_remedy(run, tiny_bloom, tmp_path, edit, named):
    code, out, err = run(edited(tiny_bloom, tmp_path, edit), tmp_path / "out", *SHORT)
    assert (code, out) == (4, "")
    lines = err.strip().splitlines()
    assert named in lines[-2]
    assert lines[-2].startswith("Error: ")
    assert len(lines[-1]) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("layers", [1, 3])
def test_dry_run_refuses_the_same_input_as_the_job(run, tiny_bloom, tmp_path, layers, method):
    source = edited(tiny_bloom, tmp_path, set_config(n_layer=layers))
    code, out, err = run(source, tmp_path / "out", *SHORT, "--method", method, "--dry-run")
    assert (code, out) == (4, "")
    assert "transformer.h." in err


@pytest.mark.parametrize(("options", "code", "named"), [
    (["--bits", "5"], 2, "bits 5"),
    (["--group-size", "100"], 2, "group size 100"),
    (["--method", "awq"], 2, "'awq'"),
    (["--device", "cuda:7"], 3, "cuda:7"),
    (["--device", "tpu"], 2, "'tpu'"),
    (["--calibration", "none.txt"], 4, "none.txt"),
    (["--calibration", "EMPTY"], 4, "empty.txt"),
    (["--calibration", "LATIN"], 4, "latin.txt"),
    (["--rows", "2"], 4, "128")])
def test_wrong_options_are_named_with_a_remedy(run, tiny_bloom, tmp_path, options, code, named):
    files = {"EMPTY": tmp_path / "empty.txt", "LATIN": tmp_path / "latin.txt"}
    files["EMPTY"].write_bytes(b"")
    files["LATIN"].write_bytes("caf\xe9".encode("latin-1"))
    options = [str(files.get(option, option)) for option in options]
    got, _, err = run(tiny_bloom, tmp_path / "out", *SHORT, *options)
    assert got == code
    assert named in err
    assert len(err.strip().splitlines()[-1]) > 10
    assert not list(tmp_path.glob("out*"))


@pytest.fixture(scope="module")
def uneven(tiny_llama, tmp_path_factory):
    """tiny_llama with 192 inputs of down_proj, which groups of 128 do not divide."""
    path = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("uneven") / "llama")
    config = AutoConfig.from_pretrained(path)
    config.intermediate_size = 192
    AutoModelForCausalLM.from_config(config).half().save_pretrained(path)
    return path


@pytest.mark.parametrize(("override", "chosen"), [([], 64), (["--override", "down_proj=group_size:32"], 128)])
def test_group_size_auto_is_the_largest_that_divides_the_linears(run, uneven, tmp_path, override, chosen):
    code, _, _ = run(uneven, tmp_path / "out", "--method", "rtn", "--group-size", "auto", *override)
    assert code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"] == chosen


def test_refused_group_size_names_those_that_fit(run, uneven, tmp_path):
    code, _, err = run(uneven, tmp_path / "out", "--method", "rtn", "--group-size", "128")
    assert code == 2
    assert "192" in err
    assert "64, 32, -1" in err


def test_directory_of_another_program_is_not_overwritten(run, tiny_bloom, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("precious")
    code, _, err = run(tiny_bloom, other, *SHORT)
    assert code == 2
    assert str(other) in err
    assert [path.name for path in other.iterdir()] == ["chapter1.txt"]


def test_ctrl_c_leaves_nothing_and_exits_130(tiny_bloom, tmp_path):
    job = subprocess.Popen([sys.executable, "-m", "gptq_belle.quantize", str(tiny_bloom), str(tmp_path / "out"),
                            "--group-size", "32", "--rows", "1000", "--seq-len", "64"],
                           stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert job.stderr is not None
    while "block 1/" not in (line := job.stderr.readline()):
        assert line, "the job ended before it was interrupted"
    assert (tmp_path / "out.partial").is_dir()
    job.send_signal(signal.SIGINT)
    rest = job.stderr.read()
    assert job.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB; skipped where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_reported_and_partial_output_removed(run, tiny_llama, small_disk):
    code, _, err = run(tiny_llama, small_disk / "out", *SHORT, "--bits", "8")
    assert code == 3, err
    assert str(small_disk) in err
    assert list(small_disk.iterdir()) == []


def test_overrides_on_the_command_line(run, tiny_bloom, tmp_path):
    code, out, _ = run(tiny_bloom, tmp_path / "out", *SHORT, "--override", "mlp.dense_4h_to_h=bits:8",
                       "--override", r"h\.0\.self_attention=skip")
    assert code == 0
    assert "7.33 bits" in out  # (4 * 16 + 4 * 4 + 4 * 8 + 8 * 4 + 4 * 8) / 24, in units of 128 x 128 weights
    stated = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert stated["dynamic"] == {"+:.*(?:mlp.dense_4h_to_h)": {"bits": 8}, r"-:.*(?:h\.0\.self_attention)": {}}
    code, _, err = run(tiny_bloom, tmp_path / "none", *SHORT, "--override", "down_proj=bits:8")
    assert code == 2
    assert "down_proj" in err
