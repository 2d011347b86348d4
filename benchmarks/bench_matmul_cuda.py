"""Products with packed weights on a GPU, against cuBLAS, torch's int4 op, gemlite and GPTQModel, in one run.

    python benchmarks/bench_matmul_cuda.py --out FOLDER                # all shapes, M = 1 to 2048; 3 minutes
    python benchmarks/bench_matmul_cuda.py --set llama-7b --rows 1 16 2048 --bits 4 8

Every variant goes through so many copies of its weight that none is found in the L2 cache, in a CUDA graph, between
events; figures are medians of 7 intervals. The bandwidth of a copy and the speed of cuBLAS on large matrices are
measured in the same run. Writes cuda_matmul.json and cuda_matmul.txt.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_common import ROWS, SHAPES, Deadline, codes_of, expanded, head, random_weight, require_device, write
from cuda_peers import PEERS, Product
from torch import Tensor

from gptq_belle.bench import bandwidth
from gptq_belle.kernels import triton_matmul

AGREEMENT = {torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative error of a result as a whole, against float32
CUBLAS = "cuBLAS float16"
GOALS = (  # name, rows, figure, at least; over every shape but the one named apart
    ("M = 1 to 16: share of a copy's bandwidth", (1, 2, 4, 8, 16), "share_of_copy", 0.85),
    ("M = 256 to 1024: speed of cuBLAS", (256, 512, 1024), "times_cublas", 0.6),
    ("M = 2048: speed of cuBLAS", (2048,), "times_cublas", 0.9),
)
APART, APART_GOAL = (4096, 16384), 0.5


class Variant:
    """Copies of one weight as products, made when they are first needed; `reason` says why there are none."""

    def __init__(self, make: Callable[[], Product], dtype: torch.dtype, size: int, device: torch.device) -> None:
        self.dtype, self.size, self.reason = dtype, size, ""
        self._make, self._device = make, device
        self._products: list[Product] = []

    def products(self) -> list[Product]:
        """The copies; raises what making them raises."""
        if not self._products:
            self._products = [self._make() for _ in range(bandwidth.copies(self.size, self._device, most=32))]
        return self._products

    def seconds(self, x: Tensor, expected: Tensor) -> dict[str, float] | None:
        """Median, least and most seconds of a product; None, and a reason, where it fails or multiplies wrongly."""
        if self.reason:
            return None
        try:
            x = x.to(self.dtype)
            products = self.products()
            error = float((products[0](x).float() - expected).norm() / expected.norm())
            if not error < AGREEMENT[self.dtype]:
                self.reason = f"wrong result: relative error {error:.1e}"
                return None
            found = bandwidth.device_seconds([partial(product, x) for product in products])
        except Exception as error:  # of a peer that is not there or has changed: told in the record, the others go on
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None
        return {"seconds": found.median, "low": found.low, "high": found.high}


def variants_of(inputs: int, outputs: int, bits: Sequence[int],
                device: torch.device) -> tuple[dict[str, Variant], Tensor]:
    """All variants of one shape, and the weight (K, N) in float32 that those of 4 bits share."""
    weight = random_weight(inputs, outputs, 4, device)
    codes, scales = codes_of(weight)
    found = {}
    for width in bits:
        own = weight if width == 4 else random_weight(inputs, outputs, width, device)
        size = own.words.nbytes + own.scales.nbytes
        found[f"ours, {width} bits"] = Variant(partial(ours, own), torch.float16, size, device)
    for name, peer in PEERS.items():
        size = int(inputs * outputs * peer.bits / 8)
        found[name] = Variant(partial(peer.make, codes, scales), peer.dtype, size, device)
    return found, expanded(weight)


def ours(weight: Any) -> Product:
    """A copy of a weight, multiplied as `dispatch` would."""
    copy = weight._replace(words=weight.words.clone(), scales=weight.scales.clone())
    return lambda x: triton_matmul.quant_matmul(x, copy)


def measure_shape(inputs: int, outputs: int, rows: Sequence[int], bits: Sequence[int], limits: dict[str, float],
                  device: torch.device, deadline: Deadline) -> list[dict[str, Any]]:
    """A row of figures for each M and variant."""
    variants, exact = variants_of(inputs, outputs, bits, device)
    found: list[dict[str, Any]] = []
    for m in rows:
        if deadline.over():
            break
        x = torch.randn(m, inputs, device=device).half()
        expected = x.float() @ exact
        lines = {}
        for name, variant in variants.items():
            other = name.startswith("ours") and "4" not in name  # a weight of its own: compared with nothing else
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


def own_result(variant: Variant, x: Tensor) -> Tensor:
    """What a variant on a weight of its own finds in float32, where the weight is expanded exactly."""
    return variant.products()[0](x.float())


def text(line: dict[str, Any]) -> str:
    """A row for reading."""
    times = "" if line["times_cublas"] is None else f", {line['times_cublas']:5.2f} x cuBLAS"
    return (f"{line['inputs']:5} x {line['outputs']:5}, M = {line['rows']:4}: {line['variant']:16} "
            f"{1e6 * line['seconds']:8.1f} us, {line['share_of_copy']:5.2f} of a copy, "
            f"{line['share_of_peak']:5.2f} of the matrix peak{times}")


def goals(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst figure of ours at 4 bits for each goal, and whether it is reached; None where nothing was measured."""
    mine = [line for line in lines if line.get("variant") == "ours, 4 bits"]

    def worst(name: str, rows: Sequence[int], figure: str, least: float, apart: bool) -> dict[str, Any]:
        values = [line[figure] for line in mine if line["rows"] in rows and line[figure] is not None
                  and (figure != "share_of_copy" or ((line["inputs"], line["outputs"]) == APART) == apart)]
        low = min(values, default=None)
        return {"goal": name, "least": least, "worst": low, "reached": None if low is None else low >= least}

    name, rows, figure, _ = GOALS[0]
    return [*(worst(goal, on, of, least, False) for goal, on, of, least in GOALS),
            worst(f"{name}, {APART[0]} x {APART[1]}", rows, figure, APART_GOAL, True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose shapes")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="values of M")
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=[4, 8], help="of our weights")
    parser.add_argument("--budget", type=float, default=600, help="seconds, after which no new M is begun")
    parser.add_argument("--out", type=Path, default=Path("cuda-results"), help="folder of the record")
    args = parser.parse_args()
    device, deadline = require_device(), Deadline(args.budget)
    limits = {"copy": bandwidth.copy_bandwidth(device).median, "matrix": bandwidth.matrix_peak(device).median}
    print(f"a copy: {limits['copy'] / 1e9:.0f} GB/s, cuBLAS on 8192: {limits['matrix'] / 1e12:.0f} TFLOP/s", flush=True)
    lines: list[dict[str, Any]] = []
    shapes = list(dict.fromkeys(shape for name in args.set for shape in SHAPES[name]))
    for inputs, outputs in shapes:
        lines += measure_shape(inputs, outputs, args.rows, args.bits, limits, device, deadline)
        torch.cuda.empty_cache()
        content = head(device) | {"copy_Bps": limits["copy"], "matrix_operations_per_s": limits["matrix"],
                                  "complete": not deadline.over(), "goals": goals(lines), "results": lines}
        write(args.out, "cuda_matmul", content)  # after every shape: what a time limit ends is not lost
    summary = [f"{goal['goal']}: at least {goal['least']}, worst {goal['worst'] and round(goal['worst'], 3)}"
               for goal in goals(lines)]
    table = [text(line) if "variant" in line else f"{line['inputs']} x {line['outputs']}, left out: {line['left_out']}"
             for line in lines]
    (args.out / "cuda_matmul.txt").write_text("\n".join([*table, "", *summary]) + "\n", encoding="utf-8")
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()
