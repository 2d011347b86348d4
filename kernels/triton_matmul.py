"""Matrix products on NVIDIA's GPUs by the Triton kernels: whether they can serve, and the launches of a plan.

This file imports torch only; Triton and the kernels are imported by the first product.
"""

import os
import shutil
import sysconfig
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .layout import RUN_LENGTHS, is_mostly_padding
from .tensor_checks import check_tensors
from .triton_config import (
    TENSOR_CORES,
    LaunchPlan,
    MatmulProblem,
    TileConfig,
    check_offsets,
    launch_options,
    launch_plan,
    row_bucket,
)
from .triton_launch import Launch
from .triton_layout import COLUMNS, SlicedWeight

DTYPES = (torch.float16, torch.bfloat16)
MIN_CAPABILITY = 75  # compute capability; below 8.0 Triton does not use tensor cores
MIN_TRITON = (3, 5)  # of torch 2.9; with 3.4 products of up to 8 rows do not compile
CHECKED_TRITON = (3, 9)  # the newest version with which all kernels were compiled; newer ones are not refused
L2_CACHE = 48 << 20  # bytes, where the device does not tell
MIN_SCRATCH = 8 << 20  # bytes: 1024 outputs of 4096 inputs; fewer would leave multiprocessors idle in cuBLAS
INTERPRETER = (80, 8)  # compute capability and multiprocessors that plans are made for in Triton's interpreter
OPTIONS = {"enable_fp_fusion": True}  # of the kernels without a config; Triton's default differs between versions


def unsupported_reason(g_idx: Tensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels do not serve a case, or None where they do; arguments as in `dispatch.choose_kernel`."""
    if device.type != "cuda":
        return f"the Triton kernels are for GPUs, not {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernels take float16 and bfloat16, not {dtype}"
    if missing := unavailable_reason(device):
        return missing
    if dtype == torch.bfloat16 and device_properties(device)[0] < TENSOR_CORES:
        return f"the Triton kernels take bfloat16 from compute capability {TENSOR_CORES / 10} on"
    if is_mostly_padding(g_idx):
        return f"the Triton kernels take groups that fill runs of {RUN_LENGTHS[-1]} inputs"
    return None


@lru_cache(maxsize=16)
def unavailable_reason(device: torch.device) -> str | None:
    """What Triton lacks on this machine, or None if it is complete."""
    if torch.version.hip is not None:
        return "the Triton kernels have only been built for NVIDIA's GPUs"
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if (found := triton_version()) is not None and found < MIN_TRITON:
        return (f"triton {version('triton')} is too old: the kernels need {supported_triton()}. PyTorch 2.9 and newer "
                "install it (pip install -U torch)")
    if (missing := missing_build_tool()) is not None and not has_built_launcher():
        return missing
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    arch, _ = device_properties(device)
    if arch >= MIN_CAPABILITY:
        return None
    return f"the Triton kernels need compute capability {MIN_CAPABILITY / 10} or newer, not {arch / 10}"


def supported_triton() -> str:
    """The versions of Triton that the kernels support, for messages."""
    oldest, newest = (".".join(map(str, numbers)) for numbers in (MIN_TRITON, CHECKED_TRITON))
    return f"{oldest} or newer (compiled with {oldest} to {newest})"


def triton_version() -> tuple[int, int] | None:
    """Major and minor version of Triton; None where its package states none."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def missing_build_tool() -> str | None:
    """What Triton needs to build its launcher and does not find, or None."""
    if c_compiler() is None:
        return "triton needs a C compiler to build its launcher: install gcc, or name one in CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "triton needs Python.h to build its launcher: install the headers of Python (python3-dev)"
    return None


def has_built_launcher() -> bool:
    """Whether Triton's cache holds a launcher that was built before, here or on a machine with the same versions."""
    try:
        from triton.runtime import driver

        return driver.active.utils is not None
    except Exception:  # no launcher, no device, or a cache that cannot be read: a compiler is needed
        return False


def c_compiler() -> str | None:
    """The C compiler that Triton would use, or None."""
    found = (shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)
    return next((path for path in found if path), None)


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on CPU tensors, which tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=16)
def device_properties(device: torch.device) -> tuple[int, int]:
    """Compute capability as one number (86 for 8.6), and multiprocessors."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@lru_cache(maxsize=16)
def scratch_bytes(device: torch.device) -> int:
    """Bytes of expanded weight at a time: a third of the L2 cache, so that cuBLAS finds it and its rows of x there."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return max(MIN_SCRATCH, (getattr(properties, "L2_cache_size", 0) or L2_CACHE) // 3)


