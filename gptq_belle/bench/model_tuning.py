"""`gptq-belle tune`: search for the fastest tile sizes for the linears of a model, on the GPU that will run them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gptq_belle.bench.kernel_tuning import describe_problem, device_timer, table_entry, tune, write_table
from gptq_belle.common.devices import current_device, resolve_device
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import ROW_BUCKETS, MatmulProblem, row_bucket
from gptq_belle.kernels.triton_layout import SlicedWeight


def require_gpu(device: torch.device) -> None:
    """Check that a device can be tuned.

    Raises:
        HardwareError: not a CUDA device, or Triton cannot run on it.
    """
    if device.type != "cuda":
        raise HardwareError("tuning measures the GPU kernels, and this device is a CPU",
                            "Run it on the machine with the GPU; without a table, a rule chooses the tiles.")
    if reason := triton_matmul.unavailable_reason(device):
        raise HardwareError(f"the GPU kernels cannot run: {reason}", "`gptq-belle doctor` shows what is missing.")


def tune_model(path: Path, *, device: str = "auto", rows: Sequence[int] = (), out: Path | None = None,
               progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Tune the kernels for every product of a model's linears, and write the table.

    Args:
        path: a quantized model directory.
        device: as for `gptq_belle.load`.
        rows: numbers of activation rows (tokens per call). Default: every bucket.
        out: folder of the table. Default: the folder of the installed kernels.
    Returns:
        The table's path and its new entries.
    Raises:
        HardwareError: no GPU that the kernels support, or the table cannot be written.
        UsageError: a number of rows below 1.
        InputError: a model without packed linears, or as `gptq_belle.load`.
    """
    buckets = buckets_of(rows)
    where = resolve_device(device)
    require_gpu(where)
    with current_device(where):
        return _tune_on(where, path, buckets, out, progress)


def _tune_on(where: torch.device, path: Path, buckets: Sequence[int], out: Path | None,
             progress: Callable[[str], None]) -> dict[str, Any]:
    progress(f"loading {path}")
    model = hf_model(path, device=str(where))
    weights = [module.prepared for module in model.modules() if isinstance(module, QuantLinear)]
    found = group_by_problem([weight for weight in weights if isinstance(weight, SlicedWeight)], buckets, model.dtype)
    if not found:
        raise InputError(f"{path} has no linears for the GPU kernels", "Give a quantized model.")
    arch, processors = triton_matmul.device_properties(where)
    results = []
    for number, (problem, group) in enumerate(sorted(found.items(), key=lambda item: item[0]), 1):
        progress(f"problem {number} of {len(found)}: {describe_problem(problem)}")
        results.append(tune(problem, arch, processors, device_timer(problem, group)))
    table = write_table(results, arch, torch.cuda.get_device_name(where), out)
    return {"table": str(table), "entries": [table_entry(result) for result in results]}


def buckets_of(rows: Sequence[int]) -> list[int]:
    """The buckets of numbers of rows; without any, all buckets.

    Raises:
        UsageError: a number below 1.
    """
    if wrong := [number for number in rows if number < 1]:
        raise UsageError(f"{wrong[0]} rows are not allowed", "Give numbers of 1 or more.")
    return sorted({row_bucket(number) for number in rows or ROW_BUCKETS})


def group_by_problem(weights: Sequence[SlicedWeight], rows: Sequence[int],
                     dtype: torch.dtype) -> dict[MatmulProblem, list[SlicedWeight]]:
    """All problems of products with some weights, each with the weights that share it."""
    found: dict[MatmulProblem, list[SlicedWeight]] = {}
    for weight in weights:
        for number in rows:
            found.setdefault(triton_matmul.problem_of(weight, number, dtype), []).append(weight)
    return found
