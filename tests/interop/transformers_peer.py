"""Plain transformers with optimum and gptqmodel installed, on the CPU."""

import os

os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0)))  # gptqmodel refuses to start on fewer than four processors

from jobs import run  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def logits(path, ids):
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu")(input_ids=ids).logits


run(["transformers", "optimum", "gptqmodel"], logits)
