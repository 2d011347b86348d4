"""Packed products next to cuBLAS, torch's int4 operation, and gemlite and GPTQModel where they are installed.

Every variant cycles through enough copies of its weight to exceed the L2 cache, in a CUDA graph, timed with events;
results are medians of 7 intervals. All variants of a shape use the same weight and activations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_belle.bench import cuda_timing
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import MatmulProblem
from gpu_check.agreement import WrongProduct
from gpu_check.kernel_recording import Case
from gpu_check.peers import CUBLAS, PEERS, Matmul, Peer
from gpu_check.plan import Step
from gpu_check.setting import Setting, Shape, installed
from gpu_check.weights import codes_of, expanded, product_case, random_weight

AGREEMENT = {torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative error (Frobenius norm) to float32
OURS = {"ours, 4 bits": 4, "ours, 8 bits": 8}
FIRST = ("ours, 4 bits", CUBLAS)  # needed to judge ours
OTHERS = ("torch int4", "ours, 8 bits", *(name for name in PEERS if name not in (CUBLAS, "torch int4")))
COPIES = 32  # at most, of a weight
GOALS = (  # name, rows, metric, minimum; over every shape except APART
    ("M = 1 to 16: share of a copy's bandwidth", (1, 2, 4, 8, 16), "share_of_copy", 0.85),
    ("M = 256 to 1024: speed of cuBLAS", (256, 512, 1024), "times_cublas", 0.6),
    ("M = 2048: speed of cuBLAS", (2048,), "times_cublas", 0.9),
)
APART, APART_GOAL = (4096, 16384), 0.5


def steps(setting: Setting, variants: Sequence[str], left_out: dict[str, str]) -> list[Step]:
    """One step per variant and shape. Variants that cannot run here are entered in `left_out` with the reason."""
    found = []
    for variant in variants:
        package = PEERS[variant].package if variant in PEERS else None
        if setting.toy and variant == "torch int4":
            left_out[variant] = "runs on a GPU only"
        elif package is not None and installed(package) is None:
            left_out[variant] = f"{package} is not installed"
        else:
            found += [Step(f"{shape[0]} x {shape[1]}, {variant}", partial(measure, setting, shape, variant),
                           30 if package is None else 150, variant if package else "")
                      for shape in setting.sizes.shapes]
    return found


def cases(setting: Setting) -> list[Case]:
    """Our products of all steps, for compilation."""
    return [product_case(MatmulProblem(rows, outputs, inputs, bits, 128, "float16")) for rows in setting.sizes.rows
            for inputs, outputs in setting.sizes.shapes for bits in OURS.values()]


def measure(setting: Setting, shape: Shape, variant: str) -> dict[str, Any]:
    """Seconds of a variant by number of rows, and the bytes of its weight.

    Raises:
        WrongProduct: the variant computes another product.
    """
    torch.manual_seed(sum(shape))
    inputs, outputs = shape
    bits = OURS.get(variant, 4)
    weight = random_weight(inputs, outputs, bits, setting.device)
    exact = expanded(weight)
    peer = PEERS.get(variant)
    if peer is None:
        size, dtype = weight.words.nbytes + weight.scales.nbytes, torch.float16
        make = partial(_ours, weight)
    else:
        size, dtype = int(inputs * outputs * peer.bits / 8), peer.dtype
        make = partial(_theirs, peer, *codes_of(weight))
    products = [make() for _ in range(cuda_timing.operand_copies(size, setting.device, most=COPIES))]
    lines = []
    for rows in setting.sizes.rows:
        x = torch.randn(rows, inputs, device=setting.device).half()
        expected, x = x.float() @ exact, x.to(dtype)
        error = float((products[0](x).float() - expected).norm() / expected.norm())
        if not error < AGREEMENT[dtype]:
            raise WrongProduct(f"relative error {error:.1e} with {rows} rows")
        found = cuda_timing.device_seconds([partial(product, x) for product in products])
        lines.append({"rows": rows, "seconds": found.median, "low": found.low, "high": found.high})
    del products
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"inputs": inputs, "outputs": outputs, "variant": variant, "bytes": size, "lines": lines}


def _ours(weight: Any) -> Matmul:
    """A product with a copy of a weight, as `dispatch` would run it."""
    copy = weight._replace(words=weight.words.clone(), scales=weight.scales.clone())
    return lambda x: triton_matmul.quant_matmul(x, copy)


def _theirs(peer: Peer, codes: Tensor, scales: Tensor) -> Matmul:
    return peer.make(codes, scales)


def table(results: dict[str, Any], copy: float, peak: float) -> list[dict[str, Any]]:
    """One row per shape, variant and number of rows, relative to the limits of the machine and to cuBLAS.

    Args:
        results: of `measure`, by step.
        copy, peak: bytes per second of a copy, operations per second of cuBLAS.
    """
    found = [result for result in results.values() if "lines" in result]
    cublas = {(one["inputs"], one["outputs"], line["rows"]): line["seconds"]
              for one in found if one["variant"] == CUBLAS for line in one["lines"]}
    rows = []
    for one in found:
        shape = one["inputs"], one["outputs"]
        for line in one["lines"]:
            took, base = line["seconds"], cublas.get((*shape, line["rows"]))
            rows.append({"inputs": shape[0], "outputs": shape[1], "variant": one["variant"], "bytes": one["bytes"]}
                        | line | {"share_of_copy": one["bytes"] / took / copy,
                                  "share_of_peak": 2 * line["rows"] * shape[0] * shape[1] / took / peak,
                                  "times_cublas": None if base is None else base / took})
    return rows


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst 4-bit result of ours for each goal, and whether it is reached; None if nothing was measured."""
    mine = [row for row in rows if row["variant"] == "ours, 4 bits"]

    def worst(name: str, on: Sequence[int], figure: str, least: float, apart: bool) -> dict[str, Any]:
        values = [row[figure] for row in mine if row["rows"] in on and row[figure] is not None
                  and (figure != "share_of_copy" or ((row["inputs"], row["outputs"]) == APART) == apart)]
        low = min(values, default=None)
        return {"goal": name, "least": least, "worst": low, "reached": None if low is None else low >= least}

    name, on, figure, _ = GOALS[0]
    return [*(worst(goal, rows_of_goal, of, least, False) for goal, rows_of_goal, of, least in GOALS),
            worst(f"{name}, {APART[0]} x {APART[1]}", on, figure, APART_GOAL, True)]
