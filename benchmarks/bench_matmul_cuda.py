"""Measure packed products on a GPU next to cuBLAS, torch's int4 op, gemlite and GPTQModel, in one run.

    python benchmarks/bench_matmul_cuda.py --out FOLDER                # all shapes, M = 1 to 2048; 3 minutes
    python benchmarks/bench_matmul_cuda.py --set llama-7b --rows 1 16 2048 --bits 4 8

Every variant cycles through enough copies of its weight to exceed the L2 cache, in a CUDA graph, timed with events;
results are medians of 7 intervals. The bandwidth of a copy and the speed of cuBLAS on large matrices are measured in
the same run. Writes cuda_matmul.json and cuda_matmul.txt.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_common import ROWS, SHAPES, Deadline, codes_of, expanded, head, random_weight, require_device, write
from cuda_peers import PEERS, Matmul
from torch import Tensor

from gptq_belle.bench import cuda_timing
from gptq_belle.kernels import triton_matmul

AGREEMENT = {torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative error (Frobenius norm) to float32
CUBLAS = "cuBLAS float16"
GOALS = (  # name, rows, metric, minimum; over every shape except APART
    ("M = 1 to 16: share of a copy's bandwidth", (1, 2, 4, 8, 16), "share_of_copy", 0.85),
    ("M = 256 to 1024: speed of cuBLAS", (256, 512, 1024), "times_cublas", 0.6),
    ("M = 2048: speed of cuBLAS", (2048,), "times_cublas", 0.9),
)
APART, APART_GOAL = (4096, 16384), 0.5


class CudaVariant:
    """Copies of one weight as products, created on first use; `reason` is set if the variant is skipped."""

    def __init__(self, make: Callable[[], Matmul], dtype: torch.dtype, size: int, device: torch.device) -> None:
        self.dtype, self.size, self.reason = dtype, size, ""
        self._make, self._device = make, device
        self._products: list[Matmul] = []

    def products(self) -> list[Matmul]:
        """The copies; errors of their creation propagate."""
        if not self._products:
            self._products = [self._make() for _ in range(cuda_timing.operand_copies(self.size, self._device, most=32))]
        return self._products

    def seconds(self, x: Tensor, expected: Tensor) -> dict[str, float] | None:
        """Median, lowest and highest seconds of a product; None, with `reason` set, if it fails or is incorrect."""
        if self.reason:
            return None
        try:
            x = x.to(self.dtype)
            products = self.products()
            error = float((products[0](x).float() - expected).norm() / expected.norm())
            if not error < AGREEMENT[self.dtype]:
                self.reason = f"wrong result: relative error {error:.1e}"
                return None
            found = cuda_timing.device_seconds([partial(product, x) for product in products])
        except Exception as error:  # a peer is missing or has changed: recorded, the others continue
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None
        return {"seconds": found.median, "low": found.low, "high": found.high}


def variants_of(inputs: int, outputs: int, bits: Sequence[int],
                device: torch.device) -> tuple[dict[str, CudaVariant], Tensor]:
    """All variants of one shape, and the float32 weight (K, N) that the 4-bit variants share."""
    weight = random_weight(inputs, outputs, 4, device)
    codes, scales = codes_of(weight)
    found = {}
    for width in bits:
        own = weight if width == 4 else random_weight(inputs, outputs, width, device)
        size = own.words.nbytes + own.scales.nbytes
        found[f"ours, {width} bits"] = CudaVariant(partial(ours, own), torch.float16, size, device)
    for name, peer in PEERS.items():
        size = int(inputs * outputs * peer.bits / 8)
        found[name] = CudaVariant(partial(peer.make, codes, scales), peer.dtype, size, device)
    return found, expanded(weight)


def ours(weight: Any) -> Matmul:
    """A product with a copy of a weight, as `dispatch` would run it."""
    copy = weight._replace(words=weight.words.clone(), scales=weight.scales.clone())
    return lambda x: triton_matmul.quant_matmul(x, copy)


def measure_shape(inputs: int, outputs: int, rows: Sequence[int], bits: Sequence[int], limits: dict[str, float],
                  device: torch.device, deadline: Deadline) -> list[dict[str, Any]]:
    """One row per M and variant."""
    variants, exact = variants_of(inputs, outputs, bits, device)
    found: list[dict[str, Any]] = []
    for m in rows:
        if deadline.over():
            break
        x = torch.randn(m, inputs, device=device).half()
        expected = x.float() @ exact
        lines = {}
        for name, variant in variants.items():
            other = name.startswith("ours") and "4" not in name  # another weight: its expected result differs
            times = variant.seconds(x, own_result(variant, x) if other else expected)
            if times:
                lines[name] = times
        for name, times in lines.items():
            took = times["seconds"]
            found.append({
                "inputs": inputs, "outputs": outputs, "rows": m, "variant": name, **times, "bytes": variants[name].size,
                "share_of_copy": variants[name].size / took / limits["copy"],
                "share_of_peak": 2 * m * inputs * outputs / took / limits["matrix"],
                "times_cublas": lines[CUBLAS]["seconds"] / took if CUBLAS in lines else None})
            print(text(found[-1]), flush=True)
    left_out = {name: variant.reason for name, variant in variants.items() if variant.reason}
    return [*found, {"inputs": inputs, "outputs": outputs, "left_out": left_out}]


def own_result(variant: CudaVariant, x: Tensor) -> Tensor:
    """The result of a variant with another weight in float32, where the weight is expanded exactly."""
    return variant.products()[0](x.float())


def text(line: dict[str, Any]) -> str:
    """One row as text."""
    times = "" if line["times_cublas"] is None else f", {line['times_cublas']:5.2f} x cuBLAS"
    return (f"{line['inputs']:5} x {line['outputs']:5}, M = {line['rows']:4}: {line['variant']:16} "
            f"{1e6 * line['seconds']:8.1f} us, {line['share_of_copy']:5.2f} of a copy, "
            f"{line['share_of_peak']:5.2f} of the matrix peak{times}")


def goals(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst 4-bit result of ours for each goal, and whether it is reached; None if nothing was measured."""
    mine = [line for line in lines if line.get("variant") == "ours, 4 bits"]

    def worst(name: str, rows: Sequence[int], figure: str, least: float, apart: bool) -> dict[str, Any]:
        values = [line[figure] for line in mine if line["rows"] in rows and line[figure] is not None
                  and (figure != "share_of_copy" or ((line["inputs"], line["outputs"]) == APART) == apart)]
        low = min(values, default=None)
        return {"goal": name, "least": least, "worst": low, "reached": None if low is None else low >= least}

    name, rows, figure, _ = GOALS[0]
    return [*(worst(goal, on, of, least, False) for goal, on, of, least in GOALS),
            worst(f"{name}, {APART[0]} x {APART[1]}", rows, figure, APART_GOAL, True)]


