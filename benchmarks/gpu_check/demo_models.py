"""The demo models through quantize, generate and serve on the device, with answers equal to the CPU's."""

import json
import subprocess
import sys
import urllib.request
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gpu_check.plan import Step
from gpu_check.setting import ROOT, Setting

DEMO = {name: ROOT / "examples" / "belle_tiny" / name for name in ("bloom", "llama")}
QUESTIONS = 4  # of the test set, from different classes
ANSWER = 48  # tokens


class DifferentAnswer(Exception):
    """The device answers a prompt differently from the CPU."""


def steps(setting: Setting, scratch: Path) -> list[Step]:
    """All steps, in an empty folder."""
    return [step for name in DEMO for step in (
        Step(f"{name} demo: quantize", partial(quantize_demo, setting, name, scratch), 120),
        Step(f"{name} demo: generate", partial(generate_demo, setting, name, scratch), 150),
        Step(f"{name} demo: serve", partial(serve_demo, setting, name, scratch), 150))]


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
