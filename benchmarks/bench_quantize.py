"""Measure the time of a quantization job by phase, the estimate of the dry run, and the time of GPTQModel.

    python benchmarks/bench_quantize.py                        # the demo models, and a random LLaMA of hidden size 1024
    python benchmarks/bench_quantize.py MODEL... --rows 32 --seq-len 512 --peer-python PYTHON

PYTHON is the interpreter of an environment with GPTQModel 7. GPTQModel gets the token ids of our calibration, computes
in float32 as ours does (its default, bfloat16, is slower on processors without bfloat16 instructions), and sees at
least four processors, because it refuses to start on fewer. Each run is a separate process; both sides take turns,
`--repeats` times, and results are medians. The time covers the way from the source directory to the written one on both
sides: it excludes importing Python packages and includes loading and writing the model, and for ours also tokenization,
checksums of the source, the journal for resuming, and reading back. The first run of GPTQModel, which compiles its
extensions, is not counted. A preset other than fast takes turns with fast.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
from make_model import make

DEMO = records.ROOT / "examples" / "belle_tiny"
RANDOM = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
          "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 2, "vocab_size": 3072,
          "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
          "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
PHASES = ("reading", "forwards", "hessians", "solving", "packing", "writing")
OURS = """
import json, sys
from gptq_belle import Calibration, QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint
source, out, preset, rows, seq_len = sys.argv[1:]
calibration = Calibration(rows=int(rows), seq_len=int(seq_len), allow_short=True)
report = quantize_checkpoint(source, out, QuantConfig(preset=preset), calibration=calibration, resume=False)
print(json.dumps({"seconds": report.seconds, "phases": report.phases, "mean_error": report.mean_error}))
"""
PEER = """
import json, os, sys, time
from importlib.metadata import version
os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0)))
import torch
from gptqmodel import GPTQModel, QuantizeConfig
source, out, rows = sys.argv[1:]
examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in json.load(open(rows))]
at = [time.perf_counter()]
model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False), device="cpu",
                       dtype=torch.float32)
dtype = str(next(model.model.parameters()).dtype)
at.append(time.perf_counter())
log = model.quantize(examples, batch_size=1)
at.append(time.perf_counter())
model.save(out)
at.append(time.perf_counter())
print()
print(json.dumps({"seconds": at[-1] - at[0], "phases": dict(zip(("loading", "quantizing", "saving"),
    (end - begin for begin, end in zip(at, at[1:])))), "dtype": dtype, "threads": torch.get_num_threads(),
    "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")}}))
"""


def answer(python: str, *arguments: object) -> dict[str, Any]:
    """Run Python in a process and parse its output as JSON, from the last line that starts an object.

    The peer runs without our PYTHON* variables: with the root on its path it would import our `kernels`.
    """
    ours = python == sys.executable
    kept = {key: value for key, value in os.environ.items() if ours or not key.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, errors="replace",
                              cwd=records.ROOT if ours else elsewhere, env=kept | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{python} failed: {done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines()
    begin = max(at for at, line in enumerate(lines) if line.startswith("{"))
    result: dict[str, Any] = json.loads("\n".join(lines[begin:]))
    return result


def random_model(folder: Path) -> Path:
    """Write a LLaMA with random weights, large enough that compute dominates, with the demo model's tokenizer."""
    source = folder / "llama_1024"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(RANDOM))
    make(source, source, bits=16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "llama" / name, source)
    return source


def write_rows(source: Path, rows: int, seq_len: int, path: Path) -> None:
    """Write the token ids of our calibration for the peer."""
    from gptq_belle import Calibration
    from gptq_belle.checkpoint.reader import CheckpointReader
    from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
    from gptq_belle.prompts.styles import detect_style
    from gptq_belle.quantization.calibration.rows import calibration_rows

    style = detect_style(CheckpointReader(source).config)
    tokens = calibration_rows(Calibration(rows=rows, seq_len=seq_len), load_tokenizer(source), style).tokens
    path.write_text(json.dumps(tokens.tolist()), encoding="utf-8")


