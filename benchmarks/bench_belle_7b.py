"""Measure BELLE-7B's shape with random weights: file size, load time relative to reading, memory, tokens/s.

    python benchmarks/bench_belle_7b.py FOLDER       # writes and removes models of up to 8.3 GB there; minutes

Four checkpoints: 4 and 8 bits, each with the lm_head in float16, which every reader accepts, and with the packed
lm_head only. Memory is measured in a process that prefills a prompt up to a context of 2,048 tokens and decodes; the
lm_head is in 8 bits in memory for either file. Reading is timed on the same files, alternating with loading, and the
page cache is dropped before each run. Loading is compared with reading through the page cache, which has to allocate
memory for the file as loading does for the model, with a direct read, which bypasses the cache, and with loading
without direct I/O. Limits are the project's goals.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch
from make_model import make

from gptq_belle import load
from gptq_belle.bench import footprint

CONTEXT, HEAD, TOKENS, TURNS = 2048, 8, 8, 3


class CheckpointCase(NamedTuple):
    """A checkpoint and its limits in GB: file size, and memory by dtype of the KV cache."""

    bits: int
    stored_head: int
    file: float
    memory: dict[str, float]


CASES = (
    CheckpointCase(4, 16, 5.3, {"float16": 5.3, "int8": 4.8}),
    CheckpointCase(4, 8, 4.3, {}),
    CheckpointCase(8, 16, 8.3, {"float16": 8.4}),
    CheckpointCase(8, 8, 7.3, {}),
)
PROCESS, LOAD = 0.6, 1.5  # GB of the process without the model; load time relative to reading
# Runs `footprint.main` in a process in which every read is "small", so that none is direct.
WITHOUT_DIRECT_IO = """
from gptq_belle.bench import footprint
from gptq_belle.checkpoint import direct_io
direct_io.LARGE = 1 << 62
footprint.main()
"""


def forget(folder: Path) -> None:
    """Drop the weight files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(folder: Path, flags: int = 0) -> float:
    """Seconds to read all weight files sequentially into one buffer; `flags` are added to O_RDONLY for open(2)."""
    forget(folder)
    buffer = mmap.mmap(-1, 4 << 20)
    began = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(os.open(path, os.O_RDONLY | flags), "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def speed(folder: Path) -> float:
    """Tokens per second of greedy decoding after a short prompt."""
    model = load(folder, head_bits=HEAD)
    logits, session = model.prefill(torch.ones(1, 16, dtype=torch.int64))
    seconds = []
    for _ in range(TOKENS):
        began = time.perf_counter()
        logits = model.decode(logits.argmax(-1), session)
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds)


def load_through_page_cache(folder: Path) -> float:
    """Seconds to load without direct I/O, in a new process."""
    request = {"path": str(folder), "device": "cpu", "precision": None, "head_bits": HEAD, "cache": "float16",
               "prompt": 16, "batch": 1, "threads": torch.get_num_threads()}
    done = subprocess.run([sys.executable, "-c", WITHOUT_DIRECT_IO, json.dumps(request)], stdout=subprocess.PIPE,
                          check=True)
    return float(json.loads(done.stdout)["load_seconds"])


def measure(case: CheckpointCase, folder: Path) -> dict[str, Any]:
    """All measurements of one checkpoint with their limits."""
    size = make("belle-7b", folder, bits=case.bits, head_bits=case.stored_head)
    reads, past, loads, cached, memory = [], [], [], [], {}
    for cache, limit in case.memory.items():
        found = footprint.measure_in_new_process(folder, device="cpu", head_bits=HEAD, cache=cache,
                                                 prompt=CONTEXT - footprint.STEPS)
        memory[cache] = asdict(found) | {"limit_bytes": limit * 1e9}
    for _ in range(TURNS):
        reads.append(seconds_to_read(folder))
        past.append(seconds_to_read(folder, os.O_DIRECT))
        forget(folder)
        loads.append(footprint.measure_in_new_process(folder, device="cpu", head_bits=HEAD).load_seconds)
        forget(folder)
        cached.append(load_through_page_cache(folder))
    through, direct, load_seconds, without = (statistics.median(times) for times in (reads, past, loads, cached))
    return {**case._asdict(), "file_bytes": size, "file_limit_bytes": case.file * 1e9, "memory": memory,
            "read_seconds": through, "direct_read_seconds": direct, "load_seconds": load_seconds,
            "load_of_read": load_seconds / through, "load_of_direct_read": load_seconds / direct, "load_limit": LOAD,
            "load_seconds_without_direct_io": without, "direct_io_speedup": without / load_seconds,
            "process_limit_bytes": PROCESS * 1e9, "tokens_per_second": speed(folder)}


def show(row: dict[str, Any]) -> None:
    """Print one line per measurement with its limit."""
    print(f"{row['bits']} bits, stored head bits {row['stored_head']}: {row['file_bytes'] / 1e9:.2f} GB "
          f"(limit {row['file_limit_bytes'] / 1e9:.1f}), load {row['load_seconds']:.1f} s, {row['load_of_read']:.2f} "
          f"of a read (limit {LOAD}), {row['load_of_direct_read']:.2f} of a direct read, "
          f"{row['direct_io_speedup']:.2f} times as fast as without direct I/O, "
          f"{row['tokens_per_second']:.2f} tokens/s")
    for cache, found in row["memory"].items():
        print(f"  {cache} cache: model {found['peak_bytes'] / 1e9:.2f} GB (limit {found['limit_bytes'] / 1e9:.1f}), "
              f"process {found['process_bytes'] / 1e9:.2f} GB", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder on a disk with 9 GB free; needs memory to cache them")
    parser.add_argument("--cases", type=int, default=len(CASES), help="measure only the first ones of the checkpoints")
    parser.add_argument("--record", default="belle_7b", help="name of the result")
    options = parser.parse_args()
    rows = []
    for case in CASES[: options.cases]:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(measure(case, Path(folder)))
        show(rows[-1])
    print(records.write(options.record, {"context": CONTEXT, "head_bits": HEAD, "results": rows}))


if __name__ == "__main__":
    main()
