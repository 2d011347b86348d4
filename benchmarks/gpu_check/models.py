"""Whole models on the device: the demo models through quantize, generate and serve, the speed and memory of BELLE-7B's
shape with random weights, and one block of it quantized.

The engine is imported by the steps that use it: processes that only compile then start several seconds earlier.
"""

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptq_belle.common.timers import seconds, spread
from gptq_belle.kernels.triton_config import ROW_BUCKETS, MatmulProblem
from gpu_check.correctness import solver_cases
from gpu_check.kernel_recording import Case
from gpu_check.plan import Step
from gpu_check.setting import BLOCK_SHAPES, Setting
from gpu_check.weights import product_case

if TYPE_CHECKING:
    from gptq_belle.engine.model import Model

ROOT = Path(__file__).resolve().parents[2]
DEMO = {name: ROOT / "examples" / "belle_tiny" / name for name in ("bloom", "llama")}
QUESTIONS = 4  # of the test set, from different classes
ANSWER = 48  # tokens
HEAD = (4096, 250880)  # of BELLE-7B, held in 8 bits
CACHES = ("float16", "int8")
BATCHES = (1, 8)
REPEATS = 3


class DifferentAnswer(Exception):
    """The device answers a prompt differently from the CPU."""


def steps(setting: Setting, scratch: Path) -> list[Step]:
    """All steps in order.

    Args:
        scratch: an empty folder with room for 12 GB.
    """
    demos = [step for name in DEMO for step in (
        Step(f"{name} demo: quantize", partial(quantize_demo, setting, name, scratch), 120),
        Step(f"{name} demo: generate", partial(generate_demo, setting, name, scratch), 90),
        Step(f"{name} demo: serve", partial(serve_demo, setting, name, scratch), 90))]
    large = scratch / "large"
    speeds = [Step(f"{batch} x {prompt} tokens, {cache} cache",
                   partial(speed, setting, large, cache, batch, prompt), 90)
              for cache in CACHES for prompt in setting.sizes.prompts for batch in BATCHES
              if batch == 1 or prompt == setting.sizes.prompts[0]]
    memory = [Step(f"memory, {cache} cache", partial(peak_memory, setting, large, cache), 90) for cache in CACHES]
    block = [Step("write a block", partial(write_block, setting, scratch), 120),
             *(Step(f"quantize a block, preset {preset}", partial(quantize_block, setting, scratch, preset), 120)
               for preset in ("fast", "best"))]
    return [*demos, Step("write the large model", partial(write_large, setting, large), 150), *speeds, *memory, *block]


def cases(setting: Setting) -> list[Case]:
    """The kernels of BELLE-7B's shape in every bucket of rows, and of the solver, for compilation."""
    if setting.toy:
        return []
    return [*_products(), *solver_cases()]


def _products() -> Iterator[Case]:
    for rows in ROW_BUCKETS:
        for inputs, outputs in BLOCK_SHAPES["belle-7b"]:
            yield product_case(MatmulProblem(rows, outputs, inputs, 4, 128, "float16"), bias=True)
        if rows <= BATCHES[-1]:
            yield product_case(MatmulProblem(rows, HEAD[1], HEAD[0], 8, 128, "float16"))


def quantize_demo(setting: Setting, name: str, scratch: Path) -> dict[str, Any]:
    """Quantize a demo model on the device with the command line.

    Raises:
        RuntimeError: the command failed.
    """
    rows, length = (16, 256) if setting.toy else (128, 512)
    run = subprocess.run(
        [sys.executable, "-m", "gptq_belle.cli", "quantize", DEMO[name], scratch / name, "--preset", "fast", "--rows",
         str(rows), "--seq-len", str(length), "--allow-short", "--device", str(setting.device), "--json"],
        cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {run.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads((scratch / name / "quantization_report.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("seconds", "notes", "readback_error")}


def generate_demo(setting: Setting, name: str, scratch: Path) -> dict[str, Any]:
    """Answers of a quantized demo model on the device, one by one and as a batch, equal to the CPU's.

    Raises:
        DifferentAnswer: the answers differ.
    """
    from gptq_belle import load

    expected = _cpu_answers(scratch / name)
    model = load(scratch / name, device=str(setting.device))
    alone = [model.generate(prompt, prompt_style="auto", max_new_tokens=ANSWER) for prompt in _questions()]
    together = model.generate(_questions(), prompt_style="auto", max_new_tokens=ANSWER)
    for found in (alone, together):
        _compare(found, expected)
    return {"answers": alone}


def serve_demo(setting: Setting, name: str, scratch: Path) -> dict[str, Any]:
    """Answers of a server on the device, equal to the CPU's.

    Raises:
        DifferentAnswer: the answers differ.
    """
    from bench_serving import server

    with server(scratch / name, QUESTIONS, str(setting.device)) as url:
        answers = [_ask(url, prompt) for prompt in _questions()]
    _compare(answers, _cpu_answers(scratch / name))
    return {"answers": answers}


@lru_cache(maxsize=2)
def _cpu_answers(path: Path) -> tuple[str, ...]:
    from gptq_belle import load

    model = load(path, device="cpu")
    return tuple(model.generate(prompt, prompt_style="auto", max_new_tokens=ANSWER) for prompt in _questions())


def _questions() -> list[str]:
    lines = (DEMO["bloom"].parent / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines[:: len(lines) // QUESTIONS][:QUESTIONS]]


def _compare(found: list[str], expected: tuple[str, ...]) -> None:
    for prompt, ours, cpu in zip(_questions(), found, expected, strict=True):
        if ours.strip() != cpu.strip():
            raise DifferentAnswer(f"{prompt!r}: {ours!r} instead of {cpu!r}")


def _ask(url: str, prompt: str) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": ANSWER, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text


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

    model = _model(setting, path, cache)
    workload = Workload(prompt, setting.sizes.new_tokens, batch, REPEATS)
    [times] = run_in_turns([model], workload)
    return {"prefill": asdict(spread([batch * prompt / one.prefill for one in times])),
            "decode": asdict(spread([batch * workload.tokens / one.decode for one in times])),
            "step_bytes": model.step_bytes}


@lru_cache(maxsize=1)
def _model(setting: Setting, path: Path, cache: str) -> "Model":
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
        shutil.copy(DEMO["bloom"] / name, scratch / "block")
    return {"file_bytes": size}


def quantize_block(setting: Setting, scratch: Path, preset: str) -> dict[str, Any]:
    """Quantize that block on the device, calibrated on random token ids.

    Raises:
        RuntimeError: the job fell back to fewer rows at a time or to the CPU.
    """
    from gptq_belle import Calibration, QuantConfig, quantize_checkpoint

    _model.cache_clear()  # returns the memory of the large model
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
