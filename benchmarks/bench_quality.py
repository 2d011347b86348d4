"""Measure the quality of the quantized demo models: KL, perplexity, exact match by class.

    python benchmarks/bench_quality.py            # both models, every test question; some minutes
    python benchmarks/bench_quality.py --ladder --per-class 12    # ablation of the presets; an hour
    python benchmarks/bench_quality.py --ladder --per-class 12 --rungs max    # preset max alone
    python benchmarks/tables.py                   # the tables of the READMEs, from the written JSON

Perplexity and KL are computed on examples/belle_tiny/data/heldout.jsonl, scores on data/test.jsonl with greedy
decoding, all in float32.
"""

import argparse
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ladder
import records
import torch

from gptq_belle import Calibration, QuantConfig, load, quantize_checkpoint
from gptq_belle.engine.model import Model
from gptq_belle.evaluation.belle_set import BelleQuestion, evaluate, read_questions
from gptq_belle.evaluation.kl_divergence import divergence
from gptq_belle.evaluation.perplexity import read_text

TINY = records.ROOT / "examples" / "belle_tiny"
MODELS = ("bloom", "llama")
WINDOW, TOKENS = 256, 12288  # of held-out text
ANSWER, BATCH = 96, 120  # most tokens per answer (the longest reference has 73), and batch size
VARIANTS: dict[str, QuantConfig | None] = {  # plain GPTQ; preset best is measured by --ladder
    "full precision": None,
    "8 bit GPTQ": QuantConfig(bits=8, preset="fast"),
    "4 bit GPTQ": QuantConfig(bits=4, preset="fast"),
    "4 bit nearest": QuantConfig(bits=4, method="rtn"),
    "3 bit GPTQ": QuantConfig(bits=3, preset="fast"),
    "3 bit nearest": QuantConfig(bits=3, method="rtn"),
}


def weight_bytes(path: Path) -> int:
    """Size of a directory's weight files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def measure(base: Model, model: Model, rows: list[BelleQuestion]) -> dict[str, Any]:
    """Metrics of one variant; KL is relative to `base`."""
    text = read_text(TINY / "data" / "heldout.jsonl", base.chat_format())
    figures = divergence(base.logits, model.logits, base.tokenizer, text, length=WINDOW, limit=TOKENS)
    scores = evaluate(model, rows, limit=ANSWER, batch=BATCH)
    return {
        "kl": figures.kl_mean, "kl_error": figures.kl_error, "same_top": figures.same_top,
        "perplexity": figures.perplexity, "exact": scores.exact,
        "classes": {name: score._asdict() for name, score in scores.classes.items()},
    }


def variants(source: Path, rows: list[BelleQuestion]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, metrics) for every variant of one model."""
    base = load(source)
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in VARIANTS.items():
            path, model = source, base
            if config is not None:
                path = Path(scratch) / name.replace(" ", "-")
                quantize_checkpoint(source, path, config, calibration=Calibration(seq_len=WINDOW))
                model = load(path)
            yield name, {"bytes": weight_bytes(path), **measure(base, model, rows)}


def all_variants(architecture: str, rows: list[BelleQuestion]) -> dict[str, Any]:
    """Metrics of one model by variant; prints each when it is measured."""
    found = {}
    for name, figures in variants(TINY / architecture, rows):
        found[name] = figures
        print(f"{architecture} {name:<15} KL {figures['kl']:.6f}  same top {100 * figures['same_top']:.2f} %  "
              f"perplexity {figures['perplexity']:.4f}  exact {figures['exact']:.1f} %", flush=True)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--per-class", type=int, help="number of test questions per class; default: all")
    parser.add_argument("--ladder", action="store_true", help="run the ablation of the presets instead")
    parser.add_argument("--rungs", nargs="+", choices=ladder.RUNGS, default=[], help="measure only these rungs again")
    args = parser.parse_args()
    rows = read_questions(TINY / "data" / "test.jsonl", args.per_class)
    if args.ladder:
        ladder.main({name: TINY / name for name in MODELS}, partial(measure, rows=rows), rows, args.rungs)
        return
    # One process per model with one thread each: operations of this size gain almost nothing from a second thread.
    with ProcessPoolExecutor(len(MODELS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        models = dict(zip(MODELS, pool.map(all_variants, MODELS, [rows] * len(MODELS)), strict=True))
    settings = {"group_size": 128, "calibration": "builtin, 128 rows of 256 tokens", "questions": len(rows),
                "held-out tokens": TOKENS}
    print(records.write("belle_tiny_quality", {"settings": settings, "models": models}))


if __name__ == "__main__":
    main()
