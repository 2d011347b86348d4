"""Measure the CPU fallback next to torch's int4 op, over the cases that users have.

    python benchmarks/bench_fallback.py [--repeats 5]

Shapes are those of LLaMA-7B, groups of 128, one thread. The candidates of a case take turns; results are medians. A
candidate that does not support a case is missing in its results; `reference` supports every case. Writes
benchmarks/results/cpu_fallback.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import records
import torch
import torch_int4
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracle_format import random_words

from gptq_belle.kernels import reference
from gptq_belle.kernels.layout import CanonicalWeight, checked_weight

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # (in_features, out_features)
CASES = (("4 bit", 4, False), ("4 bit, act-order", 4, True), ("8 bit", 8, False))
ROWS = (1, 64)
DTYPES = (torch.float32, torch.bfloat16)
Matmul = Callable[[Tensor], Tensor]


def with_groupwise(weight: CanonicalWeight, dtype: torch.dtype) -> Matmul | None:
    """The layout of the checkpoint, unpacked run by run."""
    return (lambda x: reference.groupwise_matmul(x, weight)) if weight.run else None


def with_int4(weight: CanonicalWeight, dtype: torch.dtype) -> Matmul | None:
    """torch's int4 operation, which computes in bfloat16."""
    if dtype != torch.bfloat16 or not torch_int4.is_supported(weight):
        return None
    prepared = torch_int4.prepare(weight)
    return lambda x: torch_int4.quant_matmul(x, prepared)


def medians(matmuls: dict[str, Matmul], x: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of each, in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in matmuls}
    for repeat in range(repeats + 1):
        for name, multiply in matmuls.items():
            begin = time.perf_counter()
            multiply(x)
            if repeat:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def measure(repeats: int) -> list[dict[str, object]]:
    """One entry per case, shape, number of rows and dtype of activations."""
    entries: list[dict[str, object]] = []
    for inputs, outputs in SHAPES:
        for name, bits, act_order in CASES:
            words = random_words(bits, inputs, outputs, 128, act_order=act_order)
            weight = checked_weight(**words, bits=bits, zero_offset=1)
            for dtype in DTYPES:
                candidates = {"groupwise": with_groupwise(weight, dtype), "torch-int4": with_int4(weight, dtype),
                              "reference": lambda x, weight=weight: reference.quant_matmul(x, weight)}
                matmuls = {key: multiply for key, multiply in candidates.items() if multiply is not None}
                for rows in ROWS:
                    found = medians(matmuls, torch.randn(rows, inputs).to(dtype), repeats)
                    entries.append({"case": name, "in_features": inputs, "out_features": outputs, "rows": rows,
                                    "dtype": str(dtype).split(".")[1], "ms": found})
                    print(entries[-1], flush=True)
    return entries


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="Timed calls per candidate. Default: 5.")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    entries = measure(options.repeats)
    print(records.write("cpu_fallback", {"threads": 1, "repeats": options.repeats, "entries": entries}))


if __name__ == "__main__":
    main()
