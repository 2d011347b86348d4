"""What a job will take is said before it starts, and held against what it took."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import naming
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_belle.common.memory import parse_bytes
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.quantization.activations import Activations
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.cost_estimate import estimate
from gptq_belle.quantization.job import prepare_job
from gptq_belle.quantization.memory_estimate import estimate_memory, must_spill
from gptq_belle.quantization.pipeline import quantize_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "belle_tiny"
CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)
TOLERANCE = 0.2


def random_model(kind, path, *, hidden, inner, blocks):
    """A directory of random float16 weights with one shard per block, never whole in memory."""
    sizes = {"bloom": {"n_layer": 1, "n_head": hidden // 64},
             "llama": {"num_hidden_layers": 1, "num_attention_heads": hidden // 64, "intermediate_size": inner,
                       "tie_word_embeddings": False, "max_position_embeddings": 2048}}[kind]
    config = AutoConfig.for_model(kind, vocab_size=3072, hidden_size=hidden, bos_token_id=1, eos_token_id=2, **sizes)
    state = AutoModelForCausalLM.from_config(config).half().state_dict()
    prefix, where = {"bloom": "transformer.h.0.", "llama": "model.layers.0."}[kind], {}
    path.mkdir()
    if kind == "bloom":
        del state["lm_head.weight"]
    for index in range(-1, blocks):
        part = {name.replace(".0.", f".{index}.", 1): tensor for name, tensor in state.items()
                if name.startswith(prefix) == (index >= 0)}
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, path / f"part{index}.safetensors")
        where |= dict.fromkeys(part, f"part{index}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(EXAMPLES / kind / name, path)
    setattr(config, "n_layer" if kind == "bloom" else "num_hidden_layers", blocks)
    config.save_pretrained(path)
    return path


def command(source, out, *options):
    """Run `quantize --json` in a separate process."""
    line = [sys.executable, "-m", "gptq_belle.quantize", str(source), str(out), "--allow-short", "--json", *options]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "hidden", "rows", "length", "preset"), [
    ("llama", 768, 8, 256, "best"), ("bloom", 512, 4, 1024, "best"), ("llama", 512, 8, 256, "max")])
def test_memory_is_estimated(kind, hidden, rows, length, preset, tmp_path):
    source = random_model(kind, tmp_path / "source", hidden=hidden, inner=3 * hidden, blocks=2)
    options = ["--rows", str(rows), "--seq-len", str(length), "--preset", preset]
    estimated = command(source, tmp_path / "out", *options, "--dry-run")
    assert not list(tmp_path.glob("out*"))
    report = command(source, tmp_path / "out", *options)
    assert report["peak_memory"] == pytest.approx(estimated["memory"], rel=TOLERANCE)
    assert report["bytes_on_disk"] == pytest.approx(estimated["output"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hidden", "blocks", "limit"),
                         [("llama", 2048, 40, 744 << 20), ("bloom", 1024, 96, 736 << 20)])
def test_a_model_several_times_larger_than_the_allowed_memory(kind, hidden, blocks, limit, tmp_path):
    """BLOOM's is half as wide, for its inner width is always four times its own: of 2048, a block needs 1.7 GiB."""
    source = random_model(kind, tmp_path / "source", hidden=hidden, inner=hidden, blocks=blocks)
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    options = ["--rows", "8", "--seq-len", "256", "--memory", f"{limit >> 20}MiB"]
    estimated = command(source, tmp_path / "out", *options, "--dry-run")
    report = command(source, tmp_path / "out", *options)
    print(f"{kind}: weights {weights >> 20} MiB, allowed {limit >> 20}, estimated {estimated['memory'] >> 20}, peak "
          f"{report['peak_memory'] >> 20}; seconds estimated {estimated['seconds']:.0f}, {report['seconds']:.0f}")
    assert weights > 3 * limit
    assert report["peak_memory"] < limit
    assert report["peak_memory"] == pytest.approx(estimated["memory"], rel=TOLERANCE)