def copy_bandwidth(device: torch.device, size: int = 512 << 20) -> float:
    """Bytes per second, read and written, of copies of `size` bytes within device memory."""
    pairs = [(torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device))
             for _ in range(2)]
    return 2 * size / cuda_timing.device_seconds([partial(b.copy_, a) for a, b in pairs]).median


def matrix_peak(device: torch.device, side: int = 8192) -> float:
    """Operations per second of cuBLAS on square float16 matrices (side, side)."""
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / cuda_timing.device_seconds([lambda: torch.mm(a, b, out=out)]).median


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", nargs="+", choices=SHAPES, default=list(SHAPES), help="models to measure")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="values of M")
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8], help="bits of our weights")
    parser.add_argument("--budget", type=float, default=600, help="time limit in seconds; no new M is started after it")
    parser.add_argument("--out", type=Path, default=Path("cuda-results"), help="folder of the results")
    args = parser.parse_args()
    device, deadline = require_device(), Deadline(args.budget)
    limits = {"copy": copy_bandwidth(device), "matrix": matrix_peak(device)}
    print(f"a copy: {limits['copy'] / 1e9:.0f} GB/s, cuBLAS on 8192: {limits['matrix'] / 1e12:.0f} TFLOP/s", flush=True)
    lines: list[dict[str, Any]] = []
    shapes = list(dict.fromkeys(shape for name in args.set for shape in SHAPES[name]))
    for inputs, outputs in shapes:
        lines += measure_shape(inputs, outputs, args.rows, args.bits, limits, device, deadline)
        torch.cuda.empty_cache()
        content = head(device) | {"copy_Bps": limits["copy"], "matrix_operations_per_s": limits["matrix"],
                                  "complete": not deadline.over(), "goals": goals(lines), "results": lines}
        write(args.out, "cuda_matmul", content)  # after every shape, so that a timeout loses nothing
    summary = [f"{goal['goal']}: at least {goal['least']}, worst {goal['worst'] and round(goal['worst'], 3)}"
               for goal in goals(lines)]
    table = [text(line) if "variant" in line else f"{line['inputs']} x {line['outputs']}, skipped: {line['left_out']}"
             for line in lines]
    (args.out / "cuda_matmul.txt").write_text("\n".join([*table, "", *summary]) + "\n", encoding="utf-8")
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()
