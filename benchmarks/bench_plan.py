"""Compare the estimate of `plan` with the memory of processes: six models of real widths with fewer blocks.

    python benchmarks/bench_plan.py        # writes and removes models of up to 2.6 GB; minutes

Each model is written by make_model and loaded in its own process, which prefills a prompt and decodes some tokens. The
peak of anonymous memory, without that of the libraries, is compared with the plan. Writes benchmarks/results/plan.json.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import records
from make_model import make

from gptq_belle.bench import footprint
from gptq_belle.checkpoint.reader import read_config
from gptq_belle.models.dimensions import dimensions
from gptq_belle.models.sizes import MemorySettings, memory_use


class PlanCase(NamedTuple):
    """A model cut to `layers` blocks, its memory settings, and the workload: `batch` sequences of `context` tokens."""

    model: str
    layers: int
    setting: MemorySettings
    context: int
    batch: int


CASES = (
    PlanCase("llama-7b", 6, MemorySettings(4, 4), 2048, 1),
    PlanCase("llama-7b", 6, MemorySettings(8, 16), 1024, 2),
    PlanCase("llama-13b", 4, MemorySettings(4, 8, cache="int8"), 2048, 2),
    PlanCase("belle-7b", 4, MemorySettings(4, 8), 2048, 1),
    PlanCase("belle-7b", 4, MemorySettings(8, 4, cache="int8"), 1024, 4),
    PlanCase("llama-7b", 2, MemorySettings(16, 16), 512, 8),
)


def measure(case: PlanCase, folder: Path) -> dict[str, Any]:
    """Planned and measured bytes, and their ratio."""
    make(case.model, folder, bits=case.setting.bits, layers=case.layers)
    found = footprint.measure_in_new_process(folder, device="cpu", head_bits=case.setting.head_bits,
                                             cache=case.setting.cache, prompt=case.context - footprint.STEPS,
                                             batch=case.batch)
    planned = memory_use(dimensions(read_config(folder)), case.setting, case.context, case.batch)
    if found.peak_bytes is None:
        raise SystemExit("this system does not report the memory of a process")
    return {"model": case.model, "layers": case.layers, "context": case.context, "batch": case.batch,
            **asdict(case.setting), "planned": asdict(planned), "planned_bytes": planned.model,
            "measured_bytes": found.peak_bytes, "loaded_bytes": found.loaded_bytes,
            "process_bytes": found.process_bytes, "planned_of_measured": planned.model / found.peak_bytes}


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(case, Path(scratch) / "model")
        rows.append(row)
        print(f"{row['model']}, {row['layers']} blocks, {row['bits']} bit, head {row['head_bits']}, {row['batch']} x "
              f"{row['context']} tokens in {row['cache']}: planned {row['planned_bytes'] / 1e6:,.0f} MB, measured "
              f"{row['measured_bytes'] / 1e6:,.0f} MB, ratio {row['planned_of_measured']:.3f}", flush=True)
    print(records.write("plan", {"results": rows}))


if __name__ == "__main__":
    main()
