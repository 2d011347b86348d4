"""What a peer's process is asked to do: a list of jobs in, one result a job out, errors included.

A job is {"do": "logits", "path": DIR, "ids": [[...]], "out": FILE.npy} or {"do": "quantize", "source": DIR,
"path": DIR, "rows": [[...]], "bits": ..., "group_size": ..., "sym": ..., "desc_act": ...}, or one of the peer's own.
"""

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import numpy
import torch


def run(packages, logits, quantize=None, **others):
    """Carry out the jobs of the file sys.argv[1] and write their results to sys.argv[2].

    Args:
        packages: distributions whose versions the result states.
        logits: takes a directory and ids (B, T), returns logits (B, T, V).
        quantize: takes a job.
        others: functions that take a job, by the name in "do", and return a dictionary that is the result, or None.
    """
    functions = {"logits": logits, "quantize": quantize} | others
    results = [_outcome(job, functions) for job in json.loads(Path(sys.argv[1]).read_text())]
    versions = {name: version(name) for name in ("torch", *packages)}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "results": results}))


def _outcome(job, functions):
    try:
        if job["do"] != "logits":
            return functions[job["do"]](job) or {}
        with torch.inference_mode():
            found = functions["logits"](job["path"], torch.tensor(job["ids"]))
        numpy.save(job["out"], found.float().numpy())
    except Exception:
        return {"error": traceback.format_exc()[-3000:]}
    return {}