def plan_for(weight: SlicedWeight, rows: int, dtype: torch.dtype) -> LaunchPlan:
    """The kernel and tiles that products of `rows` rows take on the device where the weight is."""
    return launch_plan(problem_of(weight, rows, dtype), *device_properties(weight.words.device))


def problem_of(weight: SlicedWeight, rows: int, dtype: torch.dtype) -> MatmulProblem:
    """What a plan for products of `rows` rows depends on."""
    return MatmulProblem(row_bucket(rows), weight.out_features, weight.places, weight.bits, weight.run,
                         str(dtype).split(".")[1])


def quant_matmul(x: Tensor, weight: SlicedWeight, bias: Tensor | None = None,
                 plan: LaunchPlan | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,): (..., N) in x's dtype. Has no gradient.

    The same x gives the same y, to the bit. A different number of rows may be summed in a different order. In float32
    the weight is always expanded.

    Args:
        x: float16, bfloat16 or float32, on the weight's device.
        plan: kernel and tile to use; by default those of `plan_for`.
    Raises:
        ValueError: tensors that do not fit together, or that 32-bit offsets cannot address.
    """
    _check(x, weight, bias)
    rows = x.detach().reshape(-1, weight.in_features)
    if not rows.numel():
        return x.new_empty(*x.shape[:-1], weight.out_features)
    if plan is None:
        plan = plan_for(weight, rows.shape[0], x.dtype)
    with torch.cuda.device_of(x):
        rows, y = rows.contiguous(), rows.new_empty(rows.shape[0], weight.out_features)
        if weight.order is not None:
            given, rows = rows, rows.new_empty(rows.shape[0], weight.places)
            arrange_launch(given, weight, rows)()
        if plan.config is None or x.dtype not in DTYPES:
            _expand(rows, weight, bias, y)
        else:
            for launch in product_launches(rows, weight, bias, y, plan.kernel, plan.config):
                launch()
    return y.view(*x.shape[:-1], weight.out_features)


def product_launches(rows: Tensor, weight: SlicedWeight, bias: Tensor | None, y: Tensor, kernel: str,
                      config: TileConfig) -> list[Launch]:
    """The launches of rows (M, K'), inputs at their places, times the weight to y (M, N).

    Args:
        kernel: "skinny" or "gemm", for few rows or for many.
    Raises:
        ValueError: tensors that 32-bit offsets cannot address.
    """
    config = config._replace(SPLIT_K=min(config.SPLIT_K, weight.words.shape[0]))  # no part of K is empty
    if kernel == "gemm":
        return _gemm_launches(rows, weight, bias, y, config)
    check_offsets(**{"the packed weight": weight.words.numel(), "x": rows.numel(),
                     "the result": config.SPLIT_K * y.numel()})
    from .triton_skinny_launch import new_workspace, skinny_launch

    return [skinny_launch(rows, weight, y, config, new_workspace(y, config), bias=bias)]


def _gemm_launches(rows: Tensor, weight: SlicedWeight, bias: Tensor | None, y: Tensor,
                   config: TileConfig) -> list[Launch]:
    m, n, parts = rows.shape[0], weight.out_features, config.SPLIT_K
    offsets = {"the packed weight": weight.words.numel()}  # activations and results are addressed with 64 bits
    if parts > 1:
        offsets["the workspace of a split K"] = parts * m * n
    check_offsets(**offsets)
    from .triton_gemm import gemm_kernel
    from .triton_reduce import reduce_kernel

    out = y if parts == 1 else torch.empty(parts, m, n, dtype=torch.float32, device=y.device)
    tiles = -(-m // config.BM) * -(-n // config.BN)
    arguments = {"x": rows, "words": weight.words, "scales": weight.scales, "zeros": weight.zeros, "bias": bias,
                 "out": out, "M": m, "N": n, "K": weight.places}
    constants = weight_constants(weight) | {
        "BM": config.BM, "BN": config.BN, "BK": config.step(weight.block), "SPLIT_K": parts,
        "HAS_BIAS": bias is not None, "SWIZZLE": 8}
    options = launch_options("gemm", config, weight.bits, weight.run, device_properties(rows.device)[0])
    launches = [Launch(gemm_kernel, (tiles, parts), arguments, constants | options)]
    if parts > 1:
        launches.append(Launch(reduce_kernel, (-(-m * n // 256),), {
            "parts": out, "bias": bias, "out": y, "M": m, "N": n},
            {"HAS_BIAS": bias is not None, "SPLIT_K": parts, "WIDTH": 256} | OPTIONS))
    return launches


def _expand(rows: Tensor, weight: SlicedWeight, bias: Tensor | None, y: Tensor) -> None:
    """rows (M, K') times the weight to y (M, N) by cuBLAS; the weight is expanded some outputs at a time into one
    scratch."""
    n, k = weight.out_features, weight.places
    step = max(COLUMNS, scratch_bytes(rows.device) // (k * rows.itemsize) // COLUMNS * COLUMNS)
    scratch = rows.new_empty(min(step, weight.words.shape[1]), k)
    for start in range(0, n, step):
        part = scratch[: min(step, n - start)]
        dequantize(weight, start, scratch)
        stop = start + part.shape[0]
        if bias is None:
            torch.mm(rows, part.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(rows.dtype), rows, part.t(), out=y[:, start:stop])


def dequantize(weight: SlicedWeight, start: int, out: Tensor) -> None:
    """Write the weight of outputs start, start + 1, ... to out (outputs, K'), with inputs at their places.

    Args:
        start: a multiple of 128.
        out: float16, bfloat16 or float32, contiguous; its first axis a multiple of 128. Rows after the weight's last
            padded output are not written.
    Raises:
        ValueError: a weight that 32-bit offsets cannot address.
    """
    dequant_launch(weight, start, out)()


def dequant_launch(weight: SlicedWeight, start: int, out: Tensor) -> Launch:
    """The launch of `dequantize`."""
    check_offsets(**{"the packed weight": weight.words.numel()})
    from .triton_dequant import dequant_kernel

    columns = min(out.shape[0], weight.words.shape[1] - start)
    arguments = {"words": weight.words, "scales": weight.scales, "zeros": weight.zeros, "out": out, "start": start,
                 "N": weight.out_features, "K": weight.places}
    return Launch(dequant_kernel, (columns // 64, weight.words.shape[0]), arguments,
                  weight_constants(weight) | {"BN": 64} | OPTIONS)


def arrange_launch(rows: Tensor, weight: SlicedWeight, arranged: Tensor) -> Launch:
    """Copy activations (M, K) to arranged (M, K') in the order of the weight's places, with zeros in padding."""
    from .triton_reduce import arrange_kernel

    arguments = {"x": rows, "order": weight.order, "out": arranged, "M": rows.shape[0], "inputs": weight.in_features,
                 "places": weight.places}
    return Launch(arrange_kernel, (rows.shape[0], -(-weight.places // 1024)), arguments, {"WIDTH": 1024} | OPTIONS)


def weight_constants(weight: SlicedWeight) -> dict[str, int | bool]:
    """The constexpr arguments of all kernels that read a weight."""
    has_assembly = not is_interpreted() and device_properties(weight.words.device)[0] >= TENSOR_CORES
    return {"BITS": weight.bits, "RUN": weight.run, "BLOCK": weight.block, "ZERO": weight.zero, "ASM": has_assembly}


def _check(x: Tensor, weight: SlicedWeight, bias: Tensor | None) -> None:
    """Refuse tensors that the kernels would read past or misread."""
    device = weight.words.device
    check_tensors((*x.shape[:-1], weight.in_features), *DTYPES, torch.float32, device=device, contiguous=False, x=x)
    if bias is not None:
        check_tensors((weight.out_features,), device=device, bias=bias)


@torch.library.custom_op("gptq_belle::triton_matmul", mutates_args=())
def _op(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
        in_features: int, out_features: int, run: int, bits: int, zero: int) -> Tensor:
    unread = torch.empty(0, dtype=torch.int32)
    return quant_matmul(x, SlicedWeight(words, scales, zeros, order, unread, in_features, out_features, run, bits,
                                        zero, bits, 0, 0), bias)


@_op.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
      in_features: int, out_features: int, run: int, bits: int, zero: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def op(x: Tensor, weight: SlicedWeight, bias: Tensor | None = None) -> Tensor:
    """`quant_matmul` as an operation that torch.compile can capture; a call takes some microseconds longer."""
    w = weight
    result: Tensor = _op(x, w.words, w.scales, w.zeros, w.order, bias, w.in_features, w.out_features, w.run, w.bits,
                         w.zero)
    return result
