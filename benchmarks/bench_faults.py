"""Run the slow fault tests and record the results: killed jobs, power cuts, full disks, mutated checkpoints.

    python benchmarks/bench_faults.py kills     # 50 SIGKILLs at random moments of complete jobs on the demo models
    python benchmarks/bench_faults.py power     # 20 of them, and all unsynchronized data is dropped
    python benchmarks/bench_faults.py disk      # a disk of one, two, ... nine tenths of what a job needs; needs root
    python benchmarks/bench_faults.py mutants   # 20,000 mutated checkpoints through `inspect` and `load`

Each part stops at the first job whose files differ from those of an uninterrupted job, or at the first checkpoint that
is neither refused in one line nor loaded. Results are written to benchmarks/results/faults_NAME.json. A long part can
be split: `--count 10 --seed 3 --add` adds to the existing file.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import records

sys.path.insert(0, str(records.ROOT / "tests"))
import faults  # noqa: E402
import mutations  # noqa: E402

FIRST_SEED = 1000  # of the mutants; lower seeds belong to the quick test


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill and resume jobs, alternating between the models."""
    with jobs(folder) as (worker, uninterrupted):
        kinds = ["bloom", "llama"] * (count // 2)
        found = faults.kill_at_random(worker, uninterrupted, folder, random.Random(seed), kinds)
    rows = [{"model": kind, "seconds": round(seconds, 3), "blocks_kept": kept} for kind, seconds, kept in found]
    return {"killed": len(rows), "identical": len(rows), "with_blocks_to_resume_from": sum(
        row["blocks_kept"] > 0 for row in rows), "jobs": rows}


def power(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Simulate power cuts, alternating between the models."""
    moments, rows = random.Random(seed), []
    with jobs(folder) as (worker, uninterrupted):
        for number in range(count):
            kind = ("bloom", "llama")[number % 2]
            seconds = moments.random() * uninterrupted[kind][1]
            place = folder / f"{number}"
            place.mkdir()
            finished, kept = faults.power_cut_and_resume(worker, kind, uninterrupted, place, seconds)
            rows.append({"model": kind, "seconds": round(seconds, 3), "finished": finished, "blocks_kept": kept})
    return {"cut": count, "identical": count, "most_blocks_lost": max(row["finished"] - row["blocks_kept"]
                                                                      for row in rows), "jobs": rows}


def disk(folder: Path, _count: int, _seed: int) -> dict[str, Any]:
    """Fill up disks of one to nine tenths of the size a job needs."""
    place, rows = folder / "disk", []
    place.mkdir()
    with jobs(folder) as (worker, uninterrupted):
        for tenths in range(1, 10):
            if refusal := faults.mount(place, faults.NEEDED * tenths // 10):
                sys.exit(refusal)
            try:
                kept = faults.fill_and_resume(worker, place, lambda size: faults.mount(place, size),
                                              uninterrupted["bloom"][0], tenths)
            finally:
                faults.unmount(place)
            rows.append({"tenths": tenths, "blocks_kept": kept})
    return {"bytes_needed": faults.NEEDED, "identical": len(rows), "jobs": rows}


def mutants(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Open mutated checkpoints and count the outcomes."""
    bases, worker = mutations.bases(folder), mutations.Worker()
    counts: collections.Counter[str] = collections.Counter()
    first = FIRST_SEED + seed * count
    for number in range(first, first + count):
        outcome, said = worker(mutations.mutant(number, bases[number % len(bases)], folder / "mutant"))
        if outcome == "failed":
            sys.exit(f"seed {number}: {said}")
        counts[outcome] += 1
        if sum(counts.values()) % 1000 == 0:
            print(dict(counts), flush=True)
    worker.close()
    return {"mutants": count, "refused": counts["refused"], "loaded": counts["valid"]}


@contextmanager
def jobs(folder: Path) -> Iterator[tuple[Any, dict[str, tuple[Path, float]]]]:
    """A worker process for jobs, and the results of uninterrupted jobs."""
    worker = faults.Worker(folder / "outcome.json")
    try:
        yield worker, faults.run_uninterrupted(worker, folder)
    finally:
        worker.close()


def joined(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Merge two results: numbers are added, lists concatenated, and of `most_` values the larger one is kept."""
    return {key: max(value, earlier[key]) if key.startswith("most_") else earlier[key] + value
            for key, value in now.items()}


PARTS: dict[str, tuple[Callable[[Path, int, int], dict[str, Any]], int]] = {
    "kills": (kills, 50), "power": (power, 20), "disk": (disk, 9), "mutants": (mutants, 20_000)}


def main() -> None:
    """Run one part and write its result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="number of runs instead of the default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="add to the result of runs with other seeds")
    options = parser.parse_args()
    act, usual = PARTS[options.part]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = act(Path(folder), usual if options.count is None else options.count, options.seed)
    found |= {"seeds": [options.seed], "minutes": round((time.perf_counter() - began) / 60, 1)}
    if options.add and (record := records.RESULTS / f"faults_{options.part}.json").exists():
        found = joined(json.loads(record.read_text()), found)
    print({key: value for key, value in found.items() if key != "jobs"})
    print(records.write(f"faults_{options.part}", found))


if __name__ == "__main__":
    main()
