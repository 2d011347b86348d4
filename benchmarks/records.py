"""Where measurements go: one JSON file a benchmark, with the machine, the versions, the date and the command."""

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_belle import __version__
from gptq_belle.bench.doctor import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, content: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json``; the head says where its figures come from.

    Args:
        name: of the benchmark, without ending.
        content: JSON-ready values.
    """
    head = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"gptq_belle": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
