"""Speed and memory of BELLE-7B's shape with random weights on the device, and one block of it quantized.

The engine is imported by the steps that use it: processes that only compile then start several seconds earlier.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptq_belle.common.timers import seconds, spread
from gptq_belle.kernels.triton_config import ROW_BUCKETS, MatmulProblem
from gpu_check import decode_steps, solver_checks
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import BLOCK_SHAPES, ROOT, Setting
from gpu_check.weights import product_case

if TYPE_CHECKING:
    from gptq_belle.engine.model import Model

TOKENIZER = "examples/belle_tiny/bloom"
HEAD = (4096, 250880)  # of BELLE-7B, held in 8 bits
CACHES = ("float16", "int8")
BATCHES = (1, 8)
REPEATS = 3


def steps(setting: Setting, scratch: Path) -> list[Step]:
    """All steps in order.

    Args:
        scratch: an empty folder with room for 12 GB.
    """
    large = scratch / "large"
    speeds = [Step(f"{batch} x {prompt} tokens, {cache} cache",
                   partial(speed, setting, large, cache, batch, prompt), 150)
              for cache in CACHES for prompt in setting.sizes.prompts for batch in BATCHES
              if batch == 1 or prompt == setting.sizes.prompts[0]]
    memory = [Step(f"memory, {cache} cache", partial(peak_memory, setting, large, cache), 150) for cache in CACHES]
    block = [Step("write a block", partial(write_block, setting, scratch), 120),
             *(Step(f"quantize a block, preset {preset}", partial(quantize_block, setting, scratch, preset), 120)
               for preset in ("fast", "best"))]
    fused = decode_steps.steps(setting, large)
    return [Step("write the large model", partial(write_large, setting, large), 150), *fused, *speeds, *memory, *block]


def cases(setting: Setting) -> list[Case]:
    """The kernels of BELLE-7B's shape in every bucket of rows, and of the solver, for compilation."""
    if setting.toy:
        return []
    return [*_products(), *solver_checks.cases()]


def _products() -> Iterator[Case]:
    for rows in ROW_BUCKETS:
        for inputs, outputs in BLOCK_SHAPES["belle-7b"]:
            yield product_case(MatmulProblem(rows, outputs, inputs, 4, 128, "float16"), bias=True)
        if rows <= BATCHES[-1]:
            yield product_case(MatmulProblem(rows, HEAD[1], HEAD[0], 8, 128, "float16"))


def write_large(setting: Setting, out: Path) -> dict[str, Any]:
    """Write a model in 4 bits with random weights."""
    from make_model import make

    context = max(setting.sizes.prompts) + setting.sizes.new_tokens
    return {"file_bytes": make(_source(setting), out, bits=4, context=context)}


def _source(setting: Setting) -> str | Path:
    return ROOT / setting.sizes.model if setting.toy else setting.sizes.model


def speed(setting: Setting, path: Path, cache: str, batch: int, prompt: int) -> dict[str, Any]:
    """Tokens per second of prefill and of decoding, of the whole batch."""
    from gptq_belle.bench.workload import Workload, run_in_turns

    model = large_model(setting, path, cache)
    workload = Workload(prompt, setting.sizes.new_tokens, batch, REPEATS)
    [times] = run_in_turns([model], workload)
    return {"prefill": asdict(spread([batch * prompt / one.prefill for one in times])),
            "decode": asdict(spread([batch * workload.tokens / one.decode for one in times])),
            "step_bytes": model.step_bytes}


@lru_cache(maxsize=1)
def large_model(setting: Setting, path: Path, cache: str) -> "Model":
    """The model with random weights, kept for the next step."""
    from gptq_belle import load

    return load(path, device=str(setting.device), cache=cache)


def peak_memory(setting: Setting, path: Path, cache: str) -> dict[str, Any]:
    """Load time and memory after the longest prompt, in a new process, and the memory that `plan` calculates."""
    from gptq_belle.bench import footprint
    from gptq_belle.checkpoint.reader import read_config
    from gptq_belle.models.dimensions import dimensions
    from gptq_belle.models.sizes import MemorySettings, memory_use

    prompt = max(setting.sizes.prompts)
    found = footprint.measure_in_new_process(path, device=str(setting.device), cache=cache, prompt=prompt)
    settings = MemorySettings(4, 8, cache=cache, device=setting.device.type)
    planned = memory_use(dimensions(read_config(path)), settings, prompt + footprint.STEPS, 1)
    return asdict(found) | {"planned_bytes": planned.model}


def write_block(setting: Setting, scratch: Path) -> dict[str, Any]:
    """Write a float16 model of one block with random weights."""
    from make_model import make

    size = make(_source(setting), scratch / "block", bits=16, layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a job needs one, even for token ids
        shutil.copy(ROOT / TOKENIZER / name, scratch / "block")
    return {"file_bytes": size}


def quantize_block(setting: Setting, scratch: Path, preset: str) -> dict[str, Any]:
    """Quantize that block on the device, calibrated on random token ids.

    Raises:
        RuntimeError: the job fell back to fewer rows at a time or to the CPU.
    """
    from gptq_belle import Calibration, QuantConfig, quantize_checkpoint

    large_model.cache_clear()  # returns the memory of the large model
    rows, length = setting.sizes.quantized_rows
    ids = torch.randint(1000, (rows, length), generator=torch.Generator().manual_seed(0))
    reports = []
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    took = seconds(lambda: reports.append(quantize_checkpoint(
        scratch / "block", scratch / f"block-{preset}", QuantConfig(bits=4, preset=preset),
        calibration=Calibration(source=ids, allow_short=True), device=str(setting.device), resume=False)))
    [report] = reports
    if report.notes:
        raise RuntimeError(f"fallback: {report.notes[0]}")
    return {"seconds": took, "phases": report.phases, "mean_error": report.mean_error, "notes": report.notes,
            "cuda_bytes": torch.cuda.max_memory_allocated(setting.device) if setting.device.type == "cuda" else None}
