"""Rows of benchmarks/results/interop.json, which several test files add to, and what they share."""

import datetime
import json
import os
from pathlib import Path

import torch

from gptq_belle import __version__, hf_model
from gptq_belle.bench.doctor import machine_summary

RECORD = "GPTQ_BELLE_RECORD"  # an environment variable: the file to leave the figures in
EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "belle_tiny"
IDS = torch.randint(4, 3000, (2, 96), generator=torch.Generator().manual_seed(5))
ROWS = torch.randint(4, 3000, (8, 128), generator=torch.Generator().manual_seed(6))
TODAY = datetime.date.today().isoformat()
KEYS = ("peer", "direction", "architecture", "kind")


def records():
    """A generator for a fixture: yields a dictionary of versions, rows and refusals, and writes it at the end."""
    found = {"versions": {"gptq_belle": __version__, "torch": torch.__version__}, "rows": [], "refusals": []}
    yield found
    if path := os.environ.get(RECORD):
        head = {"date": TODAY, "command": "make interop", "machine": machine_summary()}
        _add_earlier(found, Path(path))
        Path(path).write_text(json.dumps(head | found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_earlier(found, path):
    """Keep the recorded rows of the tests that this run did not select (-k)."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found["versions"] = earlier.get("versions", {}) | found["versions"]
    for name in ("rows", "refusals"):
        measured = {_case(row) for row in found[name]}
        found[name] = [row for row in earlier.get(name, []) if _case(row) not in measured] + found[name]


def _case(row):
    return tuple(row.get(key) for key in KEYS)


def logits(path, dtype):
    with torch.inference_mode():
        return hf_model(path, device="cpu", dtype=dtype)(IDS).logits.double()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def row(key, theirs, path, exact=None):
    """A row for logits of a peer: their error and that of our own float16, against ours in float32 or `exact`."""
    exact = logits(path, torch.float32) if exact is None else exact
    return dict(zip(KEYS, key, strict=True)) | {
        "date": TODAY, "relative_error": distance(theirs, exact),
        "float16_rounding": distance(logits(path, torch.float16), exact),
        "same_top_token": float((theirs.argmax(-1) == exact.argmax(-1)).double().mean())}