def test_disk_is_estimated(tiny_model, tmp_path, monkeypatch):
    held = []
    plain = Activations.write

    def write(self, index, batches):
        stamp = plain(self, index, batches)
        held.append(sum(file.stat().st_size for file in (tmp_path / "out.partial").rglob("*") if file.is_file()))
        return stamp

    monkeypatch.setattr(Activations, "write", write)
    config = QuantConfig(group_size=32)
    estimated = estimate(prepare_job(tiny_model, config, CALIBRATION, "cpu"))
    report = quantize_checkpoint(tiny_model, tmp_path / "out", config, calibration=CALIBRATION)
    assert report.bytes_on_disk == pytest.approx(estimated.output, rel=0.05)
    assert max(held) <= 1.2 * estimated.disk


def test_time_is_estimated_from_one_block(tiny_model):
    few, many = (estimate(prepare_job(tiny_model, QuantConfig(group_size=32), Calibration(rows=rows, seq_len=64,
                                                                                      allow_short=True), "cpu"))
                 for rows in (64, 512))
    assert 0 < few.seconds < many.seconds
    assert many.tokens == 8 * few.tokens


def test_linears_of_one_size_are_solved_once_and_counted_each(tiny_model, monkeypatch):
    """What is counted and was not spent must not be missing from the time of the rows."""
    monkeypatch.setattr("gptq_belle.quantization.cost_estimate._seconds_of_solving", lambda *_: 100.0)
    job = prepare_job(tiny_model, QuantConfig(group_size=32), CALIBRATION, "cpu")
    stages = job.stream.count * len(job.stream.arch.stages)
    assert 100 * stages < estimate(job).seconds < 101 * stages


def test_spilled_activations_end_in_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("gptq_belle.quantization.memory_estimate.anonymous_bytes", lambda: 256 << 20)
    config = QuantConfig(group_size=32)
    job = prepare_job(tiny_model, config, CALIBRATION, "cpu")
    needed = estimate_memory(job)
    assert needed.activations == 4 * 16 * 64 * 128 * 4  # of both models, and what attention makes of them
    assert not must_spill(job, needed.total + (64 << 20))
    assert must_spill(job, needed.floor + needed.activations // 2)
    for name, limit in (("memory", None), ("disk", needed.floor + (8 << 10))):
        quantize_checkpoint(tiny_model, tmp_path / name, config, calibration=CALIBRATION, memory=limit)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk"))
    assert ours == theirs


def test_too_little_memory_is_refused_before_anything_is_written(tiny_bloom, tmp_path):
    with pytest.raises(HardwareError, match=naming("10 MiB")):
        quantize_checkpoint(tiny_bloom, tmp_path / "out", QuantConfig(group_size=32), calibration=CALIBRATION,
                            memory=10 << 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "count"), [
    ("8GiB", 8 << 30), ("8G", 8 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("77", 77), ("3b", 3)])
def test_sizes_are_parsed(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1G", "1e9", "8 G iB"])
def test_malformed_sizes_are_refused(text):
    with pytest.raises(UsageError, match=naming(repr(text))):
        parse_bytes(text)


def test_bytes_of_a_7b_model_fit_into_8_gb(tmp_path, monkeypatch):
    """By arithmetic: BLOOM-7B1's and LLaMA-7B's own sizes, 128 rows of 2048 tokens, activations on disk."""
    monkeypatch.setattr("gptq_belle.quantization.memory_estimate.anonymous_bytes", lambda: 260 << 20)
    monkeypatch.setattr("gptq_belle.quantization.job.check_model", lambda *_: [])  # there are no weights
    for kind, sizes in (("bloom", {"hidden_size": 4096, "n_head": 32, "n_layer": 30, "vocab_size": 250880}),
                        ("llama", {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
                                   "intermediate_size": 11008, "vocab_size": 32000})):
        source = tmp_path / kind
        source.mkdir()
        AutoConfig.for_model(kind, **sizes).save_pretrained(source)
        save_file({"x": torch.zeros(1)}, source / "model.safetensors")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EXAMPLES / kind / name, source)
        job = prepare_job(source, QuantConfig(), Calibration(rows=128, seq_len=2048, allow_short=True), "cpu")
        needed = estimate_memory(job)
        print(kind, needed)
        assert needed.floor < 8_000_000_000