def measure(source: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Medians of one model: ours by phase and block, the estimate of the dry run, and the peer if there is one."""
    size, rows, out = (options.rows, options.seq_len), scratch / "rows.json", scratch / "ours"
    write_rows(source, *size, rows)
    estimates, ours, plain, peers = [], [], [], []
    dry = ["-m", "gptq_belle.quantize", source, out, "--preset", options.preset, "--rows", size[0], "--seq-len",
           size[1], "--allow-short", "--dry-run", "--json"]
    for turn in range(options.repeats):
        estimates.append(answer(sys.executable, *dry)["seconds"])
        ours.append(answer(sys.executable, "-c", OURS, source, out, options.preset, *size))
        if options.preset != "fast":
            plain.append(answer(sys.executable, "-c", OURS, source, out, "fast", *size)["seconds"])
        if options.peer_python:
            peers.append(answer(options.peer_python, "-c", PEER, source, scratch / f"peer{turn}", rows))
    median = middle(ours)
    found = {"seconds": median["seconds"], "spread": [run["seconds"] for run in ours],
             "estimated_seconds": statistics.median(estimates), "estimated_spread": estimates,
             "mean_error": median["mean_error"],
             "phases": {name: sum(block.get(name, 0.0) for block in median["phases"]) for name in PHASES},
             "blocks": median["phases"]}
    found["estimated_ratio"] = found["estimated_seconds"] / found["seconds"]
    if plain:
        found |= {"fast_seconds": statistics.median(plain), "fast_spread": plain,
                  "times_fast": median["seconds"] / statistics.median(plain)}
    if peers:
        theirs = middle(peers)
        found |= {"gptqmodel": theirs | {"spread": [run["seconds"] for run in peers]},
                  "ratio": median["seconds"] / theirs["seconds"]}
    return found


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median time."""
    seconds: Callable[[dict[str, Any]], float] = lambda run: run["seconds"]  # noqa: E731
    return sorted(runs, key=seconds)[len(runs) // 2]


def record_name(preset: str) -> str:
    """Name of the file in benchmarks/results."""
    return "quantize" if preset == "fast" else f"quantize_{preset}"


def models_so_far(options: argparse.Namespace) -> dict[str, Any]:
    """The models that an earlier run measured."""
    models: dict[str, Any] = json.loads((records.RESULTS / f"{record_name(options.preset)}.json").read_text())["models"]
    return models


def show(name: str, result: dict[str, Any]) -> None:
    """Print the results of one model."""
    print(f"{name}: {result['seconds']:.1f} s (estimate {result['estimated_seconds']:.1f}) of which " + ", ".join(
        f"{phase} {result['phases'][phase]:.2f}" for phase in PHASES))
    if "times_fast" in result:
        print(f"{name}: {result['times_fast']:.2f} times the {result['fast_seconds']:.1f} s of preset fast", flush=True)
    if "ratio" in result:
        print(f"{name}: GPTQModel {result['gptqmodel']['seconds']:.1f} s, ratio {result['ratio']:.2f}", flush=True)


def main() -> None:
    """Measure, print a table, and write benchmarks/results/quantize.json (quantize_PRESET.json for other presets)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", type=Path, help="default: the demo models and a random one")
    parser.add_argument("--preset", default="fast", help="preset of our job; compare only fast with the peer")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", help="interpreter of an environment with GPTQModel")
    parser.add_argument("--add", action="store_true", help="add to the models of the existing result")
    options = parser.parse_args()
    sys.argv = ["PYTHON" if word == options.peer_python else word for word in sys.argv]  # as the result file shows it
    options.peer_python = options.peer_python and os.path.abspath(options.peer_python)  # it runs elsewhere
    found = models_so_far(options) if options.add else {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = [path.resolve() for path in options.models] or [DEMO / "bloom", DEMO / "llama", random_model(scratch)]
        if options.peer_python:
            write_rows(DEMO / "bloom", 2, 64, scratch / "rows.json")
            answer(options.peer_python, "-c", PEER, DEMO / "bloom", scratch / "first", scratch / "rows.json")
        for source in models:
            found[source.name] = measure(source, options, scratch)
            show(source.name, found[source.name])
    settings = {"bits": 4, "group_size": 128, "rows": options.rows, "seq_len": options.seq_len, "random": RANDOM}
    print(records.write(record_name(options.preset), settings | {"models": found}))


if __name__ == "__main__":
    main()
