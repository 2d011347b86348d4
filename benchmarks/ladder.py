"""What each idea of preset best adds, rung by rung: `bench_quality.py --ladder`.

A rung has all ideas of the rungs below it. Spread is over seeds of the calibration rows, which choose other text.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch

from gptq_belle import Calibration, QuantConfig, load, quantize_checkpoint
from gptq_belle.evaluation.belle import Row
from gptq_belle.runtime.engine import Model

ROWS, LENGTH = 64, 256  # of calibration: a rung takes well under a minute
SEEDS = 5
RUNGS: dict[str, dict[str, Any]] = {
    "nearest": {"method": "rtn"},
    "fast": {"preset": "fast"},
    "order": {"without": ("search", "refine", "targets", "veto")},
    "search, positive": {"without": ("refine", "targets", "veto"), "positive_scales": True},
    "search, signed": {"without": ("refine", "targets", "veto")},
    "refine": {"without": ("targets", "veto")},
    "targets": {"without": ("veto",)},
    "best": {},
}
ENDS = ("nearest", "fast", "best")  # at other bits than 4


class Run(NamedTuple):
    """One quantization to measure."""

    bits: int
    rung: str
    seed: int

    @property
    def config(self) -> QuantConfig:
        return QuantConfig(bits=self.bits, **RUNGS[self.rung])


def runs() -> Iterator[Run]:
    """All of one model; rounding to nearest has no seed."""
    for bits, rungs, seeds in ((4, tuple(RUNGS), SEEDS), (3, ENDS, 2), (2, ENDS, 2), (8, ENDS, 2)):
        for seed in range(seeds):
            yield from (Run(bits, rung, seed) for rung in rungs if rung != "nearest" or seed == 0)


def climb(source: Path, measure: Callable[[Model, Model], dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of every run on one model, each printed as soon as it is there."""
    base, found = load(source), []
    for run in runs():
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            report = quantize_checkpoint(source, Path(scratch) / "out", run.config,
                                         calibration=Calibration(rows=ROWS, seq_len=LENGTH, seed=run.seed))
            seconds = time.perf_counter() - began
            figures = measure(base, load(Path(scratch) / "out"))
        del figures["classes"]
        found.append({**run._asdict(), **figures, "seconds": seconds, "winners": report.winners})
        print(f"{source.name} {run.bits} bit, seed {run.seed}, {run.rung:<17} KL {figures['kl']:.6f}  perplexity "
              f"{figures['perplexity']:.4f}  exact {figures['exact']:.1f} %  {seconds:.0f} s", flush=True)
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each bits and rung: means over the seeds, and the spread of KL between them."""
    fast = {(row["bits"], row["seed"]): row["kl"] for row in found if row["rung"] == "fast"}
    rows = []
    for bits, rung in dict.fromkeys((row["bits"], row["rung"]) for row in found):
        some = [row for row in found if (row["bits"], row["rung"]) == (bits, rung)]
        kls = [row["kl"] for row in some]
        shares = [row["kl"] / fast[bits, row["seed"]] for row in some]
        rows.append({"bits": bits, "rung": rung, "seeds": len(some), "kl": statistics.mean(kls),
                     "kl_spread": statistics.stdev(kls) if len(kls) > 1 else 0.0, "of_fast": statistics.mean(shares),
                     "of_fast_spread": statistics.stdev(shares) if len(shares) > 1 else 0.0,
                     "perplexity": statistics.mean(row["perplexity"] for row in some),
                     "exact": statistics.mean(row["exact"] for row in some)})
    return rows


def main(models: dict[str, Path], measure: Callable[[Model, Model], dict[str, Any]], rows: list[Row]) -> None:
    """Both models side by side, and the record."""
    with ProcessPoolExecutor(len(models), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(models, pool.map(climb, models.values(), [measure] * len(models)), strict=True))
    settings = {"group_size": 128, "calibration": f"builtin, {ROWS} rows of {LENGTH} tokens", "questions": len(rows)}
    print(records.write("belle_tiny_ladder", {
        "settings": settings, "models": {name: {"summary": summary(runs), "runs": runs}
                                         for name, runs in found.items()}}))
