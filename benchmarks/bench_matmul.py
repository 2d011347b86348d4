"""Measure packed products on a CPU next to torch's int4 op, dense matrices and llama.cpp, in one run.

    python benchmarks/bench_matmul.py                      # shapes of BELLE-7B and LLaMA, M = 1 to 512; minutes
    python benchmarks/bench_matmul.py --set llama-7b --rows 1 512 --repeats 5
    python benchmarks/bench_matmul.py --stack              # 8 blocks of LLaMA-7B and an lm_head, token by token

Variants take turns within each repeat, each with the next of its copies of the weight, so that all of them see the same
disturbances and none finds its weight in the cache. Results are medians; ratios are ratios of medians of the same run.
llama.cpp has no call for a single product: with --stack it generates whole tokens with a random Q4_0 model of the same
shape, if it is installed (see llama_peer.py). Writes benchmarks/results/cpu_matmul.json, cpu_stack.json or --name.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import records
import torch
from llama_peer import LlamaCpp, Shape
from matmul_variants import (
    GROUP,
    OURS,
    READ,
    MatmulVariant,
    Multiply,
    activations,
    dense,
    int4_of_torch,
    native,
    variants_of,
)
from torch import Tensor

from gptq_belle.bench.bandwidth import read_bandwidth
from gptq_belle.common.timers import seconds, spread
from gptq_belle.kernels import cpu_layout
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.native_library import load_library

SETS = {  # (in_features, out_features) of every linear
    "belle-7b": {"query_key_value": (4096, 12288), "dense": (4096, 4096), "h_to_4h": (4096, 16384),
                 "4h_to_h": (16384, 4096), "head": (4096, 250880)},
    "llama-7b": {"attention": (4096, 4096), "gate, up": (4096, 11008), "down": (11008, 4096), "head": (4096, 32000)},
    "llama-13b": {"attention": (5120, 5120), "gate, up": (5120, 13824), "down": (13824, 5120)},
}
FEW = 16  # rows: these passes are so short that the previous variant affects them
WARM_UP = 0.5  # seconds per case: the first products after a pause take up to twice as long
BLOCK = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]  # LLaMA-7B
BLOCKS, HEAD, CONTEXT = 8, (4096, 32000), 8


def interleaved(variants: dict[str, MatmulVariant], rows: int, inputs: int, repeats: int) -> dict[str, float]:
    """Median seconds of each variant at M = rows, after a warm-up of WARM_UP seconds."""
    x = {name: activations(name, rows, inputs) for name in variants}
    turns = {name: itertools.cycle(variant.copies) for name, variant in variants.items()}

    def turn() -> dict[str, float]:
        return {name: seconds(lambda n=name: next(turns[n])(x[n])) for name in variants}  # type: ignore[misc]

    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP:
        turn()
    times = [turn() for _ in range(repeats)]
    return {name: spread([each[name] for each in times]).median for name in variants}


def once(variants: dict[str, MatmulVariant], inputs: int) -> None:
    """Use every copy once: reading takes up to twice as long while written data is still leaving the caches."""
    for name, variant in variants.items():
        x = activations(name, 1, inputs)
        for product in variant.copies:
            product(x)


def measure_shape(inputs: int, outputs: int, rows: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row per M and variant; our 4-bit product and the plain read are measured again with each set."""
    found: list[dict[str, Any]] = []
    for variants in variants_of(inputs, outputs):
        once(variants, inputs)
        for m in rows:
            seen = {row["variant"] for row in found if row["rows"] == m}
            medians = interleaved(variants, m, inputs, max(5, 2 * repeats if m <= 16 else repeats // 2))
            speeds = {name: variants[name].bytes / taken for name, taken in medians.items()}
            for name, taken in medians.items():
                operations = 0 if name == READ else 2 * m * inputs * outputs / taken
                found += [] if name in seen else [{
                    "inputs": inputs, "outputs": outputs, "rows": m, "variant": name, "seconds": taken,
                    "bytes": variants[name].bytes, "Bps": speeds[name], "share_of_read": speeds[name] / speeds[READ],
                    "operations_per_s": operations, "time_of_ours": taken / medians[OURS]}]
                print(f"{inputs} x {outputs}, M = {m}: {name:14} {1e3 * taken:8.3f} ms {speeds[name] / 1e9:6.1f} GB/s, "
                      f"{speeds[name] / speeds[READ]:.2f} of a plain read, {operations / 1e9:6.0f} GOP/s, "
                      f"{taken / medians[OURS]:5.2f} of ours", flush=True)
    return found


def measure_prepare(shapes: Sequence[tuple[int, int]], repeats: int) -> dict[str, float]:
    """Median seconds to convert 4-bit weights of these shapes to the CPU layout, and the bytes of their codes."""
    weights = []
    for inputs, outputs in shapes:
        words = torch.randint(-(2**31), 2**31 - 1, (inputs // 8, outputs), dtype=torch.int32)
        zeros = torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
        scales = torch.rand(inputs // GROUP, outputs).half()
        weights.append(checked_weight(words, zeros, scales, torch.arange(inputs, dtype=torch.int32) // GROUP, 4, 1))
    times = [seconds(lambda: [cpu_layout.prepare(weight) for weight in weights]) for _ in range(repeats + 1)]
    size = sum(weight.qweight.nbytes for weight in weights)
    taken = spread(times[1:]).median
    print(f"converted {size / 1e6:.0f} MB in {taken:.3f} s: {size / taken / 1e9:.2f} GB/s", flush=True)
    return {"seconds": taken, "bytes": size}


def stack(make: Callable[[int, int], MatmulVariant]) -> tuple[list[tuple[int, Multiply]], int]:
    """The linears of 8 blocks and an lm_head with their in_features, and their total bytes."""
    shapes = [*BLOCK * BLOCKS, HEAD]
    made = [make(inputs, outputs) for inputs, outputs in shapes]
    products = [(inputs, variant.copies[0]) for (inputs, _), variant in zip(shapes, made, strict=True)]
    return products, sum(variant.bytes for variant in made)


def run_stack(linears: Sequence[tuple[int, Multiply]], x: dict[int, Tensor]) -> None:
    """Run one pass through all linears."""
    for inputs, product in linears:
        product(x[inputs])


def settled(rows: int, measure: Callable[[], float]) -> float:
    """Seconds of a pass; with few rows, of a second pass, when the previous variant's threads are asleep."""
    if rows <= FEW:
        measure()
    return measure()


def measure_stack(rows: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Tokens/s of the linears of 8 blocks of LLaMA-7B and a 4-bit lm_head; whole tokens for llama.cpp."""
    makers: dict[str, Callable[[int, int], MatmulVariant]] = {
        "4 bit exact": lambda k, n: native(k, n, 4, 1, "exact"),
        "4 bit fast": lambda k, n: native(k, n, 4, 1, "fast"),
        "8 bit exact": lambda k, n: native(k, n, 8, 1, "exact"),
        "torch int4": lambda k, n: int4_of_torch(k, n, 1),
        "dense bfloat16": lambda k, n: dense(k, n, torch.bfloat16, 1),
    }
    stacks = {name: stack(make) for name, make in makers.items()}
    with LlamaCpp(Shape(BLOCKS), torch.get_num_threads()) as peer:
        return [row for m in rows for row in measure_rows(m, stacks, peer, repeats)]


def measure_rows(m: int, stacks: dict[str, tuple[list[tuple[int, Multiply]], int]], peer: LlamaCpp,
                 repeats: int) -> list[dict[str, Any]]:
    """The same at M = m."""
    times: dict[str, list[float]] = {name: [] for name in [*stacks, *(["llama.cpp Q4_0"] if peer.available else [])]}
    for _ in range(repeats + 1):
        for name, (linears, _) in stacks.items():
            x = {inputs: activations(name, m, inputs) for inputs in {k for k, _ in linears}}
            times[name].append(settled(m, lambda n=linears, x=x: seconds(lambda: run_stack(n, x))))  # type: ignore[misc]
        if peer.available:
            times["llama.cpp Q4_0"].append(settled(m, lambda: peer.seconds(CONTEXT, m)))
    read = read_bandwidth(repeats=3).median
    ours, found = spread(times[OURS][1:]).median, []
    for name, values in times.items():
        taken = spread(values[1:]).median
        size = stacks[name][1] if name in stacks else None
        found.append({"rows": m, "variant": name, "seconds": taken, "tokens_per_s": m / taken, "bytes": size,
                      "read_Bps": read, "time_of_ours": taken / ours,
                      "what": "linears alone" if size else f"whole tokens after {CONTEXT}"})
        speed = f"{size / taken / 1e9:5.1f} GB/s of {read / 1e9:.1f}" if size else ""
        print(f"stack, M = {m}: {name:14} {1e3 * taken:8.2f} ms {m / taken:8.1f} tokens/s, {taken / ours:5.2f} of "
              f"ours {speed}", flush=True)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", nargs="+", choices=SETS, default=list(SETS), help="models to measure")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 512], help="values of M")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stack", action="store_true", help="8 blocks of LLaMA-7B instead of single products")
    parser.add_argument("--name", help="name of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels = load_library()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    result: dict[str, Any] = {"threads": options.threads, "isa": kernels.isa}
    if options.stack:
        result["results"] = measure_stack(options.rows, options.repeats)
    else:
        shapes = sorted({shape for name in options.set for shape in SETS[name].values()})
        result["prepare"] = measure_prepare([shape for shape in shapes if shape[1] < 2**15], options.repeats)
        result["results"] = [row for shape in shapes for row in measure_shape(*shape, options.rows, options.repeats)]
    print(records.write(options.name or ("cpu_stack" if options.stack else "cpu_matmul"), result))


if __name__ == "__main__":
    main()
