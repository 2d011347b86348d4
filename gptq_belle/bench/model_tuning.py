"""`gptq-belle tune`: a model's linears, timed on the GPU that will run them, with every config of the search."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gptq_belle.bench.kernel_tuning import describe, device_timer, entry, tune, write
from gptq_belle.common.devices import resolve_device
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.kernels import triton_matmul
from gptq_belle.kernels.triton_config import ROW_BUCKETS, MatmulProblem, row_bucket
from gptq_belle.kernels.triton_layout import SlicedWeight


def require_gpu(device: torch.device) -> None:
    """Refuse what cannot be tuned.

    Raises:
        HardwareError: no CUDA device, or Triton cannot serve on it.
    """
    if device.type != "cuda":
        raise HardwareError("tuning measures the GPU kernels, and this is a CPU",
                            "Run it on the machine with the GPU; without a table, a rule chooses the tiles.")
    if lacking := triton_matmul.unavailable_reason(device):
        raise HardwareError(f"the GPU kernels cannot run: {lacking}", "`gptq-belle doctor` shows what is there.")


def tune_model(path: Path, *, device: str = "auto", rows: Sequence[int] = (), out: Path | None = None,
               progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure every case that a model's linears meet and write the table.

    Args:
        path: a quantized model directory.
        device: as everywhere.
        rows: numbers of rows of activations, as many as tokens at a time; left out, every bucket.
        out: the folder of the table; left out, that of the installed kernels.
        progress: is told what is being done.
    Returns:
        the table's path, and its new entries.
    Raises:
        HardwareError: no GPU that the kernels run on, or nowhere to write.
        UsageError: rows that are not positive.
        InputError: a model without packed linears, or as `gptq_belle.load`.
    """
    buckets = chosen_buckets(rows)
    where = resolve_device(device)
    require_gpu(where)
    progress(f"loading {path}")
    model = hf_model(path, device=device)
    weights = [module.prepared for module in model.modules() if isinstance(module, QuantLinear)]
    found = alike([weight for weight in weights if isinstance(weight, SlicedWeight)], buckets, model.dtype)
    if not found:
        raise InputError(f"{path} has no linears that the GPU kernels serve", "Give a quantized model.")
    arch, processors = triton_matmul.device_properties(where)
    results = []
    for number, (case, group) in enumerate(sorted(found.items(), key=lambda item: item[0]), 1):
        progress(f"case {number} of {len(found)}: {describe(case)}")
        results.append(tune(case, arch, processors, device_timer(case, group)))
    table = write(results, arch, torch.cuda.get_device_name(where), out)
    return {"table": str(table), "entries": [entry(tuned) for tuned in results]}


def chosen_buckets(rows: Sequence[int]) -> list[int]:
    """Rows as buckets; all where none are given.

    Raises:
        UsageError: one is not positive.
    """
    if wrong := [number for number in rows if number < 1]:
        raise UsageError(f"{wrong[0]} rows cannot be multiplied", "Give numbers from 1 on.")
    return sorted({row_bucket(number) for number in rows or ROW_BUCKETS})


def alike(weights: Sequence[SlicedWeight], rows: Sequence[int],
          dtype: torch.dtype) -> dict[MatmulProblem, list[SlicedWeight]]:
    """The cases that products with weights meet, each with all the weights that it stands for."""
    found: dict[MatmulProblem, list[SlicedWeight]] = {}
    for weight in weights:
        for number in rows:
            found.setdefault(triton_matmul.problem_of(weight, number, dtype), []).append(weight)
    return found
