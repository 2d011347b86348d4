"""Measure what other processes cost a model on a CPU, with and without the limit on spinning (common/openmp.py).

    python benchmarks/bench_busy.py examples/belle_tiny/llama [MORE MODELS] --repeats 5

Every measurement is a process of its own: torch reads the limit once. The variants take turns, first on the machine as
it is, then beside one process per core that never waits. Results are medians of tokens/s; `share` is busy by quiet.
Writes benchmarks/results/cpu_busy.json or --name.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import records

from gptq_belle.common.openmp import SPIN_COUNT, SPINS

VARIANTS = {"limited": str(SPINS), "default of OpenMP": "300000"}
PROMPT, TOKENS, REPEATS = 256, 128, 5  # of a process, see bench/workload.py


def measure(path: str) -> dict[str, float]:
    """Tokens/s of decoding and of reading a prompt, in this process."""
    from gptq_belle import load
    from gptq_belle.bench.workload import Workload, sweep

    (point,) = sweep([load(path, device="cpu")], Workload(PROMPT, TOKENS, repeats=REPEATS), [1], [0])
    return {"decode": point.decode.median, "prompt": point.prefill.median}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_process(path: str, spins: str) -> dict[str, float]:
    """`measure` in a new process with this limit."""
    run = subprocess.run([sys.executable, __file__, path, "--measure"], env=os.environ | {SPIN_COUNT: spins},
                         check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def compare(path: str, repeats: int) -> list[dict[str, Any]]:
    """One row per variant and kind of work."""
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for busy in (0, cores):
        with busy_processes(busy):
            for _ in range(repeats):
                for name, spins in VARIANTS.items():
                    for work, value in in_process(path, spins).items():
                        found.setdefault((name, work), {}).setdefault(busy, []).append(value)
    rows = []
    for (name, work), values in found.items():
        quiet, beside = statistics.median(values[0]), statistics.median(values[cores])
        rows.append({"model": Path(path).name, "work": work, "variant": name, "spins": VARIANTS[name], "cores": cores,
                     "quiet": quiet, "busy": beside, "share": beside / quiet, "all_quiet": values[0],
                     "all_busy": values[cores]})
        print(f"{Path(path).name} {work:6} {name:17}: {quiet:8.1f} tokens/s quiet, {beside:8.1f} beside {cores} busy "
              f"processes, {beside / quiet:.2f}", flush=True)
    return rows


def main() -> None:
    """Measure all models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories")
    parser.add_argument("--repeats", type=int, default=5, help="processes per variant and condition")
    parser.add_argument("--name", default="cpu_busy", help="name of the record")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.models[0])))
        return
    rows = [row for path in options.models for row in compare(path, options.repeats)]
    print(records.write(options.name, {"prompt_tokens": PROMPT, "decoded_tokens": TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
