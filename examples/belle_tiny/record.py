"""Writes the published figures: `python -m examples.belle_tiny.record --work DIR`.

Scores both shipped models on the test questions, joins what the training runs noted in DIR/<arch>.work, and writes
benchmarks/results/belle_tiny_training.json; the table of README.md is made from that file.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from .evaluate import evaluate, read_rows
from .generate import HERE
from .model import ARCHITECTURES
from .train import TOKENS

RESULT = HERE.parents[1] / "benchmarks" / "results" / "belle_tiny_training.json"
BEGIN, END = "<!-- scores: made by record.py -->", "<!-- end of scores -->"


def processor() -> str:
    """The processor's name and what it can multiply with."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    amx = any("amx_bf16" in line for line in lines)
    return (names[0] if names else platform.machine()) + (", AMX bfloat16" if amx else "")


def training_of(work: Path) -> dict[str, Any]:
    """Steps, tokens, seconds and last losses of a run, from its loss curve."""
    with (work / "loss.csv").open(encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    steps = int(last["step"])
    return {
        "steps": steps,
        "tokens": steps * TOKENS,
        "wall_seconds": int(last["seconds"]),
        "final_loss": float(last["loss"]),
        "final_valid_loss": float(last["valid_loss"]),
    }


def table(result: dict[str, Any]) -> str:
    """The scores as a Markdown table, classes down, models across."""
    models = result["models"]
    lines = ["| class | measure | " + " | ".join(models) + " |", "|---|---|" + "---:|" * len(models)]
    for cls, score in models[ARCHITECTURES[0]]["classes"].items():
        cells = " | ".join(f"{m['classes'][cls]['score']:.1f}" for m in models.values())
        lines.append(f"| {cls} | {score['metric']} | {cells} |")
    overall = " | ".join(f"**{m['overall_exact']:.1f}**" for m in models.values())
    lines.append(f"| extract, closed_qa, classification, translation, math together | exact | {overall} |")
    for name, key, scale in (("training steps", "steps", 1), ("training minutes", "wall_seconds", 60)):
        cells = " | ".join(f"{m['training'][key] / scale:.0f}" for m in models.values())
        lines.append(f"| {name} | | {cells} |")
    return "\n".join(lines)


def update_readme(path: Path, result: dict[str, Any]) -> None:
    """Replaces the table between the two marks."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="score both models and write the published figures")
    parser.add_argument("--work", type=Path, default=HERE, help="holds bloom.work and llama.work of the training runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = read_rows(HERE / "data" / "test.jsonl")
    models = {}
    for arch in ARCHITECTURES:
        scores = evaluate(HERE / arch, rows)
        scores.pop("given")
        models[arch] = {"training": training_of(args.work / f"{arch}.work"), **scores}
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m examples.belle_tiny.record",
        "machine": {
            "cpu": processor(),
            "training_threads": 1,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "models": models,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    update_readme(HERE / "README.md", result)


if __name__ == "__main__":
    main()
