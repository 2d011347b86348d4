"""GPTQModel's own loader and quantizer, on the CPU."""

import json
import os
from pathlib import Path

os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0)))  # it refuses to start on fewer than four processors

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402
from gptqmodel.quantization import FORMAT, METHOD  # noqa: E402
from jobs import run  # noqa: E402


def logits(path, ids):
    # Its usual choice on a CPU computes in bfloat16: an error of 1e-2 where float16 has 1e-3.
    method = json.loads((Path(path) / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(path, device="cpu", dtype=torch.float16, backend=backend)
    return model.model(input_ids=ids).logits


def quantize(job):
    names = ("bits", "group_size", "sym", "desc_act", "lm_head")
    config = QuantizeConfig(**{name: job[name] for name in names if name in job},
                            **({"quant_method": METHOD.AWQ, "format": FORMAT.GEMM} if job.get("awq") else {}))
    model = GPTQModel.load(job["source"], config, device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]], batch_size=1)
    model.save(job["path"])


run(["gptqmodel", "transformers"], logits, quantize)
