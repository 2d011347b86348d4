"""Where a quantization job's seconds go, and how long GPTQModel takes for the same model, rows and settings.

    python benchmarks/bench_quantize.py                        # the demo models
    python benchmarks/bench_quantize.py MODEL... --rows 32 --seq-len 512 --peer PYTHON

Ours is timed inside a process of its own, libraries imported. PYTHON is the interpreter of an environment that has
GPTQModel 7 installed; it gets the same rows of token ids, and is told of four processors where there are fewer, for it
refuses to start on two. Each is run `--repeats` times, in turns; the medians are quoted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import records

MODELS = [records.ROOT / "examples" / "belle_tiny" / name for name in ("bloom", "llama")]
PHASES = ("reading", "forwards", "hessians", "solving", "packing", "writing", "total")
OURS = """
import json, sys
from gptq_belle import Calibration, QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint
source, out, rows, seq_len = sys.argv[1:]
calibration = Calibration(rows=int(rows), seq_len=int(seq_len), allow_short=True)
report = quantize_checkpoint(source, out, QuantConfig(), calibration=calibration, resume=False)
print(json.dumps({"seconds": report.seconds, "phases": report.phases, "mean_error": report.mean_error}))
"""
PEER = """
import json, os, sys, time
os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0)))
import torch
from gptqmodel import GPTQModel, QuantizeConfig
source, out, rows = sys.argv[1:]
ids = json.load(open(rows))
examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False), device="cpu")
began = time.perf_counter()
model.quantize(examples, batch_size=1)
model.save(out)
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def answer(python: str, code: str, *arguments: object) -> dict[str, Any]:
    """Run code in a process; the last line that it prints, as JSON."""
    done = subprocess.run([python, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=records.ROOT)
    if done.returncode:
        sys.exit(f"{python} failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def write_rows(source: Path, rows: int, seq_len: int, path: Path) -> None:
    """The token ids that our job calibrates on, for the peer."""
    from gptq_belle import Calibration
    from gptq_belle.checkpoint.directory import load_tokenizer
    from gptq_belle.checkpoint.reader import CheckpointReader
    from gptq_belle.quantization.calibration import calibration_tokens
    from gptq_belle.runtime.chat import detect_style

    style = detect_style(CheckpointReader(source).config)
    tokens = calibration_tokens(Calibration(rows=rows, seq_len=seq_len), load_tokenizer(source), style)
    path.write_text(json.dumps(tokens.tolist()), encoding="utf-8")


def measure(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of one model, ours by phase and block, and the peer's where there is one."""
    ours, peers = [], []
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.json")
        write_rows(source, options.rows, options.seq_len, rows)
        for turn in range(options.repeats):
            ours.append(answer(sys.executable, OURS, source, Path(scratch, "ours"), options.rows, options.seq_len))
            if options.peer:
                peers.append(answer(options.peer, PEER, source, Path(scratch, f"peer{turn}"), rows)["seconds"])
    median = sorted(ours, key=lambda run: run["seconds"])[len(ours) // 2]
    found = {"seconds": median["seconds"], "spread": [run["seconds"] for run in ours],
             "mean_error": median["mean_error"], "blocks": median["phases"],
             "phases": {name: sum(block.get(name, 0.0) for block in median["phases"]) for name in PHASES}}
    if peers:
        found |= {"gptqmodel_seconds": statistics.median(peers), "gptqmodel_spread": peers,
                  "ratio": median["seconds"] / statistics.median(peers)}
    return found


def main() -> None:
    """Measure, print a table, and leave benchmarks/results/quantize.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", type=Path, default=MODELS)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", help="python of an environment with GPTQModel")
    options = parser.parse_args()
    found = {}
    for source in options.models:
        result = found[source.name] = measure(source, options)
        print(f"{source.name}: {result['seconds']:.1f} s of which " + ", ".join(
            f"{name} {result['phases'][name]:.2f}" for name in PHASES[:-1]))
        if options.peer:
            print(f"{source.name}: GPTQModel {result['gptqmodel_seconds']:.1f} s, ratio {result['ratio']:.2f}")
    print(records.write("quantize", {"rows": options.rows, "seq_len": options.seq_len, "models": found}))


if __name__ == "__main__":
    main()
