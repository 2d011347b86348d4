"""Compare the KL of `--auto-bits` with uniform 4 bits and with random choices of the same average bits.

    python benchmarks/bench_auto_bits.py          # both demo models, 4.5 bits, 5 random choices each; some minutes

A random choice takes stages in random order until the budget is used up. KL is computed on held-out text that is not
calibration data. `explained` is the KL that the size alone predicts: linear interpolation between 4 and 8 bits.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import records
import torch

from gptq_belle import Calibration, QuantConfig, load, quantize_checkpoint
from gptq_belle.evaluation.kl_divergence import divergence
from gptq_belle.evaluation.perplexity import read_text
from gptq_belle.quantization.auto_bits import config_with_bits, stages_and_budget
from gptq_belle.quantization.job import prepare_job

TINY = records.ROOT / "examples" / "belle_tiny"
MODELS = ("bloom", "llama")
WINDOW, TOKENS = 256, 12288  # of held-out text
CALIBRATION = Calibration(seq_len=WINDOW)


def at_random(source: Path, budget: str, seed: int) -> QuantConfig:
    """A configuration with 8 bits for randomly chosen stages, as many as the budget allows."""
    job = prepare_job(source, QuantConfig(auto_bits=budget), CALIBRATION, "cpu")
    stages, room = stages_and_budget(job)
    random.Random(seed).shuffle(stages)
    chosen = set()
    for stage in stages:
        if stage.extra <= room:
            room -= stage.extra
            chosen.add((stage.block, stage.linears[0]))
    return replace(config_with_bits(job, chosen), auto_bits=None)


def variants(source: Path, budget: str, seeds: int) -> Iterator[tuple[str, QuantConfig]]:
    """The compared configurations by name."""
    yield "4 bit", QuantConfig()
    yield "8 bit", QuantConfig(bits=8)
    yield f"auto {budget}", QuantConfig(auto_bits=budget)
    for seed in range(seeds):
        yield f"random {seed}", at_random(source, budget, seed)


def measure(architecture: str, budget: str, seeds: int) -> dict[str, dict[str, Any]]:
    """Average bits, size and KL of every variant of one model; prints each when it is measured."""
    source = TINY / architecture
    base = load(source)
    text = read_text(TINY / "data" / "heldout.jsonl", base.chat_format())
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in variants(source, budget, seeds):
            path = Path(scratch) / name.replace(" ", "-")
            report = quantize_checkpoint(source, path, config, calibration=CALIBRATION)
            figures = divergence(base.logits, load(path).logits, base.tokenizer, text, length=WINDOW, limit=TOKENS)
            found[name] = {"bits": report.average_bits, "bytes": report.bytes_on_disk, "kl": figures.kl_mean,
                           "kl_error": figures.kl_error, "choice": report.choice}
            print(f"{architecture} {name:<10} {report.average_bits:.3f} bits  KL {figures.kl_mean:.6f} +- "
                  f"{figures.kl_error:.6f}", flush=True)
    return found


def verdict(found: dict[str, dict[str, Any]], budget: str) -> dict[str, float]:
    """KL of `--auto-bits`, of the interpolation and of the random choices."""
    few, many, auto = found["4 bit"], found["8 bit"], found[f"auto {budget}"]
    share = (auto["bits"] - few["bits"]) / (many["bits"] - few["bits"])
    others = sorted(entry["kl"] for name, entry in found.items() if name.startswith("random"))
    return {"uniform": few["kl"], "auto": auto["kl"], "explained": few["kl"] + share * (many["kl"] - few["kl"]),
            "random_mean": sum(others) / len(others), "random_best": others[0], "random_worst": others[-1]}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", default="4.5", help="value of quantize --auto-bits")
    parser.add_argument("--seeds", type=int, default=5, help="random choices per model")
    args = parser.parse_args()
    count = len(MODELS)
    # One process per model with one thread each: operations of this size gain almost nothing from a second thread.
    with ProcessPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(measure, MODELS, [args.budget] * count, [args.seeds] * count))
    verdicts = {name: verdict(variants_, args.budget) for name, variants_ in zip(MODELS, found, strict=True)}
    for name, figures in verdicts.items():
        print(name, "  ".join(f"{key} {value:.6f}" for key, value in figures.items()))
    settings = {"budget": args.budget, "calibration": "builtin, 128 rows of 256 tokens", "held-out tokens": TOKENS}
    content = {"settings": settings, "verdicts": verdicts, "models": dict(zip(MODELS, found, strict=True))}
    print(records.write("auto_bits", content))


if __name__ == "__main__":
    main()
