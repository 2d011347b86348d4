"""Ablation of the presets best and max, one technique per rung: `bench_quality.py --ladder`.

Each rung includes the techniques of the rungs before it. The spread is over random seeds of the calibration rows.
"""

import datetime
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch

from gptq_belle import Calibration, QuantConfig, load, quantize_checkpoint
from gptq_belle.engine.model import Model
from gptq_belle.evaluation.belle_set import BelleQuestion

ROWS, LENGTH = 64, 256  # of the calibration: a rung takes less than a minute
SEEDS = 5
RUNGS: dict[str, dict[str, Any]] = {
    "nearest": {"method": "rtn"},
    "fast": {"preset": "fast"},
    "order": {"without": ("search", "fold", "refine", "targets", "veto")},
    "search, positive": {"without": ("fold", "refine", "targets", "veto"), "positive_scales": True},
    "search, signed": {"without": ("fold", "refine", "targets", "veto")},
    "refine": {"without": ("fold", "targets", "veto")},
    "fold": {"without": ("targets", "veto")},
    "targets": {"without": ("veto",)},
    "best": {},
    "max": {"preset": "max"},
}
PLAN = (  # bits, rungs, seeds
    (4, tuple(RUNGS)[:-1], SEEDS), (3, ("nearest", "fast", "best"), 2), (2, ("nearest", "fast", "best"), 2),
    (8, ("nearest", "fast", "best"), 2), (4, ("max",), 2), (3, ("max",), 2),
    (2, ("max",), 2),
)


class Run(NamedTuple):
    """One quantization job to measure."""

    bits: int
    rung: str
    seed: int

    @property
    def config(self) -> QuantConfig:
        return QuantConfig(bits=self.bits, **RUNGS[self.rung])


def runs(only: Sequence[str]) -> Iterator[Run]:
    """All runs of one model, or of the rungs in `only`; rounding to nearest has no seed."""
    for bits, rungs, seeds in PLAN:
        for seed in range(seeds):
            yield from (Run(bits, rung, seed) for rung in rungs
                        if (rung != "nearest" or seed == 0) and rung in (only or RUNGS))


def climb(source: Path, measure: Callable[[Model, Model], dict[str, Any]], only: Sequence[str]) -> list[dict[str, Any]]:
    """Metrics of every run on one model; prints each when it is measured."""
    base, found = load(source), []
    for run in runs(only):
        found.append(run._asdict() | one(source, base, run, measure))
        if run.rung == "max":  # the last bits differ between processors, which changes KL by about 5 %
            found[-1]["kl_of_best"] = one(source, base, run._replace(rung="best"), measure)["kl"]
        print(f"{source.name} {run.bits} bit, seed {run.seed}, {run.rung:<17} " + "  ".join(
            f"{name} {found[-1][name]:.6g}" for name in ("kl", "kl_of_best", "perplexity", "exact", "seconds")
            if name in found[-1]), flush=True)
    return found


def one(source: Path, base: Model, run: Run, measure: Callable[[Model, Model], dict[str, Any]]) -> dict[str, Any]:
    """Quantize and measure one run."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        report = quantize_checkpoint(source, Path(scratch) / "out", run.config,
                                     calibration=Calibration(rows=ROWS, seq_len=LENGTH, seed=run.seed))
        seconds = time.perf_counter() - began
        figures = measure(base, load(Path(scratch) / "out"))
    del figures["classes"]
    return {**figures, "seconds": seconds, "winners": report.winners, "refinement": report.refinement}


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per bits and rung: means over the seeds, and the standard deviation of KL."""
    fast = {(row["bits"], row["seed"]): row["kl"] for row in found if row["rung"] == "fast"}
    rows = []
    keys = {(row["bits"], row["rung"]) for row in found}
    every = [(bits, rung) for bits in (4, 3, 2, 8) for rung in RUNGS if (bits, rung) in keys]
    for bits, rung in every:
        some = [row for row in found if (row["bits"], row["rung"]) == (bits, rung)]
        kls = [row["kl"] for row in some]
        shares = [row["kl"] / fast[bits, row["seed"]] for row in some]
        rows.append({"bits": bits, "rung": rung, "seeds": len(some), "kl": statistics.mean(kls),
                     "kl_spread": statistics.stdev(kls) if len(kls) > 1 else 0.0, "of_fast": statistics.mean(shares),
                     "of_fast_spread": statistics.stdev(shares) if len(shares) > 1 else 0.0,
                     "perplexity": statistics.mean(row["perplexity"] for row in some),
                     "exact": statistics.mean(row["exact"] for row in some)})
    return rows


def main(models: dict[str, Path], measure: Callable[[Model, Model], dict[str, Any]], rows: list[BelleQuestion],
         only: Sequence[str]) -> None:
    """Run both models in parallel and write the result; with `only`, replace just these rungs in it."""
    with ProcessPoolExecutor(len(models), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(models, pool.map(climb, models.values(), [measure] * len(models), [only] * len(models)),
                         strict=True))
    if only:
        print(_replaced(found, only))
        return
    settings = {"group_size": 128, "calibration": f"builtin, {ROWS} rows of {LENGTH} tokens", "questions": len(rows)}
    print(records.write("belle_tiny_ladder", {
        "settings": settings, "models": {name: {"summary": summary(runs), "runs": runs}
                                         for name, runs in found.items()}}))


def _replaced(found: dict[str, list[dict[str, Any]]], only: Sequence[str]) -> Path:
    """Replace the runs of the same rungs in the result file, and record date and command of the replacement."""
    path = records.RESULTS / "belle_tiny_ladder.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, new in found.items():
        kept = [row for row in record["models"][name]["runs"] if row["rung"] not in only]
        record["models"][name] = {"summary": summary(kept + new), "runs": kept + new}
    record.setdefault("later", []).append({
        "rungs": list(only), "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/bench_quality.py", *sys.argv[1:]])})
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
