"""Write measurements: one JSON file per benchmark with machine, versions, date and command."""

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_belle import __version__
from gptq_belle.bench.doctor import machine_summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` in benchmarks/results with a header that describes the origin of the measurements.

    Args:
        name: name of the benchmark, without suffix.
        content: values that JSON can represent.
        folder: another folder to write it in.
    """
    head = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]]),
        "machine": machine_summary(),
        "versions": {"gptq_belle": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
